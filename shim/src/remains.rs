//! What a `runc restore` (or crun's) that was killed half-way leaves behind, and `runc delete` does not know how to remove: its state
//! directory without a `state.json` but with a bind mount in it, empty cgroups, and a CRIU that waits for the word of a runc that is gone,
//! with the tasks that it has restored. Ordinary deletes are runc's.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;

/// runc's bind mount of the root for CRIU, below its state directory (libcontainer's restore); crun's is in the bundle.
const CRIU_ROOT: &str = "criu-root";
/// How often, for all that is removed, and how long a thing that is still in use is tried again: a runc whose shim was killed, and what it
/// was making, need a moment to end.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Removes the remains of container `id` below runc's `root`, and its cgroups if nothing is in them. `bundle` is where its
/// `config.json` lies. Nothing there is fine; what cannot be removed is told and left.
pub fn clear(root: &Path, id: &str, bundle: &Path) {
    remove(root, id, bundle, false);
}

/// [`clear`] for a container that never came to life: its tasks, if a killed CRIU has left some, are nobody's.
pub fn clear_unborn(root: &Path, id: &str, bundle: &Path) {
    remove(root, id, bundle, true);
}

fn remove(root: &Path, id: &str, bundle: &Path, unborn: bool) {
    let mut pauses = TRIES;
    let state = root.join(id);
    let places = places(bundle);
    // runc kills the tasks of a container that it knows
    let half = state.exists() && !state.join("state.json").exists();
    if end_criu(bundle, &places) || half || unborn {
        for cgroup in cgroups(bundle) {
            end_tasks(&cgroup);
        }
    }
    unmount_yards(&places);
    if let Err(e) = patiently(&mut pauses, || remove_state(&state)) {
        log::error!("removing {}: {e}", state.display());
    }
    if let Err(e) = unmount(&bundle.join(CRIU_ROOT)).and_then(|()| fs::remove_dir(bundle.join(CRIU_ROOT)))
        && e.kind() != io::ErrorKind::NotFound
    {
        log::error!("removing {}: {e}", bundle.join(CRIU_ROOT).display());
    }
    for cgroup in cgroups(bundle) {
        // a restore by crun has groups of its own in it
        if let Err(e) = patiently(&mut pauses, || remove_empty(&cgroup)) {
            log::warn!("removing {}: {e}", cgroup.display());
        }
    }
}

/// Ends every CRIU that works in this bundle; one that finds out by itself that its runc is gone gets the time for it. Whether one had to be
/// killed.
fn end_criu(bundle: &Path, places: &[PathBuf]) -> bool {
    let mut killed = false;
    for attempt in 0..TRIES {
        let left = criu_in(places);
        if left.is_empty() {
            break;
        }
        if attempt >= TRIES / 4 {
            for pid in left {
                log::warn!("CRIU {pid} in {} has no runc any more: killed", bundle.display());
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
                killed = true;
            }
        }
        std::thread::sleep(PAUSE);
    }
    killed
}

/// Where CRIU works for a bundle: in its work directory, which containerd keeps in another place and links to.
fn places(bundle: &Path) -> Vec<PathBuf> {
    let work = fs::canonicalize(bundle.join("work")).ok();
    [bundle.to_owned()].into_iter().chain(work).collect()
}

/// The CRIUs with something open in these directories: each has its log there.
fn criu_in(dirs: &[PathBuf]) -> Vec<i32> {
    let inside = |path: &Path| dirs.iter().any(|dir| path.starts_with(dir));
    let criu = |pid: i32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let open = || fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        comm.starts_with("criu") && open().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| inside(&to)))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|p| p.file_name().to_str()?.parse().ok());
    pids.filter(|pid| criu(*pid)).collect()
}

/// Kills what a killed CRIU has restored: nobody will ever tell it to run.
fn end_tasks(cgroup: &Path) {
    let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in listed.lines().filter_map(|l| l.parse().ok()) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
    }
}

/// CRIU's view of the cgroups, below the directory it was started in (criu/cgroup.c, `prepare_cgroup_sfd`).
fn unmount_yards(places: &[PathBuf]) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    let yard = |p: &&Path| {
        places.iter().any(|dir| p.starts_with(dir)) && p.to_string_lossy().contains("/.criu.cgyard.")
    };
    for yard in points.filter(yard) {
        if let Err(e) = unmount(yard).and_then(|()| fs::remove_dir(yard)) {
            log::warn!("removing {}: {e}", yard.display());
        }
    }
}

/// Tries until it succeeds, there is nothing to remove, or no pause is left. runc dies with its shim, but the first process of the
/// container that it was making only once it finds that runc is gone: until then it is in the cgroups.
fn patiently(pauses: &mut u32, remove: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match remove() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if *pauses > 0 => {
                *pauses -= 1;
                std::thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

/// Removes a cgroup and those below it. The kernel refuses by itself where a task is in one.
fn remove_empty(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

fn unmount(at: &Path) -> io::Result<()> {
    match umount2(at, MntFlags::MNT_DETACH) {
        // not a mount point, or not there
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn remove_state(state: &Path) -> io::Result<()> {
    if !state.exists() {
        return Ok(());
    }
    unmount(&state.join(CRIU_ROOT))?;
    fs::remove_dir_all(state)
}

#[derive(Deserialize)]
struct Config {
    linux: Option<Linux>,
}

#[derive(Deserialize)]
struct Linux {
    #[serde(rename = "cgroupsPath")]
    cgroups_path: Option<String>,
}

/// The container's cgroups in every mounted hierarchy; none for systemd's kind of path (`slice:prefix:name`), which systemd
/// removes itself.
fn cgroups(bundle: &Path) -> Vec<PathBuf> {
    let config = fs::read(bundle.join("config.json")).ok();
    let config: Option<Config> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let path = config.and_then(|c| c.linux).and_then(|l| l.cgroups_path);
    let Some(path) = path.filter(|p| p.len() > 1 && p.starts_with('/') && !p.contains("..")) else {
        return Vec::new();
    };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    below(&mounts, &path)
}

/// `path` below every cgroup file system in the text of `/proc/self/mounts`. Pure.
fn below(mounts: &str, path: &str) -> Vec<PathBuf> {
    let cgroup = |line: &&str| matches!(line.split(' ').nth(2), Some("cgroup" | "cgroup2"));
    let mounted = mounts.lines().filter(cgroup).filter_map(|line| line.split(' ').nth(1));
    mounted.map(|at| Path::new(at).join(path.trim_start_matches('/'))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_found_in_every_hierarchy() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ntmpfs /run tmpfs rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found = below(mounts, "/default/redis");
        let wanted = ["/sys/fs/cgroup/cpu/default/redis", "/sys/fs/cgroup/unified/default/redis"];
        assert_eq!(found, wanted.map(PathBuf::from));
    }

    #[test]
    fn systemds_paths_and_odd_ones_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["system.slice:runc:redis", "/", "/a/../..", ""] {
            let config = format!(r#"{{"linux":{{"cgroupsPath":"{path}"}}}}"#);
            fs::write(dir.path().join("config.json"), config).unwrap();
            assert_eq!(cgroups(dir.path()), Vec::<PathBuf>::new(), "{path}");
        }
    }

    /// Directories stand in for cgroups, a file for a task: what holds one stays.
    #[test]
    fn only_a_criu_that_works_there_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        // as containerd makes it
        fs::create_dir_all(dir.path().join("elsewhere")).unwrap();
        fs::create_dir(&bundle).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), bundle.join("work")).unwrap();
        let log = fs::File::create(bundle.join("work/restore.log")).unwrap();
        // named criu, and with the log open; and the same without. A link: a copy may be "busy" while another test forks
        let program = dir.path().join("criu");
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let start = |stdout: std::process::Stdio| {
            std::process::Command::new(&program).arg("60").stdout(stdout).spawn().unwrap()
        };
        let since = std::time::Instant::now();
        let (mut there, mut other) = (start(log.into()), start(std::process::Stdio::null()));
        let places = places(&bundle);
        // spawn() returns as soon as the new memory is in place, the kernel gives the name a little later (fs/exec.c, begin_new_exec)
        for pid in [there.id(), other.id()] {
            while fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() != "criu\n" {
                assert!(since.elapsed().as_secs() < 60, "{pid} is never named");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(criu_in(&places), [there.id() as i32]);
        assert!(end_criu(&bundle, &places));
        assert!(!there.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn groups_in_groups_are_removed_unless_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let group = dir.path().join("c1");
        fs::create_dir_all(group.join(".proxy-crun")).unwrap();
        remove_empty(&group).unwrap();
        assert!(!group.exists());
        fs::create_dir_all(group.join("in-use")).unwrap();
        fs::write(group.join("in-use/task"), "1").unwrap();
        assert!(remove_empty(&group).is_err());
        assert!(group.join("in-use/task").exists());
    }

    #[test]
    fn a_state_directory_without_a_mount_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("c1").join(CRIU_ROOT)).unwrap();
        fs::create_dir_all(dir.path().join(CRIU_ROOT)).unwrap();
        clear(dir.path(), "c1", dir.path());
        assert!(!dir.path().join("c1").exists() && !dir.path().join(CRIU_ROOT).exists());
        clear(dir.path(), "c1", dir.path());
    }
}
