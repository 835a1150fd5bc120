//! One process of a container as the shim keeps it: the first one (init) or one added by exec. State, pid, stdio and exit; what is
//! done with them is in `container`, `lifecycle`, `exec` and `checkpoint`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::{
    errors::{TaskError, TaskResult},
    io::{ProcessIo, StdioConfig},
    reaper::Exit,
    state::{Op, State},
};

/// How long a delete waits for the rest of the output.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Go's zero time (year 1), which containerd's Go shim reports as the exit time of a process that has not exited.
const GO_ZERO_SECONDS: i64 = -62_135_596_800;

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// Exit status, or 128 + signal.
    pub status: u32,
    /// When; None for an exec that never ran.
    pub at: Option<SystemTime>,
}

/// What a deletion answers of a process.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Its pid, 0 if it never had one.
    pub pid: u32,
    /// Its exit status, 0 if it has not ended.
    pub status: u32,
    /// When it ended.
    pub at: Timestamp,
}

struct Inner {
    state: State,
    pid: u32,
    io: Option<Arc<ProcessIo>>,
}

/// A process of a container. Shared; all methods take `&self`.
pub struct Process {
    /// The container's id for init, the exec id otherwise.
    pub id: String,
    /// False for the container's first process.
    pub is_exec: bool,
    /// The stdio that the client asked for.
    pub stdio: StdioConfig,
    /// Held while an operation (start, kill, pause, checkpoint, delete, the handling of the exit) is in progress, also across
    /// `runc` runs: it orders them, and holds an exit back until the start has been announced. Reading state never needs it.
    pub op: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    exit: watch::Sender<Option<Exited>>,
}

impl Process {
    /// A process in `state` that has no pid yet.
    pub fn new(id: &str, is_exec: bool, stdio: StdioConfig, state: State) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_string(),
            is_exec,
            stdio,
            op: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner { state, pid: 0, io: None }),
            exit: watch::Sender::new(None),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its pid in the shim's pid namespace, 0 as long as it has none. It stays after the exit.
    pub fn pid(&self) -> u32 {
        self.inner().pid
    }

    /// Sets the pid, once it is known.
    pub fn set_pid(&self, pid: u32) {
        self.inner().pid = pid;
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.inner().state
    }

    /// Moves it on.
    pub fn set_state(&self, state: State) {
        self.inner().state = state;
    }

    /// Whether `op` may be done now; the error is the client's.
    pub fn check(&self, op: Op) -> TaskResult<()> {
        self.state().check(op, self.is_exec)
    }

    /// Its stdio as it is being copied; None before it is opened and for a process that never started.
    pub fn io(&self) -> Option<Arc<ProcessIo>> {
        self.inner().io.clone()
    }

    /// Sets (or replaces) its stdio.
    pub fn set_io(&self, io: Arc<ProcessIo>) {
        self.inner().io = Some(io);
    }

    /// How it ended, when it has.
    pub fn exited(&self) -> Option<Exited> {
        *self.exit.borrow()
    }

    /// Records the exit and wakes everybody who waits for it. A deleted process stays deleted.
    pub fn set_exited(&self, exit: &Exit) {
        {
            let mut inner = self.inner();
            if inner.state != State::Deleted {
                inner.state = State::Stopped;
            }
        }
        // a client waits for the end of a terminal's output before it asks for the delete
        if let Some(io) = self.io() {
            io.process_exited();
        }
        self.exit.send_replace(Some(Exited { status: exit.status, at: Some(exit.at) }));
    }

    /// Wakes those who wait for an exec that could not be started.
    pub fn release_waiters(&self) {
        self.exit.send_replace(Some(Exited { status: 0, at: None }));
    }

    /// Waits until it has ended. Any number may wait.
    pub async fn wait(&self) -> Exited {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(seen) => seen.unwrap_or(Exited { status: 255, at: None }),
            // The sender lives in self, so the channel cannot close while we are here.
            Err(_) => Exited { status: 255, at: None },
        }
    }

    /// Exit status as the API reports it: 0 while it runs.
    pub fn exit_status(&self) -> u32 {
        self.exited().map_or(0, |e| e.status)
    }

    /// Exit time as the API reports it.
    pub fn exited_at(&self) -> Timestamp {
        timestamp(self.exited().and_then(|e| e.at))
    }

    /// What is known of its end now.
    pub fn ended(&self) -> Ended {
        Ended { pid: self.pid(), status: self.exit_status(), at: self.exited_at() }
    }

    /// Resizes its terminal; nothing to do without one.
    pub fn resize(&self, width: u32, height: u32) -> TaskResult<()> {
        match self.state() {
            State::Stopped if self.is_exec => {
                return Err(TaskError::unknown("cannot resize a stopped container"));
            }
            State::Deleted => return Err(TaskError::unknown("cannot resize a deleted process")),
            _ => {}
        }
        match self.io() {
            // cut off, as in the Go shim
            Some(io) if self.stdio.terminal => Ok(io.resize(width as u16, height as u16)?),
            _ => Ok(()),
        }
    }

    /// Closes its stdin, so that it reads the end of the file.
    pub async fn close_stdin(&self) {
        if let Some(io) = self.io() {
            io.close_stdin().await;
        }
    }

    /// Waits for the rest of its output and closes its stdio.
    pub async fn finish_io(&self) {
        if let Some(io) = self.io() {
            io.drain(DRAIN_LIMIT).await;
            io.close().await;
        }
    }
}

/// A time as the API carries it; Go's zero time for none.
pub fn timestamp(at: Option<SystemTime>) -> Timestamp {
    let since = at.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    let (seconds, nanos) =
        since.map_or((GO_ZERO_SECONDS, 0), |d| (d.as_secs() as i64, d.subsec_nanos() as i32));
    Timestamp { seconds, nanos, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Arc<Process> {
        let stdio = StdioConfig {
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
            terminal: false,
        };
        Process::new("a", false, stdio, State::Created)
    }

    #[tokio::test]
    async fn many_waiters_see_one_exit_also_afterwards() {
        let p = process();
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                tokio::spawn({
                    let p = p.clone();
                    async move { p.wait().await }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        p.set_exited(&Exit { pid: 1, status: 4, at: SystemTime::now() });
        for w in waiters {
            assert_eq!(w.await.unwrap().status, 4);
        }
        assert_eq!((p.wait().await.status, p.state()), (4, State::Stopped));
    }

    #[test]
    fn no_exit_is_gos_zero_time() {
        assert_eq!(timestamp(None).seconds, GO_ZERO_SECONDS);
        let at = SystemTime::UNIX_EPOCH + Duration::new(5, 7);
        assert_eq!((timestamp(Some(at)).seconds, timestamp(Some(at)).nanos), (5, 7));
    }

    #[test]
    fn an_exit_does_not_bring_a_deleted_process_back() {
        let p = process();
        p.set_state(State::Deleted);
        p.set_exited(&Exit { pid: 1, status: 0, at: SystemTime::now() });
        assert_eq!(p.state(), State::Deleted);
    }
}
