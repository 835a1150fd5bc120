//! Has CRIU see an almost empty process where it looks for a task's private memory.
//!
//! Even where every page is "in the parent images", CRIU's dump grows with memory: it reads `smaps`, whose counters cost some 12 ms for
//! each GiB, asks twice for every page that there is (PAGEMAP_SCAN, for guard pages and for all others; looking at each page's struct takes
//! some 10 ms), writes an entry for each run of them, and resets the soft-dirty bits that it believes in. None of that needs
//! CRIU: [`crate::memory::tracker::existing`] knows the same pages in a fraction of the time, [`crate::memory::smaps`] the flags without
//! the counters, and the destination makes its own lists of pages anyway. So in the worker's mount namespace other files lie over those of
//! the tasks with much memory: a stand-in's `pagemap` and `clear_refs`, and a file of ours as `smaps`.
//!
//! What CRIU then says of these tasks' private memory is the stand-in's, and not to be believed: whoever uses this makes the list, and
//! puts the guard pages into their images ([`super::mm_image::add_guards`]). That holds whether the mounts are still there or not (the
//! kernel takes them away with the task).
//!
//! The stand-in is `transship-quick`, which has a handful of pages. It ends when we do.

use std::ffi::{CString, OsStr};
use std::fs::metadata;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

use crate::memory::smaps::Smaps;
use crate::memory::tracker::existing;

/// The argument that makes `transship-quick` one.
pub const ARGUMENT: &str = "stand-in";
/// What of the stand-in's lies over a task's own.
const FILES: [&str; 2] = ["pagemap", "clear_refs"];
/// For less memory it is not worth a mount, in KiB.
const LEAST: u64 = 16 << 10;
/// CRIU reads its mount table in the freeze.
const TASKS: usize = 16;

/// A process that is there to be looked at, and texts that are there to be read. Dropping it ends it.
pub(super) struct StandIn {
    /// It waits for its stdin to be closed.
    child: Child,
    tasks: Vec<Shown>,
}

/// A task that is not to be looked at.
struct Shown {
    pid: i32,
    smaps: Smaps,
    /// What CRIU reads instead: empty until [`StandIn::describe`].
    text: NamedTempFile,
}

impl Shown {
    fn of(pid: i32) -> Result<Shown> {
        let text = NamedTempFile::new().context("making a file for a task's mappings")?;
        Ok(Shown { pid, smaps: Smaps::of(pid), text })
    }
}

impl StandIn {
    /// Starts it for these tasks: `quick` is `transship-quick`.
    pub fn start(quick: &Path, pids: &[i32]) -> Result<StandIn> {
        let tasks = pids.iter().map(|pid| Shown::of(*pid)).collect::<Result<_>>()?;
        let mut command = Command::new(quick);
        command.arg(ARGUMENT).env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child = command.spawn().with_context(|| format!("starting {}", quick.display()))?;
        Ok(StandIn { child, tasks })
    }

    /// What lies over what of a task, in any `/proc`.
    fn files(&self, task: &Shown) -> impl Iterator<Item = (PathBuf, String)> {
        let (instead, own) = (format!("/proc/{}", self.child.id()), format!("/proc/{}", task.pid));
        let text = (task.text.path().to_owned(), format!("{own}/smaps"));
        let files = FILES.map(|file| (Path::new(&instead).join(file), format!("{own}/{file}")));
        files.into_iter().chain([text])
    }

    /// What is to be mounted where in a worker's `/proc`.
    pub fn mounts(&self) -> Vec<(CString, CString)> {
        let path = |path: &OsStr| CString::new(path.as_bytes()).ok();
        let of = |(from, to): (PathBuf, String)| path(from.as_os_str()).zip(path(to.as_ref()));
        self.tasks.iter().flat_map(|task| self.files(task)).filter_map(of).collect()
    }

    /// The tasks whose place it has taken in the eyes of a worker.
    ///
    /// # Errors
    /// It has half taken one's place: that worker must not dump.
    pub fn stands_for(&self, worker: i32) -> Result<Vec<i32>> {
        let inode = |path: &Path| metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let mut taken = Vec::new();
        for task in &self.tasks {
            let seen = self.files(task).map(|(from, to)| {
                let (from, to) = (inode(&from), inode(Path::new(&format!("/proc/{worker}/root{to}"))));
                from.is_some() && from == to
            });
            let seen: Vec<bool> = seen.collect();
            match seen.iter().all(|seen| *seen) {
                true => taken.push(task.pid),
                false => {
                    ensure!(!seen.contains(&true), "CRIU sees one half of {} and not the other", task.pid)
                }
            }
        }
        Ok(taken)
    }

    /// Writes down the tasks' mappings, for CRIU to read. They stand still; who has ended meanwhile is asked for by nobody.
    pub fn describe(&self) -> Result<()> {
        for task in &self.tasks {
            match task.smaps.read() {
                Ok(text) => task.text.as_file().write_all(&text).context("writing down a task's mappings")?,
                Err(_) if metadata(format!("/proc/{}", task.pid)).is_err() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
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
        let cat = dir.path().join("cat");
        std::os::unix::fs::symlink("/bin/cat", &cat).unwrap();
        let gone = i32::MAX;
        let mut stand_in = StandIn::start(&cat, &[task.pid(), gone]).unwrap();
        let proc = stand_in.mounts();
        assert_eq!(proc.len(), 6);
        let spawn = |proc: &[_]| Swrk::spawn(&program, &Spawn { proc, ..Spawn::default() }).unwrap();
        let (worker, half) = (spawn(&proc), spawn(&proc[1..]));
        let pid = worker.pid().as_raw();
        assert_eq!(stand_in.stands_for(pid).unwrap(), [task.pid()]);
        assert!(stand_in.stands_for(half.pid().as_raw()).is_err(), "no pagemap");
        let me = std::process::id().cast_signed();
        assert!(stand_in.stands_for(me).unwrap().is_empty(), "nobody else does");
        let read = |pid| {
            std::fs::read_to_string(format!("/proc/{worker}/root/proc/{pid}/smaps", worker = worker.pid()))
        };
        assert_eq!(read(task.pid()).unwrap(), "");
        stand_in.describe().unwrap();
        let own = std::fs::read_to_string(format!("/proc/{}/maps", task.pid())).unwrap();
        assert!(own.lines().count() > 5);
        let (seen, heads) = (read(task.pid()).unwrap(), own.lines().collect::<Vec<_>>());
        assert_eq!(seen.lines().filter(|line| heads.contains(line)).collect::<Vec<_>>(), heads);
        assert_eq!(seen.matches("VmFlags:").count(), heads.len());
        stand_in.tasks.push(Shown::of(other.pid()).unwrap());
        assert_eq!(stand_in.stands_for(pid).unwrap(), [task.pid()], "not mounted");
        for worker in [worker, half] {
            nix::sys::signal::kill(worker.pid(), nix::sys::signal::Signal::SIGKILL).unwrap();
            worker.finish();
        }
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
