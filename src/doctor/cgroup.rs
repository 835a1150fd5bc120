//! cgroup version and whether the freezer answers: a cgroup of our own is frozen and thawed, empty.

use std::path::{Path, PathBuf};

use super::Finding;

/// What is mounted below /sys/fs/cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Version {
    /// One unified hierarchy.
    V2,
    /// Controllers on v1 with an empty v2 beside them (systemd's hybrid), or v1 alone.
    V1,
    /// Nothing is mounted.
    #[default]
    None,
}

/// What [`gather`] saw.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Which hierarchy has the controllers.
    pub version: Version,
    /// A trial freeze: `Err` says where it failed.
    pub freezer: Option<Result<(), String>>,
}

/// Looks at the mounts of this process and tries the freezer.
pub fn gather() -> Facts {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (version, root) = parse_mounts(&mounts);
    Facts { version, freezer: root.map(|root| try_freezer(version, &root)) }
}

/// The version, and the mount point of the hierarchy with the freezer.
fn parse_mounts(mountinfo: &str) -> (Version, Option<PathBuf>) {
    let mut v2 = None;
    let mut v1 = None;
    let mut any_v1 = false;
    for line in mountinfo.lines() {
        // 36 35 98:0 /root /mount/point options - fstype source superoptions (proc_pid_mountinfo(5))
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        let mut right = right.split(' ');
        match (right.next(), right.nth(1)) {
            (Some("cgroup2"), _) => v2 = v2.or_else(|| Some(PathBuf::from(point))),
            (Some("cgroup"), options) => {
                any_v1 = true;
                if options.is_some_and(|o| o.split(',').any(|o| o == "freezer")) {
                    v1 = v1.or_else(|| Some(PathBuf::from(point)));
                }
            }
            _ => {}
        }
    }
    match (any_v1, v1, v2) {
        (true, root, _) => (Version::V1, root),
        (false, _, Some(root)) => (Version::V2, Some(root)),
        (false, _, None) => (Version::None, None),
    }
}

fn try_freezer(version: Version, root: &Path) -> Result<(), String> {
    let dir = root.join(format!("transship-doctor-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|e| format!("mkdir {}: {e}", dir.display()))?;
    let (file, on, off) = match version {
        Version::V2 => ("cgroup.freeze", "1", "0"),
        _ => ("freezer.state", "FROZEN", "THAWED"),
    };
    let write = |word: &str| {
        std::fs::write(dir.join(file), word).map_err(|e| format!("writing {word} to {file}: {e}"))
    };
    let result = write(on).and_then(|()| write(off));
    let removed = std::fs::remove_dir(&dir).map_err(|e| format!("rmdir {}: {e}", dir.display()));
    result.and(removed)
}

/// The rules.
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    let version = match facts.version {
        Version::V2 => Finding::ok("cgroup", "version 2"),
        Version::V1 => Finding::ok(
            "cgroup",
            "version 1 (a node's peers must have the same version; crun wants version 2)",
        ),
        Version::None => Finding::fail("cgroup", "nothing is mounted", "mount cgroup2 on /sys/fs/cgroup"),
    };
    let freezer = match &facts.freezer {
        Some(Ok(())) => Finding::ok("freezer", "freezes and thaws"),
        Some(Err(e)) => Finding::fail(
            "freezer",
            e.clone(),
            "the container cannot be stopped as one: cgroups must be writable",
        ),
        None => Finding::fail(
            "freezer",
            "no freezer hierarchy",
            "mount the freezer: mount -t cgroup -o freezer freezer /sys/fs/cgroup/freezer",
        ),
    };
    vec![version, freezer]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_is_version_1_and_its_freezer_is_found() {
        assert_eq!(parse_mounts(HYBRID), (Version::V1, Some("/sys/fs/cgroup/freezer".into())));
    }

    #[test]
    fn unified_alone_is_version_2() {
        let text = "30 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse_mounts(text), (Version::V2, Some("/sys/fs/cgroup".into())));
    }

    #[test]
    fn nothing_mounted_fails_twice() {
        assert_eq!(parse_mounts("garbage\n"), (Version::None, None));
        assert!(verdict(&Facts::default()).iter().all(|f| f.level == Level::Fail));
    }
}
