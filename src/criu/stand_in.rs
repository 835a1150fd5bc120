//! Has CRIU see an almost empty process where it looks for a task's private memory.
//!
//! Even where every page is "in the parent images", CRIU's dump grows with memory: it asks twice for every page that there is
//! (PAGEMAP_SCAN, for guard pages and for all others; looking at each page's struct takes some 10 ms for each GiB), writes an entry
//! for each run of them, and resets the soft-dirty bits that it believes in. None of that needs CRIU: [`crate::memory::tracker::existing`]
//! knows the same in a fraction of the time, and the destination makes its own lists of pages anyway. So in the worker's mount namespace
//! a stand-in's `pagemap` and `clear_refs` lie over those of the tasks with much memory.
//!
//! What CRIU then says of these tasks' private memory is the stand-in's, and not to be believed: whoever uses this makes the list, and
//! puts the guard pages into their images ([`super::mm_image::add_guards`]). That holds whether the mounts are still there or not (the
//! kernel takes them away with the task).
//!
//! The stand-in is `transship-quick`, which has a handful of pages. It ends when we do.

use std::ffi::CString;
use std::fs::metadata;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::memory::tracker::existing;

/// The argument that makes `transship-quick` one.
pub const ARGUMENT: &str = "stand-in";
/// What lies over a task's own.
const FILES: [&str; 2] = ["pagemap", "clear_refs"];
/// For less memory it is not worth a mount, in KiB.
const LEAST: u64 = 16 << 10;
/// CRIU reads its mount table in the freeze.
const TASKS: usize = 16;

/// A process that is there to be looked at. Dropping it ends it.
pub(super) struct StandIn {
    /// It waits for its stdin to be closed.
    child: Child,
}

impl StandIn {
    /// Starts it: `quick` is `transship-quick`.
    pub fn start(quick: &Path) -> Result<StandIn> {
        let mut command = Command::new(quick);
        command.arg(ARGUMENT).env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child = command.spawn().with_context(|| format!("starting {}", quick.display()))?;
        Ok(StandIn { child })
    }

    /// What is to be mounted where in a worker's `/proc`, for these tasks.
    pub fn mounts(&self, pids: &[i32]) -> Vec<(CString, CString)> {
        let path = |pid: u32, file: &str| CString::new(format!("/proc/{pid}/{file}")).ok();
        let of =
            |pid: &i32| FILES.map(|file| path(self.child.id(), file).zip(path(pid.unsigned_abs(), file)));
        pids.iter().flat_map(of).flatten().collect()
    }

    /// Those of the tasks whose place it has taken in the eyes of a worker.
    pub fn stands_for(&self, worker: i32, pids: &[i32]) -> Vec<i32> {
        let seen = |pid: u32, file| {
            let meta = metadata(format!("/proc/{worker}/root/proc/{pid}/{file}"));
            meta.map(|m| (m.dev(), m.ino())).ok()
        };
        let taken = |pid: &i32| {
            FILES.iter().all(|file| {
                let own = seen(self.child.id(), file);
                own.is_some() && own == seen(pid.unsigned_abs(), file)
            })
        };
        pids.iter().copied().filter(taken).collect()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // closes its stdin; somebody else may have reaped it (the shim's reaper)
        let _ = self.child.wait();
    }
}

/// Those of these tasks for which it is worth it: the largest. None where the kernel does not tell us what CRIU then does not.
pub fn worth_it(pids: impl IntoIterator<Item = i32>) -> Vec<i32> {
    if !existing::known() {
        return Vec::new();
    }
    let status = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/status")).ok();
    let sizes = pids.into_iter().filter_map(|pid| Some((anonymous(&status(pid)?, pid)?, pid)));
    largest(sizes.collect())
}

fn largest(mut sizes: Vec<(u64, i32)>) -> Vec<i32> {
    sizes.retain(|(size, _)| *size >= LEAST);
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.into_iter().take(TASKS).map(|(_, pid)| pid).collect()
}

/// KiB of private memory that a thread-group leader has, by its `status`.
fn anonymous(status: &str, pid: i32) -> Option<u64> {
    let field = |name| status.lines().find_map(|line: &str| line.strip_prefix(name));
    let size = |name| field(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    (field("Tgid:")?.trim().parse() == Ok(pid)).then_some(())?;
    Some(size("RssAnon:")? + size("VmSwap:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::swrk::{Spawn, Swrk};
    use super::*;

    /// Ended when dropped.
    struct Process(Child);

    impl Process {
        fn start() -> Process {
            Process(Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn only_the_worker_sees_it() {
        use std::os::unix::fs::PermissionsExt;
        if !nix::unistd::geteuid().is_root() {
            return println!("SKIPPED: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("criu");
        std::fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let (task, other) = (Process::start(), Process::start());
        let waiting = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let stand_in = StandIn { child: waiting };
        let gone = i32::MAX;
        let proc = stand_in.mounts(&[task.pid(), gone]);
        assert_eq!(proc.len(), 4);
        let worker = Swrk::spawn(&program, &Spawn { proc, ..Spawn::default() }).unwrap();
        let pids = [task.pid(), other.pid(), gone];
        assert_eq!(stand_in.stands_for(worker.pid().as_raw(), &pids), [task.pid()]);
        assert!(stand_in.stands_for(std::process::id().cast_signed(), &pids).is_empty(), "nobody else does");
        nix::sys::signal::kill(worker.pid(), nix::sys::signal::Signal::SIGKILL).unwrap();
        worker.finish();
    }

    #[test]
    fn the_largest_tasks_are_worth_it() {
        let status = "Name:\tx\nTgid:\t7\nRssAnon:\t   20000 kB\nRssFile:\t 99999 kB\nVmSwap:\t 12 kB\n";
        assert_eq!(anonymous(status, 7), Some(20012));
        assert_eq!(anonymous(&status.replace("VmSwap", "Other"), 7), Some(20000));
        assert_eq!(anonymous(status, 8), None, "a thread");
        assert_eq!(anonymous("Tgid:\t7\n", 7), None, "a zombie");
        assert_eq!(largest(vec![(LEAST - 1, 1), (LEAST, 2), (LEAST + 1, 3)]), [3, 2]);
        assert_eq!(largest((0..100).map(|n| (LEAST, n)).collect()).len(), TASKS);
    }
}
