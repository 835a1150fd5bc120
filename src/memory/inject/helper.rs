//! Injections by a process of their own, for a process that waits for its children: a traced child's stops are reported to every
//! thread of its parent that waits (wait(2) tells threads of one process apart only if all of them ask for it), so the shim's
//! reaper would take them away from the tracer, and take them for the child's end.
//!
//! The helper is the same executable with [`ARG`], started at the first injection and ended by [`rest`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::control::transport;

/// The argument with which the executable becomes the helper.
pub const ARG: &str = "inject-helper";
/// Longer than any attempt takes.
const PATIENCE: Duration = Duration::from_secs(10);

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
static HELPER: Mutex<Option<UnixStream>> = Mutex::new(None);

#[derive(Serialize, Deserialize)]
struct Ask {
    pid: i32,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    error: Option<String>,
}

/// From here on all injections of this process go through `program`, whose main has to call [`main`] when it sees [`ARG`].
pub fn through(program: &Path) {
    PROGRAM.set(program.to_owned()).ok();
}

/// Is there such a program?
pub(super) fn wanted() -> bool {
    PROGRAM.get().is_some()
}

/// Ends the helper, if it runs; the next injection starts another one.
pub fn rest() {
    *helper() = None;
}

fn helper() -> MutexGuard<'static, Option<UnixStream>> {
    HELPER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`super::userfaultfd`].
pub(super) fn userfaultfd(pid: i32) -> Result<OwnedFd> {
    let mut helper = helper();
    let socket = match helper.take() {
        Some(socket) => socket,
        None => start(PROGRAM.get().context("no program for injections")?)?,
    };
    transport::send(&socket, &Ask { pid }, &[]).context("asking the injection's helper")?;
    let answer = transport::recv::<Answer>(&socket).context("waiting for the injection's helper")?;
    let Some((answer, fds)) = answer else { bail!("the injection's helper has ended") };
    // only one that answered is asked again
    *helper = Some(socket);
    match (answer.error, fds.into_iter().next()) {
        (None, Some(fd)) => Ok(fd),
        (Some(error), _) => bail!("{error}"),
        (None, None) => bail!("the injection's helper sent no descriptor"),
    }
}

fn start(program: &Path) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("making the injection helper's socket pair")?;
    ours.set_read_timeout(Some(PATIENCE)).context("the injection helper's socket")?;
    let mut command = Command::new(program);
    command.arg(ARG).env_clear().current_dir("/");
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec only two system calls are made; nothing allocates.
    unsafe {
        command.pre_exec(|| {
            // its own session: a signal for our process group is not for it while a task has its registers
            libc::setsid();
            libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
            Ok(())
        });
    }
    let mut child =
        command.spawn().with_context(|| format!("starting the injection's helper, {}", program.display()))?;
    // it ends when the socket does; the shim's reaper collects it, elsewhere this thread
    std::thread::Builder::new().name("inject-end".into()).spawn(move || child.wait().map(drop)).ok();
    Ok(ours)
}

/// The helper itself.
pub fn main() -> ExitCode {
    let socket = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(fd) => UnixStream::from(fd),
        Err(_) => return ExitCode::FAILURE,
    };
    debug_assert!(socket.as_raw_fd() > 0);
    while let Ok(Some((ask, _))) = transport::recv::<Ask>(&socket) {
        let result = super::traced_here(ask.pid);
        let sent = match &result {
            Ok(fd) => transport::send(&socket, &Answer { error: None }, &[fd.as_fd()]),
            Err(e) => transport::send(&socket, &Answer { error: Some(format!("{e:#}")) }, &[]),
        };
        if sent.is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
