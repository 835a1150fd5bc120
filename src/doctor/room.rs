//! Room for images in flight: the state directory must be tmpfs (CRIU's images never touch a disk), and memory must be free.

use std::path::{Path, PathBuf};

use super::Finding;

/// Below this the node can take only small containers, in bytes.
const LITTLE: u64 = 256 << 20;

/// What [`gather`] saw.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The directory asked about.
    pub dir: PathBuf,
    /// Lies on a tmpfs.
    pub in_memory: bool,
    /// Bytes free there.
    pub free: u64,
    /// MemAvailable, in bytes.
    pub available: u64,
    /// Why the directory could not be asked.
    pub error: Option<String>,
}

/// Asks the nearest ancestor of `dir` that exists: the agent makes the rest.
pub fn gather(dir: &Path) -> Facts {
    let mut facts = Facts { dir: dir.to_path_buf(), ..Facts::default() };
    let nearest = dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statfs::statfs(nearest) {
        Ok(fs) => {
            facts.in_memory = fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
            facts.free = fs.blocks_available() * fs.block_size() as u64;
        }
        Err(e) => facts.error = Some(format!("{}: {e}", nearest.display())),
    }
    facts.available = mem_available(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    facts
}

fn mem_available(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .map_or(0, |kb| kb * 1024)
}

/// The rules.
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    let mib = |bytes: u64| bytes >> 20;
    let images = match &facts.error {
        Some(e) => Finding::fail("images", e.clone(), "the state directory must be reachable"),
        None if !facts.in_memory => Finding::fail(
            "images",
            format!("{} is not on tmpfs", facts.dir.display()),
            "the state of a container in flight must not be written to a disk: mount a tmpfs there",
        ),
        None if facts.free < LITTLE => Finding::warn(
            "images",
            format!("{}: {} MiB free", facts.dir.display(), mib(facts.free)),
            "a container's memory has to fit there while it arrives: mount -o remount,size=.. the tmpfs",
        ),
        None => {
            Finding::ok("images", format!("{} on tmpfs, {} MiB free", facts.dir.display(), mib(facts.free)))
        }
    };
    let memory = if facts.available < LITTLE {
        Finding::warn(
            "memory",
            format!("{} MiB available", mib(facts.available)),
            "only small containers can be taken in",
        )
    } else {
        Finding::ok("memory", format!("{} MiB available", mib(facts.available)))
    };
    vec![images, memory]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn disk_fails_and_little_room_warns() {
        let good = Facts { in_memory: true, free: 1 << 30, available: 1 << 30, ..Facts::default() };
        let levels = |f: &Facts| verdict(f).iter().map(|f| f.level).collect::<Vec<_>>();
        assert_eq!(levels(&good), [Level::Ok, Level::Ok]);
        assert_eq!(levels(&Facts { in_memory: false, ..good.clone() })[0], Level::Fail);
        assert_eq!(
            levels(&Facts { free: 1 << 20, available: 0, ..good.clone() }),
            [Level::Warn, Level::Warn]
        );
        assert_eq!(levels(&Facts { error: Some("x".into()), ..good })[0], Level::Fail);
    }

    #[test]
    fn meminfo_is_in_kibibytes() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), 2 << 20);
        assert_eq!(mem_available(""), 0);
    }
}
