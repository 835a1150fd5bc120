//! Running a helper program (runc) to its end through the reaper: output captured or handed over, an optional deadline.

use std::{
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::{io::AsyncReadExt, net::unix::pipe, task::JoinHandle, time::timeout};

use crate::{io::ChildStdio, reaper::Reaper};

/// After the program has ended, how long to wait for the end of its output: a grandchild may keep the pipe open.
const OUTPUT_GRACE: Duration = Duration::from_secs(1);

/// Output kept of a program, in bytes; the rest is read and dropped.
const OUTPUT_LIMIT: usize = 1 << 20;

/// What a program left.
#[derive(Debug, Default)]
pub struct Finished {
    /// Exit status, or 128 + signal.
    pub status: u32,
    /// What it wrote to stdout, when captured.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr, when captured.
    pub stderr: Vec<u8>,
}

/// Runs `command` with its output captured and stdin from /dev/null (unless the caller has set one).
pub async fn capture(
    reaper: &Reaper,
    mut command: Command,
    stdin: Option<OwnedFd>,
    deadline: Option<Duration>,
) -> Result<Finished> {
    let reaper = reaper.clone();
    on_runtime(async move {
        let (out_read, out_write) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")?;
        let (err_read, err_write) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")?;
        let stdout = reader(out_read)?;
        let stderr = reader(err_read)?;
        command.stdin(stdin.map_or_else(Stdio::null, Stdio::from)).stdout(out_write).stderr(err_write);
        let status = wait(&reaper, command, deadline).await?;
        Ok(Finished { status, stdout: finish(stdout).await, stderr: finish(stderr).await })
    })
    .await
}

/// Runs `command` with the given ends as its stdio (they become the container's), /dev/null for those that are missing. Returns
/// its exit status.
pub async fn hand_over(
    reaper: &Reaper,
    mut command: Command,
    stdio: ChildStdio,
    deadline: Option<Duration>,
) -> Result<u32> {
    let reaper = reaper.clone();
    on_runtime(async move {
        command
            .stdin(stdio.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(stdio.stdout.map_or_else(Stdio::null, Stdio::from))
            .stderr(stdio.stderr.map_or_else(Stdio::null, Stdio::from));
        wait(&reaper, command, deadline).await
    })
    .await
}

/// The reaper collects only children of the runtime's thread. A future that a migration thread drives with `block_on` would fork
/// in that thread, so the work is moved over as a task of its own. It also goes on to its end if the caller goes away.
async fn on_runtime<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.context("a helper's task has ended early")?
}

async fn wait(reaper: &Reaper, mut command: Command, deadline: Option<Duration>) -> Result<u32> {
    // runc dies with the shim, as under the Go shim: a killed shim leaves no half-made container behind.
    // SAFETY: prctl is async-signal-safe and touches nothing of the parent's.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let (pid, watch) = reaper.spawn(&mut command)?;
    let program = command.get_program().to_string_lossy().into_owned();
    // The parent's copies of the pipe ends go with it; the readers would never see the end otherwise.
    drop(command);
    let Some(deadline) = deadline else { return Ok(watch.exit().await?.status) };
    let exit = watch.exit();
    tokio::pin!(exit);
    match timeout(deadline, &mut exit).await {
        Ok(exit) => Ok(exit?.status),
        Err(_) => {
            // The whole group: runc's criu must not go on without it. `Runc::restore` has made it a group of its own.
            // SAFETY: signals only; the child has not been collected yet, so the pid is still its own.
            unsafe {
                libc::kill(-pid, libc::SIGKILL);
                libc::kill(pid, libc::SIGKILL);
            }
            exit.await?;
            bail!("{program} did not finish within {deadline:?} and was killed")
        }
    }
}

fn reader(end: OwnedFd) -> Result<JoinHandle<Vec<u8>>> {
    let mut pipe = pipe::Receiver::from_owned_fd(end).context("watch a pipe")?;
    Ok(tokio::spawn(async move {
        let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = pipe.read(&mut buffer).await {
            let room = OUTPUT_LIMIT.saturating_sub(kept.len());
            kept.extend_from_slice(&buffer[..n.min(room)]);
        }
        kept
    }))
}

async fn finish(mut task: JoinHandle<Vec<u8>>) -> Vec<u8> {
    match timeout(OUTPUT_GRACE, &mut task).await {
        Ok(output) => output.unwrap_or_default(),
        Err(_) => {
            task.abort();
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn captures_output_and_status() {
        let reaper = Reaper::start().unwrap();
        let mut c = Command::new("sh");
        c.args(["-c", "echo out; echo err >&2; exit 5"]);
        let done = capture(&reaper, c, None, None).await.unwrap();
        assert_eq!((done.status, done.stdout, done.stderr), (5, b"out\n".to_vec(), b"err\n".to_vec()));
    }

    #[tokio::test]
    async fn a_hanging_program_is_killed() {
        let reaper = Reaper::start().unwrap();
        let mut c = Command::new("sleep");
        c.arg("60");
        let e = capture(&reaper, c, None, Some(Duration::from_millis(50))).await.unwrap_err();
        assert!(e.to_string().contains("did not finish"), "{e}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let reaper = Reaper::start().unwrap();
        let e = capture(&reaper, Command::new("/nonexistent/runc"), None, None).await.unwrap_err();
        assert!(e.to_string().contains("/nonexistent/runc"), "{e}");
    }
}
