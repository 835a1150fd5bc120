//! Facts about this node that decide whether a container of another node can run here.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a node says of itself in an offer.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct HostFacts {
    /// `x86_64`, `aarch64`.
    pub arch: String,
    /// The CPU's features, in the kernel's words.
    pub cpu: BTreeSet<String>,
    /// The kernel's release.
    pub kernel: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// CRIU's version; empty if it was not found.
    pub criu: String,
    /// runc's version; empty if it was not found.
    pub runc: String,
    /// `v1`, `hybrid`, `v2`.
    pub cgroup: String,
}

impl HostFacts {
    /// Looks at this node. Starts `criu` and `runc` for their versions; blocking.
    pub fn gather(criu: Option<&Path>, runc: &str) -> HostFacts {
        let version = |program: Option<PathBuf>| program.and_then(|p| version_of(&p)).unwrap_or_default();
        HostFacts {
            arch: std::env::consts::ARCH.into(),
            cpu: cpu_features(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            kernel: kernel(),
            page_size: nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
                .ok()
                .flatten()
                .unwrap_or_default() as u64,
            criu: version(find_criu(criu)),
            runc: version(find_program(runc)),
            cgroup: cgroup_mode().into(),
        }
    }
}

/// The kernel's release.
pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into()
}

/// The features that all CPUs of a `/proc/cpuinfo` have: "flags" on x86, "Features" on arm64.
pub fn cpu_features(cpuinfo: &str) -> BTreeSet<String> {
    let lines = cpuinfo.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        matches!(key.trim(), "flags" | "Features").then_some(value)
    });
    lines
        .map(|value| value.split_whitespace().map(str::to_string).collect::<BTreeSet<_>>())
        .reduce(|all, one| &all & &one)
        .unwrap_or_default()
}

fn cgroup_mode() -> &'static str {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        "v2"
    } else if root.join("unified/cgroup.controllers").exists() {
        "hybrid"
    } else {
        "v1"
    }
}

/// CRIU: as configured, else `$TRANSSHIP_CRIU`, else in PATH.
pub fn find_criu(configured: Option<&Path>) -> Option<PathBuf> {
    let named =
        configured.map(Path::to_path_buf).or_else(|| std::env::var_os("TRANSSHIP_CRIU").map(Into::into));
    match named {
        Some(path) => path.exists().then_some(path),
        None => find_program("criu"),
    }
}

/// A program by path, or by name in PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Path::new(name).exists().then(|| name.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file())
}

/// The first version number in a program's `--version`.
fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    first_version(&String::from_utf8_lossy(&output.stdout))
}

/// The first word of a text that is a version, without a `v` in front.
pub fn first_version(text: &str) -> Option<String> {
    text.split_whitespace().find_map(|word| {
        let version = word.trim_start_matches('v').trim_end_matches(',');
        let numbers = version.split(['.', '-', '+', '~']).next()?;
        (version.contains('.') && !numbers.is_empty() && numbers.bytes().all(|b| b.is_ascii_digit()))
            .then(|| version.to_string())
    })
}

/// Memory that can be had without swapping, in bytes.
pub fn mem_available(meminfo: &str) -> Option<u64> {
    field_kib(meminfo, "MemAvailable:")
}

/// Free bytes of the filesystem of `dir`, or of the nearest directory above that exists; and whether it is in memory.
pub fn free_space(dir: &Path) -> Result<(u64, bool)> {
    let there = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there).with_context(|| format!("statvfs {}", there.display()))?;
    let kind = nix::sys::statfs::statfs(there).with_context(|| format!("statfs {}", there.display()))?;
    let in_memory = matches!(
        kind.filesystem_type(),
        nix::sys::statfs::TMPFS_MAGIC | nix::sys::statfs::FsType(0x8584_58f6 /* ramfs */)
    );
    Ok((stat.blocks_available() * stat.fragment_size(), in_memory))
}

/// What processes hold of memory that a migration has to move, about, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Anonymous and shared memory, each page counted in shares among those who map it.
    pub moved: u64,
    /// Of that, shared memory.
    pub shared: u64,
    /// Anonymous memory, each page counted for each who maps it: after a move, everybody has one of his own.
    pub unshared: u64,
}

impl Memory {
    /// That of these processes. Those that are gone count nothing.
    pub fn of(pids: &[u32]) -> Memory {
        let smaps = |pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
        let all = pids.iter().filter_map(|pid| smaps(pid).ok()).map(|text| Self::rolled_up(&text));
        all.fold(Memory::default(), |sum, one| Memory {
            moved: sum.moved + one.moved,
            shared: sum.shared + one.shared,
            unshared: sum.unshared + one.unshared,
        })
    }

    /// `Pss_Anon` and `Pss_Shmem` are there since Linux 5.4, before that all of `Pss`, of which nobody knows what it is.
    fn rolled_up(text: &str) -> Memory {
        let field = |name| field_kib(text, name);
        match (field("Pss_Anon:"), field("Pss_Shmem:"), field("Anonymous:")) {
            (Some(anonymous), Some(shared), Some(unshared)) => {
                Memory { moved: anonymous + shared, shared, unshared }
            }
            _ => Memory { moved: field("Pss:").unwrap_or(0), ..Memory::default() },
        }
    }
}

fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_those_of_every_cpu() {
        let text = "processor : 0\nflags\t\t: fpu sse2 avx\n\nprocessor : 1\nflags\t\t: fpu sse2\n";
        assert_eq!(cpu_features(text), ["fpu", "sse2"].map(String::from).into());
        assert_eq!(cpu_features("Features : fp asimd"), ["asimd", "fp"].map(String::from).into());
        assert!(cpu_features("").is_empty());
    }

    #[test]
    fn versions() {
        assert_eq!(first_version("Version: 4.2.1\n").as_deref(), Some("4.2.1"));
        assert_eq!(first_version("runc version 1.1.15+ds1\nspec: 1.0").as_deref(), Some("1.1.15+ds1"));
        assert_eq!(
            first_version("containerd github.com/containerd/containerd v1.7.24 x").as_deref(),
            Some("1.7.24")
        );
        assert_eq!(first_version("nothing"), None);
    }

    #[test]
    fn memory() {
        let text =
            "Rss: 9 kB\nPss: 8 kB\nPss_Anon:  3 kB\nPss_File: 4 kB\nPss_Shmem: 1 kB\nAnonymous: 5 kB\n";
        assert_eq!(Memory::rolled_up(text), Memory { moved: 4096, shared: 1024, unshared: 5120 });
        let old = Memory { moved: 8192, ..Memory::default() };
        assert_eq!(Memory::rolled_up("Pss:      8 kB\nAnonymous: 5 kB\n"), old);
        assert_eq!(mem_available("MemTotal: 2 kB\nMemAvailable:   1 kB\n"), Some(1024));
        let own = Memory::of(&[std::process::id()]);
        assert!(own.moved > 0 && own.unshared > 0 && own.shared <= own.moved, "{own:?}");
        assert_eq!(Memory::of(&[u32::MAX]), Memory::default());
    }

    #[test]
    fn this_node() {
        let facts = HostFacts::gather(None, "no-such-runtime");
        assert!(!facts.cpu.is_empty() && facts.page_size >= 4096 && facts.runc.is_empty());
        assert!(free_space(Path::new("/proc/../tmp/not/there")).unwrap().0 > 0);
    }
}
