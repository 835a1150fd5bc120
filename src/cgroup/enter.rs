//! Entering a cgroup, in every hierarchy.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::locate::{CgroupMount, parse_mountinfo, parse_proc_cgroup, under};

/// The group below a container's in which crun keeps a process, so that the container's lives until it has tasks.
const CRUN_PROXY: &str = "/.proxy-crun";

/// Moves this process (its main thread's group) into the cgroup `path` of every mounted hierarchy that has one of that name.
///
/// # Errors
/// No hierarchy has it, or one does not let us in.
pub fn enter(path: &str) -> Result<()> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let there = directories(&parse_mountinfo(&mountinfo), path);
    let there: Vec<_> =
        there.into_iter().map(|dir| dir.join("cgroup.procs")).filter(|f| f.exists()).collect();
    ensure!(!there.is_empty(), "there is no cgroup {path}");
    for procs in there {
        std::fs::write(&procs, "0").with_context(|| format!("entering {}", procs.display()))?;
    }
    Ok(())
}

fn directories(mounts: &[CgroupMount], path: &str) -> Vec<PathBuf> {
    mounts.iter().filter_map(|mount| under(mount, path)).collect()
}

/// The cgroup that a crun (`pid`) has made for the container that it restores, by the process that it keeps there. None: it keeps
/// none, as on v2 without systemd.
pub fn made_by_crun(pid: i32) -> Option<String> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let text = std::fs::read_to_string(Path::new("/proc").join(child).join("cgroup")).ok()?;
        proxys_parent(&text)
    })
}

fn proxys_parent(proc_cgroup: &str) -> Option<String> {
    let mut paths = parse_proc_cgroup(proc_cgroup).into_iter();
    paths.find_map(|(_, path)| path.strip_suffix(CRUN_PROXY).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_has_a_directory() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      38 31 0:35 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        let found = directories(&parse_mountinfo(mounts), "/default/m1");
        let wanted = ["/sys/fs/cgroup/cpu/default/m1", "/sys/fs/cgroup/pids/default/m1"];
        assert_eq!(found, wanted.map(PathBuf::from));
        assert!(directories(&parse_mountinfo(mounts), "/../x").is_empty());
    }

    #[test]
    fn cruns_process_tells_where() {
        let text = "8:pids:/default/m1/.proxy-crun\n6:freezer:/default/m1/.proxy-crun\n0::/\n";
        assert_eq!(proxys_parent(text).as_deref(), Some("/default/m1"));
        assert_eq!(proxys_parent("8:pids:/default/m1\n0::/\n"), None);
        assert_eq!(made_by_crun(std::process::id() as i32), None);
    }

    #[test]
    fn a_group_that_nobody_has_is_an_error() {
        let e = enter("/no-such-group-of-rob").unwrap_err();
        assert!(e.to_string().contains("/no-such-group-of-rob"), "{e}");
    }
}
