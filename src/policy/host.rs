//! What of this node a container may be given: looked at in a way that a container's own links cannot lead astray.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{major, minor};

/// What a folder or file of the node is that a mount names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// It lies where it says, below a listed folder.
    Fine,
    /// It is not below a listed folder.
    Unlisted,
    /// It does not exist.
    Missing,
    /// There is a link on its way, below the listed folder.
    Astray(String),
}

/// Looks for `source` below the listed folder that its path begins with. A link in the listed path itself is the administrator's and counts;
/// one further down may be a container's.
pub fn look(source: &Path, listed: &[PathBuf]) -> Source {
    if !crate::agent::spec::is_listed(source, listed) {
        return Source::Unlisted;
    }
    let mut result = Source::Unlisted;
    for top in listed {
        let Ok(rest) = source.strip_prefix(top) else { continue };
        result = beneath(top, rest);
        if result == Source::Fine {
            break;
        }
    }
    result
}

fn beneath(top: &Path, rest: &Path) -> Source {
    let open = |flags: OFlag| {
        nix::fcntl::open(top, flags | OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
    };
    if rest.as_os_str().is_empty() {
        return if open(OFlag::empty()).is_ok() { Source::Fine } else { Source::Missing };
    }
    let Ok(dir) = open(OFlag::O_DIRECTORY) else { return Source::Missing };
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    match openat2(dir.as_fd(), rest, how) {
        Ok(_) => Source::Fine,
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => Source::Missing,
        Err(e) => Source::Astray(e.desc().to_string()),
    }
}

/// Kind (`b` or `c`) and numbers of a device of this node.
pub fn device(path: &Path) -> Option<(char, u64, u64)> {
    let stat = std::fs::metadata(path).ok()?;
    let kind = match stat.file_type() {
        t if t.is_block_device() => 'b',
        t if t.is_char_device() => 'c',
        _ => return None,
    };
    Some((kind, major(stat.rdev()), minor(stat.rdev())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_below_the_listed_folder_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("srv");
        std::fs::create_dir_all(top.join("data/sub")).unwrap();
        std::fs::write(top.join("file"), "x").unwrap();
        symlink("/etc", top.join("out")).unwrap();
        symlink("data", top.join("in")).unwrap();
        // what the administrator has listed may itself be a link
        let listed = dir.path().join("listed");
        symlink(&top, &listed).unwrap();
        let list = [listed.clone()];
        for fine in ["", "data", "data/sub", "file"] {
            assert_eq!(look(&listed.join(fine), &list), Source::Fine, "{fine}");
        }
        assert_eq!(look(&listed.join("none"), &list), Source::Missing);
        for astray in ["out", "out/passwd", "in", "in/sub"] {
            assert!(matches!(look(&listed.join(astray), &list), Source::Astray(_)), "{astray}");
        }
        for unlisted in [dir.path().join("srv"), "/etc".into(), listed.join("../srv"), "listed".into()] {
            assert_eq!(look(&unlisted, &list), Source::Unlisted, "{}", unlisted.display());
        }
    }

    #[test]
    fn devices_of_this_node() {
        assert_eq!(device(Path::new("/dev/null")), Some(('c', 1, 3)));
        assert_eq!(device(Path::new("/")), None);
        assert_eq!(device(Path::new("/none")), None);
    }
}
