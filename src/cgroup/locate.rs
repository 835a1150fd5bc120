//! Where the freezer of a task is. Works inside cgroup namespaces, because `/proc/PID/cgroup` and the roots in `mountinfo` are both shown
//! relative to the reader's.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Which kind of freezer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A hierarchy with the `freezer` controller.
    V1,
    /// `cgroup.freeze` of the unified hierarchy.
    V2,
}

/// One cgroup mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CgroupMount {
    /// Which part of the hierarchy is mounted.
    root: String,
    /// Where.
    at: PathBuf,
    /// `None` is v2; else controllers and `name=...` among the super options.
    v1: Option<Vec<String>>,
}

/// Octal escapes of `/proc` files taken back.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let code = (bytes[i] == b'\\').then(|| field.get(i + 1..i + 4)).flatten();
        match code.and_then(|c| u8::from_str_radix(c, 8).ok()) {
            Some(b) => {
                out.push(b);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// The cgroup mounts in a `mountinfo` (proc(5)).
pub(crate) fn parse_mountinfo(text: &str) -> Vec<CgroupMount> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, at) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1).unwrap_or(""));
        let v1 = match kind {
            "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
            "cgroup2" => None,
            _ => return None,
        };
        Some(CgroupMount { root: unescape(root).to_string_lossy().into_owned(), at: unescape(at), v1 })
    };
    text.lines().filter_map(line).collect()
}

/// A task's cgroups: (controllers, path); v2 has no controllers.
pub(crate) fn parse_proc_cgroup(text: &str) -> Vec<(Vec<String>, String)> {
    let line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let controllers = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
        Some((controllers, path.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

/// The freezer's directory for a task with these cgroups, under these mounts.
pub(crate) fn freezer_dir(
    cgroups: &[(Vec<String>, String)],
    mounts: &[CgroupMount],
) -> Option<(Kind, PathBuf)> {
    let has = |m: &CgroupMount, c: &str| m.v1.as_ref().is_some_and(|all| all.iter().any(|x| x == c));
    let v1 = cgroups.iter().find(|(c, _)| c.iter().any(|c| c == "freezer"));
    if let Some((_, path)) = v1
        && let Some(dir) = mounts.iter().filter(|m| has(m, "freezer")).find_map(|m| under(m, path))
    {
        return Some((Kind::V1, dir));
    }
    let (_, path) = cgroups.iter().find(|(c, _)| c.is_empty())?;
    let dir = mounts.iter().filter(|m| m.v1.is_none()).find_map(|m| under(m, path))?;
    Some((Kind::V2, dir))
}

pub(super) fn under(mount: &CgroupMount, path: &str) -> Option<PathBuf> {
    // A path that climbs is outside of what the mount shows, unless the mount's root climbs the same way.
    let inside = Path::new(path).strip_prefix(&mount.root).ok()?;
    let clean = inside
        .components()
        .all(|c| matches!(c, std::path::Component::Normal(_) | std::path::Component::CurDir));
    clean.then(|| if inside.as_os_str().is_empty() { mount.at.clone() } else { mount.at.join(inside) })
}

/// Is `/sys/fs/cgroup` the unified hierarchy, and nothing else? (runc's own test.)
pub fn is_unified() -> bool {
    statfs("/sys/fs/cgroup").is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Names of the directories where v1 hierarchies are mounted, as runc lists them for a container without a cgroup namespace: one per hierarchy
/// that this process is in.
pub fn v1_hierarchies() -> Result<Vec<String>> {
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let own = parse_proc_cgroup(&read("/proc/self/cgroup")?);
    Ok(hierarchy_names(&own, &parse_mountinfo(&read("/proc/self/mountinfo")?)))
}

fn hierarchy_names(own: &[(Vec<String>, String)], mounts: &[CgroupMount]) -> Vec<String> {
    let mut missing: Vec<&String> = own.iter().flat_map(|(c, _)| c).collect();
    let mut names = Vec::new();
    for mount in mounts {
        let Some(options) = &mount.v1 else { continue };
        let before = missing.len();
        missing.retain(|c| !options.contains(c));
        if missing.len() < before
            && let Some(name) = mount.at.file_name()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
32 31 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
33 31 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
34 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
35 31 0:30 /node /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
36 31 0:30 / /mnt/a\\040b rw - cgroup cgroup rw,freezer\n";

    fn dir(cgroup: &str, mounts: &str) -> Option<(Kind, PathBuf)> {
        freezer_dir(&parse_proc_cgroup(cgroup), &parse_mountinfo(mounts))
    }

    #[test]
    fn hybrid_takes_the_v1_freezer() {
        let cgroups = "4:freezer:/node/c1\n3:cpu,cpuacct:/x\n1:name=systemd:/y\n0::/z\n";
        assert_eq!(dir(cgroups, HYBRID), Some((Kind::V1, "/sys/fs/cgroup/freezer/c1".into())));
        // What is not under the first mount's root is found under another's.
        assert_eq!(dir("4:freezer:/other\n0::/z\n", HYBRID), Some((Kind::V1, "/mnt/a b/other".into())));
        assert_eq!(dir("4:freezer:/node\n", HYBRID), Some((Kind::V1, "/sys/fs/cgroup/freezer".into())));
        assert_eq!(dir("4:freezer:/nodes\n", HYBRID), Some((Kind::V1, "/mnt/a b/nodes".into())));
    }

    #[test]
    fn unified_and_a_freezer_that_is_not_mounted() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            dir("0::/a.slice/b.scope\n", v2),
            Some((Kind::V2, "/sys/fs/cgroup/a.slice/b.scope".into()))
        );
        assert_eq!(dir("4:freezer:/x\n0::/y\n", v2), Some((Kind::V2, "/sys/fs/cgroup/y".into())));
        assert_eq!(dir("0::/../elsewhere\n", v2), None, "outside of our cgroup namespace");
        assert_eq!(dir("", v2), None);
    }

    #[test]
    fn hierarchies_are_listed_once_and_only_ours() {
        let own = parse_proc_cgroup("4:freezer:/\n3:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n");
        assert_eq!(hierarchy_names(&own, &parse_mountinfo(HYBRID)), ["systemd", "cpu,cpuacct", "freezer"]);
        assert!(hierarchy_names(&[], &parse_mountinfo(HYBRID)).is_empty());
    }
}
