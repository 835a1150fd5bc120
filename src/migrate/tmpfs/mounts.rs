//! The container's own tmpfs mounts and the files on them, from outside and without ever leaving them.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use anyhow::{Context, Result};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{fstat, makedev};

use crate::rootfs::Directory;

/// Directories are not followed deeper than this, and no more files than this are looked at: what is not found here goes as it always
/// went.
const DEPTH: usize = 64;
const FILES: usize = 100_000;

/// A tmpfs: its device and where it is mounted in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub device: u64,
    pub at: Vec<u8>,
}

/// The tmpfs mounts of a task that CRIU dumps with their content: whole file systems, not what comes from outside.
pub fn of_task(pid: i32, external: &HashSet<String>) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = std::fs::read(&path).with_context(|| format!("reading {path}"))?;
    let mut all: Vec<Mount> = Vec::new();
    for mount in text.split(|b| *b == b'\n').filter_map(tmpfs) {
        let outside = std::str::from_utf8(&mount.at).is_ok_and(|at| external.contains(at));
        if !outside && all.iter().all(|m| m.device != mount.device) {
            all.push(mount);
        }
    }
    Ok(all)
}

/// `id parent major:minor root mountpoint options [optional ...] - type source options` (proc_pid_mountinfo(5)).
fn tmpfs(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = makedev(major.parse().ok()?, minor.parse().ok()?);
    let root = fields.next()?;
    let at = unescape(fields.next()?);
    let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
    (kind == b"tmpfs" && root == b"/").then_some(Mount { device, at })
}

/// Spaces and the like are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        if let Some(digits) = digits {
            out.push(digits.iter().fold(0, |n: u8, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
            rest = &tail[3..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// Hands every regular file of the mount with at least `least` bytes to `each`, as a descriptor that only names it. What is mounted
/// on top, and what disappears meanwhile, is passed over.
pub fn files(pid: i32, mount: &Mount, least: u64, each: &mut dyn FnMut(OwnedFd) -> Result<()>) -> Result<()> {
    let Some(root) = root(pid, mount) else { return Ok(()) };
    let mut open = vec![(root, 0)];
    let mut looked = 0;
    while let Some((dir, depth)) = open.pop() {
        let Ok(dir) = Directory::read(dir) else { continue };
        for name in dir.names() {
            looked += 1;
            if looked > FILES {
                return Ok(());
            }
            let Ok(node) = dir.open(name) else { continue };
            let Ok(stat) = fstat(&node) else { continue };
            match stat.st_mode & libc::S_IFMT {
                libc::S_IFDIR if depth < DEPTH => open.push((node, depth + 1)),
                libc::S_IFREG if stat.st_size as u64 >= least && stat.st_dev == mount.device => each(node)?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// The mount's own directory, if it is the one that shows there.
fn root(pid: i32, mount: &Mount) -> Option<OwnedFd> {
    let top = File::open(format!("/proc/{pid}/root")).ok()?;
    let path = std::ffi::OsString::from_vec(mount.at.clone());
    let resolve =
        ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(resolve);
    let root = openat2(top.as_fd(), path.as_os_str(), how).ok()?;
    (fstat(&root).ok()?.st_dev == mount.device).then_some(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let at = |line: &str| tmpfs(line.as_bytes()).map(|m| (m.device, String::from_utf8(m.at).unwrap()));
        assert_eq!(
            at("101 90 0:57 / /dev/shm rw,nosuid - tmpfs shm rw,size=65536k"),
            Some((makedev(0, 57), "/dev/shm".into()))
        );
        assert_eq!(
            at("101 90 0:57 / /a\\040b\\134 rw shared:1 master:2 - tmpfs tmpfs rw").unwrap().1,
            "/a b\\"
        );
        for other in [
            "101 90 0:57 /part /dev/shm rw - tmpfs shm rw",
            "101 90 0:57 / /dev/pts rw - devpts devpts rw",
            "101 90 0:57 / /x rw - ext4 tmpfs rw",
            "",
        ] {
            assert_eq!(at(other), None, "{other}");
        }
    }

    #[test]
    fn files_are_found_and_nothing_outside() {
        let pid = std::process::id() as i32;
        let all = of_task(pid, &HashSet::new()).unwrap();
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        // one mount may hide another
        let device = std::os::unix::fs::MetadataExt::dev(&dir.path().metadata().unwrap());
        let Some(shm) = all.iter().find(|m| m.device == device) else {
            return println!("SKIPPED: no tmpfs at /dev/shm");
        };
        assert!(!of_task(pid, &HashSet::from(["/dev/shm".into()])).unwrap().contains(shm));
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/large"), vec![1; 5000]).unwrap();
        std::fs::write(dir.path().join("a/small"), vec![1; 4999]).unwrap();
        std::os::unix::fs::symlink("a/b/large", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("out")).unwrap();
        let ours = |path: &std::path::Path| path.starts_with(dir.path());
        let mut found = Vec::new();
        files(pid, shm, 5000, &mut |fd| {
            use std::os::fd::AsRawFd;
            found.push(std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?);
            Ok(())
        })
        .unwrap();
        found.retain(|p| ours(p));
        assert_eq!(found, [dir.path().join("a/b/large")]);
    }
}
