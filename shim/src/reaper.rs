//! The one place that waits for children: the `runc` runs, and the container processes that end up here because the shim is a
//! child subreaper.
//!
//! On SIGCHLD every dead child is collected with `waitpid(-1)` and handed to whoever watches its pid. Exits that nobody watches
//! yet are kept in a small bounded queue, because a container's process can end before `runc` has returned and its pid is known.
//!
//! Only children of the runtime's own thread are collected (`__WNOTHREAD`): orphans are adopted by the main thread, and a library
//! in another thread (CRIU's dump) may go on using `Child::wait` without its child being stolen from it. So everything here that
//! spawns must run on the runtime's thread, see [`crate::command`].

use std::{
    collections::{HashMap, VecDeque},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use anyhow::{Context, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::descriptors;

/// Unwatched exits that are remembered. A container without a private pid namespace can orphan many processes while one `runc`
/// runs; the oldest are forgotten first.
const UNCLAIMED_LIMIT: usize = 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its process id.
    pub pid: i32,
    /// Exit status as containerd counts it: 0-255, or 128 + signal.
    pub status: u32,
    /// When it was collected.
    pub at: SystemTime,
}

/// A point in the order of exits, see [`Reaper::mark`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// Resolves when the watched process has ended.
pub struct ExitWatch(oneshot::Receiver<Exit>);

impl ExitWatch {
    /// Waits for the end of the process. Errors only when the reaper is gone (the shim ends).
    pub async fn exit(self) -> Result<Exit> {
        self.0.await.context("the reaper has ended")
    }
}

#[derive(Default)]
struct Inner {
    count: u64,
    watched: HashMap<i32, Vec<oneshot::Sender<Exit>>>,
    unclaimed: VecDeque<(u64, Exit)>,
}

/// Handle on the reaper; clones share it.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Inner>>);

impl Reaper {
    /// Starts collecting children of the calling thread, which must be the one that drives the current-thread runtime.
    pub fn start() -> Result<Self> {
        let reaper = Self::default();
        let mut signals = signal(SignalKind::child()).context("watch for SIGCHLD")?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            // A child may have ended before the handler was in place.
            collector.collect();
            while signals.recv().await.is_some() {
                collector.collect();
            }
        });
        Ok(reaper)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the point after which exits count for a pid that is about to be born: take it before `runc` is run, pass it to
    /// [`Reaper::watch`] afterwards. It keeps an old exit of the same, recycled pid from being mistaken for the new process'.
    pub fn mark(&self) -> Mark {
        Mark(self.inner().count)
    }

    /// Watches `pid`, counting an exit that has already happened since `since`. Callable from any thread.
    pub fn watch(&self, pid: i32, since: Mark) -> ExitWatch {
        let (tx, rx) = oneshot::channel();
        let mut inner = self.inner();
        let found = inner.unclaimed.iter().position(|(n, e)| e.pid == pid && *n >= since.0);
        match found.and_then(|i| inner.unclaimed.remove(i)) {
            Some((_, exit)) => {
                let _ = tx.send(exit);
            }
            None => inner.watched.entry(pid).or_default().push(tx),
        }
        ExitWatch(rx)
    }

    /// Spawns `command` and watches it. Must run on the runtime's thread.
    pub fn spawn(&self, command: &mut Command) -> Result<(i32, ExitWatch)> {
        let (tx, rx) = oneshot::channel();
        descriptors::as_before(command);
        // The lock is held over the spawn, so that the child's exit cannot be dispatched before its watcher is in the table.
        let mut inner = self.inner();
        let child =
            command.spawn().with_context(|| format!("run {}", command.get_program().to_string_lossy()))?;
        let pid = child.id() as i32;
        inner.watched.entry(pid).or_default().push(tx);
        Ok((pid, ExitWatch(rx)))
    }

    fn collect(&self) {
        loop {
            let mut status = 0;
            // SAFETY: plain call, `status` outlives it.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::__WNOTHREAD) };
            match pid {
                0 => return,
                -1 if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => continue,
                -1 => return,
                _ => self.dispatch(Exit { pid, status: exit_status(status), at: SystemTime::now() }),
            }
        }
    }

    fn dispatch(&self, exit: Exit) {
        let mut inner = self.inner();
        let number = inner.count;
        inner.count += 1;
        if let Some(watchers) = inner.watched.remove(&exit.pid) {
            for w in watchers {
                let _ = w.send(exit);
            }
            return;
        }
        if inner.unclaimed.len() == UNCLAIMED_LIMIT {
            inner.unclaimed.pop_front();
        }
        inner.unclaimed.push_back((number, exit));
    }
}

/// A raw wait status as containerd counts it.
fn exit_status(raw: i32) -> u32 {
    if libc::WIFSIGNALED(raw) { 128 + libc::WTERMSIG(raw) as u32 } else { libc::WEXITSTATUS(raw) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pid: i32) -> Exit {
        Exit { pid, status: 7, at: SystemTime::now() }
    }

    #[tokio::test]
    async fn an_exit_before_the_watch_is_found() {
        let reaper = Reaper::default();
        let mark = reaper.mark();
        reaper.dispatch(exit(40));
        assert_eq!(reaper.watch(40, mark).exit().await.unwrap().status, 7);
    }

    #[tokio::test]
    async fn an_exit_of_a_recycled_pid_is_not_taken() {
        let reaper = Reaper::default();
        reaper.dispatch(exit(41));
        let mark = reaper.mark();
        let watch = reaper.watch(41, mark);
        let second = Exit { status: 9, ..exit(41) };
        reaper.dispatch(second);
        assert_eq!(watch.exit().await.unwrap(), second);
    }

    #[test]
    fn the_queue_is_bounded() {
        let reaper = Reaper::default();
        for pid in 0..UNCLAIMED_LIMIT as i32 + 5 {
            reaper.dispatch(exit(pid + 1));
        }
        let inner = reaper.inner();
        assert_eq!(inner.unclaimed.len(), UNCLAIMED_LIMIT);
        assert_eq!(inner.unclaimed[0].1.pid, 6);
    }

    #[tokio::test]
    async fn a_child_is_collected() {
        let reaper = Reaper::start().unwrap();
        let (_, watch) = reaper.spawn(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(watch.exit().await.unwrap().status, 3);
        let (_, watch) = reaper.spawn(Command::new("sh").args(["-c", "kill -9 $$"])).unwrap();
        assert_eq!(watch.exit().await.unwrap().status, 137);
    }
}
