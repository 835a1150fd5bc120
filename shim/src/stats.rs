//! The metrics of a container's cgroup, with the fields that containerd's own shim fills (`containerd/cgroups`), for cgroup v1
//! (`io.containerd.cgroups.v1.Metrics`) and v2.
//!
//! Not containerd-shim's `cgroup` helper: for v1 it reads the CPU file by v2's names (usage and throttling stay 0), and leaves out
//! most of memory, blkio, hugetlb and rdma; for v2 it leaves out io, rdma, hugetlb and pressure, and reports an unlimited number
//! of processes as 0. So one layer below: the kernel's files and the generated messages.
//!
//! Here: finding the cgroup, and reading files. The two versions' fields are in `v1` and `v2`.

mod v1;
mod v2;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Where cgroups are mounted, on every distribution.
const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup of a process: found once, usable after the process has gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroup {
    /// Version 1 (also systemd's hybrid mode): a directory for each controller.
    V1(HashMap<String, PathBuf>),
    /// Version 2: one directory.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroup that a process is in now.
    pub fn of_pid(pid: u32) -> Result<Cgroup> {
        let path = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let unified = statfs(ROOT).with_context(|| format!("statfs of {ROOT}"))?.filesystem_type()
            == CGROUP2_SUPER_MAGIC;
        parse(&text, unified).with_context(|| format!("in {path}"))
    }

    /// The directory of one controller.
    pub fn dir(&self, controller: &str) -> Option<&Path> {
        match self {
            Cgroup::V1(dirs) => dirs.get(controller).map(PathBuf::as_path),
            Cgroup::V2(dir) => Some(dir),
        }
    }

    /// Whether the cgroup is still there.
    pub fn exists(&self) -> bool {
        match self {
            Cgroup::V1(dirs) => dirs.values().any(|dir| dir.exists()),
            Cgroup::V2(dir) => dir.exists(),
        }
    }

    /// Its metrics now, as containerd's `Stats` answers them. A controller that is not there leaves its fields out.
    pub fn metrics(&self) -> Result<Any> {
        if !self.exists() {
            bail!("the cgroup does not exist any more");
        }
        let (name, value) = match self {
            Cgroup::V1(dirs) => ("io.containerd.cgroups.v1.Metrics", v1::metrics(dirs).write_to_bytes()),
            Cgroup::V2(dir) => ("io.containerd.cgroups.v2.Metrics", v2::metrics(dir).write_to_bytes()),
        };
        Ok(Any {
            type_url: name.to_string(),
            value: value.context("encoding metrics")?,
            ..Default::default()
        })
    }
}

/// Reads `/proc/PID/cgroup`: lines `id:controllers:path`, the one of v2 with id 0 and no controllers.
fn parse(text: &str, unified: bool) -> Result<Cgroup> {
    let mut dirs = HashMap::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            bail!("line {line:?} is not understood");
        };
        let path = path.trim_start_matches('/');
        match (controllers, unified) {
            ("", true) => return Ok(Cgroup::V2(Path::new(ROOT).join(path))),
            ("", false) => {}
            _ => {
                for controller in controllers.split(',') {
                    let name = controller.strip_prefix("name=").unwrap_or(controller);
                    // Controllers that are mounted together have a symbolic link each.
                    dirs.insert(name.to_string(), Path::new(ROOT).join(name).join(path));
                }
            }
        }
    }
    if dirs.is_empty() {
        bail!("no cgroup is named");
    }
    Ok(Cgroup::V1(dirs))
}

/// One number; `max` is the largest there is for v2 and 0 for v1, as containerd reports it. 0 when it cannot be read.
fn number(path: PathBuf, max: u64) -> u64 {
    fs::read_to_string(path).map_or(0, |text| parse_number(text.trim(), max))
}

fn parse_number(text: &str, max: u64) -> u64 {
    if text == "max" { max } else { text.parse().unwrap_or(0) }
}

/// A file of `key value` lines; empty when it cannot be read.
fn table(path: PathBuf) -> HashMap<String, u64> {
    let Ok(text) = fs::read_to_string(path) else { return HashMap::new() };
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_string(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// Fills fields from a table.
fn fill(fields: &mut [(&str, &mut u64)], table: &HashMap<String, u64>) {
    for (key, field) in fields {
        **field = table.get(*key).copied().unwrap_or(0);
    }
}

/// The sizes of huge pages of this machine as cgroup files name them: `2MB`, `1GB`.
fn huge_page_sizes() -> Vec<String> {
    let Ok(dir) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    dir.flatten().filter_map(|entry| huge_page_size(entry.file_name().to_str()?)).collect()
}

/// `hugepages-2048kB` is `2MB`.
fn huge_page_size(name: &str) -> Option<String> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kib {
        1_048_576.. => format!("{}GB", kib >> 20),
        1024.. => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    })
}

/// Lines `device hca_handle=N hca_object=N` of the rdma controller.
fn rdma(path: PathBuf) -> Vec<(String, u32, u32)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let device = words.next()?.to_string();
        let mut values = [("hca_handle", 0), ("hca_object", 0)];
        for word in words {
            let (key, value) = word.split_once('=')?;
            for (_, slot) in values.iter_mut().filter(|(name, _)| *name == key) {
                *slot = if value == "max" { u32::MAX } else { value.parse().ok()? };
            }
        }
        Some((device, values[0].1, values[1].1))
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{cgroups, cgroups_v2};

    use super::*;

    #[test]
    fn cgroup_files() {
        let hybrid = "4:memory:/a/b\n2:cpu,cpuacct:/c:d\n1:name=systemd:/s\n0::/u\n";
        let cgroup = parse(hybrid, false).unwrap();
        assert_eq!(cgroup.dir("memory").unwrap(), Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(cgroup.dir("cpuacct").unwrap(), Path::new("/sys/fs/cgroup/cpuacct/c:d"));
        assert_eq!(cgroup.dir("systemd").unwrap(), Path::new("/sys/fs/cgroup/systemd/s"));
        assert!(cgroup.dir("").is_none());
        assert_eq!(parse("0::/x/y\n", true).unwrap(), Cgroup::V2("/sys/fs/cgroup/x/y".into()));
        assert!(parse("0::/x\n", false).is_err());
        assert!(parse("nonsense", true).is_err());
    }

    #[test]
    fn numbers() {
        assert_eq!((parse_number("max", 7), parse_number("12", 7), parse_number("-1", 7)), (7, 12, 0));
        assert_eq!(huge_page_size("hugepages-2048kB").unwrap(), "2MB");
        assert_eq!(huge_page_size("hugepages-1048576kB").unwrap(), "1GB");
        assert_eq!(huge_page_size("hugepages-64kB").unwrap(), "64KB");
        assert!(huge_page_size("other").is_none());
    }

    /// Our own cgroup, whatever this machine has.
    #[test]
    fn own_cgroup() {
        let any = Cgroup::of_pid(std::process::id()).unwrap().metrics().unwrap();
        if any.type_url.contains("v1") {
            let metrics = cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
            assert!(metrics.cpu.usage.total > 0 && metrics.memory.usage.usage > 0);
        } else {
            let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
            assert!(metrics.cpu.usage_usec > 0);
        }
        assert!(Cgroup::of_pid(u32::MAX / 2).is_err());
    }
}
