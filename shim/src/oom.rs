//! Tells when the kernel has killed a process of a container for want of memory: an eventfd on `memory.oom_control` for cgroup
//! v1, inotify on `memory.events` for v2. One watch per container; dropped, it is gone. What follows from a kill (the event for
//! containerd) is not here.
//!
//! v1 notifies when the cgroup runs out of memory, and once more when it is removed; v2's file changes for other reasons too, there
//! a kill is a rise of `oom_kill`. Both as containerd's own shim does it.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::{Interest, unix::AsyncFd};

use crate::stats::Cgroup;

/// The kills in one cgroup.
pub struct Kills {
    notice: AsyncFd<OwnedFd>,
    dir: PathBuf,
    /// v2: kills that are known. v1: none.
    seen: Option<u64>,
}

/// Watches a cgroup.
pub fn watch(cgroup: &Cgroup) -> Result<Kills> {
    let dir = cgroup.dir("memory").context("the container is in no memory cgroup")?;
    match cgroup {
        Cgroup::V1(_) => watch_v1(dir),
        Cgroup::V2(_) => watch_v2(dir),
    }
    .with_context(|| format!("watching {} for kills", dir.display()))
}

impl Kills {
    /// Waits for a kill. `None` when the cgroup is gone.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            let mut guard = self.notice.readable().await.ok()?;
            // An eventfd gives 8 bytes, inotify whole records; only that there was one counts.
            let mut buffer = [0; 4096];
            let outcome = guard.try_io(|fd| nix::unistd::read(fd.get_ref(), &mut buffer).map_err(Into::into));
            match outcome {
                Err(_not_yet) => continue,
                Ok(Err(e)) => {
                    log::debug!("watching {}: {e}", self.dir.display());
                    return None;
                }
                Ok(Ok(_)) => {}
            }
            match &mut self.seen {
                None if self.dir.join("memory.oom_control").exists() => return Some(()),
                None => return None,
                Some(seen) => {
                    let kills = count(&self.dir, "memory.events", "oom_kill")?;
                    if kills > *seen {
                        *seen = kills;
                        return Some(());
                    }
                    if count(&self.dir, "cgroup.events", "populated").unwrap_or(0) == 0 {
                        return None;
                    }
                }
            }
        }
    }
}

fn watch_v1(dir: &Path) -> Result<Kills> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("eventfd")?;
    let file = fs::File::open(dir.join("memory.oom_control")).context("opening memory.oom_control")?;
    let order = format!("{} {}", event.as_raw_fd(), file.as_raw_fd());
    fs::write(dir.join("cgroup.event_control"), order).context("writing cgroup.event_control")?;
    Ok(Kills { notice: register(event.into())?, dir: dir.to_path_buf(), seen: None })
}

fn watch_v2(dir: &Path) -> Result<Kills> {
    // SAFETY: takes its flags by value.
    let raw = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    if raw < 0 {
        return Err(io::Error::last_os_error()).context("inotify");
    }
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    let inotify = unsafe { OwnedFd::from_raw_fd(raw) };
    for name in ["memory.events", "cgroup.events"] {
        let path = CString::new(dir.join(name).as_os_str().as_bytes()).context("path")?;
        // SAFETY: the path is a C string that lives through the call.
        if unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) } < 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("watching {name}"));
        }
    }
    // After the watches, so that no kill falls in between.
    let seen = count(dir, "memory.events", "oom_kill").context("reading memory.events")?;
    Ok(Kills { notice: register(inotify)?, dir: dir.to_path_buf(), seen: Some(seen) })
}

fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and stays the same descriptor for as long as it lives; here that is as long as the AsyncFd.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    registered.map_err(io::Error::from).context("registering with the event loop")
}

/// One number of a `key value` file.
fn count(dir: &Path, file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join(file)).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    Some(value.map_or(0, |value| value.trim().parse().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
        time::Duration,
    };

    use tokio::time::timeout;

    use super::*;

    /// Ordinary files behave like v2's: written to, they notify.
    #[tokio::test]
    async fn v2_fires_when_kills_rise() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("memory.events", "low 0\noom 1\noom_kill 1\noom_group_kill 9\n");
        write("cgroup.events", "populated 1\nfrozen 0\n");
        let mut kills = watch_v2(dir.path()).unwrap();
        let append = |text: &str| {
            let mut file = fs::File::options().append(true).open(dir.path().join("memory.events")).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        };
        append("high 3\n");
        assert!(timeout(Duration::from_millis(100), kills.next()).await.is_err(), "nobody was killed");
        let replace = |text: &str| {
            use std::os::unix::fs::FileExt;
            let file = fs::File::options().write(true).open(dir.path().join("memory.events")).unwrap();
            file.write_all_at(text.as_bytes(), 0).unwrap();
        };
        replace("low 0\noom 1\noom_kill 2\n");
        assert_eq!(timeout(Duration::from_secs(5), kills.next()).await.unwrap(), Some(()));
        write("cgroup.events", "populated 0\nfrozen 0\n");
        assert_eq!(timeout(Duration::from_secs(5), kills.next()).await.unwrap(), None);
    }

    /// A real cgroup v1 where we may make one; elsewhere the test says so and ends.
    #[tokio::test]
    async fn v1_kill() {
        let dir = PathBuf::from(format!("/sys/fs/cgroup/memory/stdio-oom-{}", std::process::id()));
        if !Path::new("/sys/fs/cgroup/memory/memory.oom_control").exists() || fs::create_dir(&dir).is_err() {
            eprintln!("skipped: no writable cgroup v1 memory controller here");
            return;
        }
        fs::write(dir.join("memory.limit_in_bytes"), "8388608").unwrap();
        let mut kills = watch_v1(&dir).unwrap();
        // The shell enters the cgroup, and tail keeps more than it may.
        let script = format!(
            "echo $$ > {}/cgroup.procs; head -c 100000000 /dev/zero | tail -c 90000000",
            dir.display()
        );
        let mut child = Command::new("sh").args(["-c", &script]).stdout(Stdio::null()).spawn().unwrap();
        let fired = timeout(Duration::from_secs(60), kills.next()).await;
        // The kernel tells of it before it has killed anybody, and the shell's pipeline outlives the shell: all of them are ended
        // here, however long a busy machine takes for that.
        let _ = child.kill();
        let _ = child.wait();
        let removed = async {
            while fs::remove_dir(&dir).is_err() {
                let left = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                for pid in left.lines().filter_map(|pid| pid.parse().ok()) {
                    let _ = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(pid),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(60), removed).await.unwrap();
        assert_eq!(fired.unwrap(), Some(()));
        let end = async { while kills.next().await.is_some() {} };
        timeout(Duration::from_secs(60), end).await.unwrap();
    }
}
