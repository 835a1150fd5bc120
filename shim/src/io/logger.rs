//! The program behind a `binary://` URI: it is started with the read ends of the process's stdout and stderr on descriptors 3 and
//! 4 and a pipe on 5 by which it says that it is ready, and then reads for itself. Nothing is copied here.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use futures_util::future::BoxFuture;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::Interest,
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{Context, ends, fd, uri::Program};

/// How long a program may take to say that it is ready.
const READY: Duration = Duration::from_secs(30);
/// How long a program may take after SIGTERM, as containerd's shim grants it.
const TERM: Duration = Duration::from_secs(12);
/// How often a pipe is looked at while its reader empties it.
const POLL: Duration = Duration::from_millis(2);

/// A child that runs under the shim's reaper.
pub struct Spawned {
    /// Its process id.
    pub pid: u32,
    /// Resolves when it has been reaped.
    pub exited: BoxFuture<'static, ()>,
}

/// Starts a child; the reaper that waits for all children must learn its pid before it can have been reaped.
pub type Spawn = dyn Fn(Command) -> Result<Spawned> + Send + Sync;

/// A logging program that runs.
pub struct Logger {
    pid: Pid,
    exited: watch::Receiver<bool>,
    /// Our hold on the pipes, stdout and stderr: gone when the process has exited, then the program reads their end.
    pipes: Mutex<[Option<OwnedFd>; 2]>,
}

impl Logger {
    /// Starts `program` and waits until it is ready. Returns the write ends for stdout and stderr as well.
    pub async fn start(program: &Program, context: &Context<'_>) -> Result<(Logger, OwnedFd, OwnedFd)> {
        let what = || format!("starting the logging program {}", program.path.display());
        let (out_read, out) = fd::pipe(context.owner)?;
        let (err_read, err) = fd::pipe(context.owner)?;
        let (ready_read, ready) = fd::pipe(None)?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.args)
            .env_clear()
            .env("CONTAINER_ID", context.id)
            .env("CONTAINER_NAMESPACE", context.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let wanted = [out_read.as_raw_fd(), err_read.as_raw_fd(), ready.as_raw_fd()];
        // SAFETY: runs in the child between fork and exec and calls nothing but fcntl and dup2; the descriptors are open in the
        // parent until spawn has returned.
        unsafe { command.pre_exec(move || place(wanted)) };
        let child = (context.spawn)(command).with_context(what)?;
        drop((out_read, err_read, ready));
        let (tell, exited) = watch::channel(false);
        let gone = child.exited;
        tokio::spawn(async move {
            gone.await;
            tell.send_replace(true);
        });
        let pid = Pid::from_raw(i32::try_from(child.pid)?);
        let logger = Logger {
            pid,
            exited,
            pipes: Mutex::new([Some(fd::duplicate(&out)?), Some(fd::duplicate(&err)?)]),
        };
        if let Err(e) = said_ready(ready_read, program.must_say_ready).await.with_context(what) {
            logger.signal(Signal::SIGKILL);
            return Err(e);
        }
        Ok((logger, out, err))
    }

    fn signal(&self, signal: Signal) {
        if !*self.exited.borrow()
            && let Err(e) = kill(self.pid, signal)
        {
            log::debug!("{signal} to logging program {}: {e}", self.pid);
        }
    }

    /// After the exit: lets the program read the end of both streams.
    pub fn release(&self) {
        *self.pipes.lock().unwrap_or_else(|e| e.into_inner()) = [None, None];
    }

    /// Lets the program read the end of both streams and waits until it is done, at most `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.release();
        let _ = timeout(limit, self.exited.clone().wait_for(|gone| *gone)).await;
    }

    /// Ends the program if it has not ended by itself.
    pub async fn close(&self) {
        self.drain(Duration::ZERO).await;
        let mut exited = self.exited.clone();
        if *exited.borrow() {
            return;
        }
        self.signal(Signal::SIGTERM);
        if timeout(TERM, exited.wait_for(|gone| *gone)).await.is_err() {
            log::warn!("logging program {} did not end on SIGTERM", self.pid);
            self.signal(Signal::SIGKILL);
        }
    }

    /// Read ends of our own of both pipes.
    fn readers(&self) -> Result<Vec<OwnedFd>> {
        let pipes = self.pipes.lock().unwrap_or_else(|e| e.into_inner());
        pipes.iter().flatten().map(|pipe| fd::reopen(pipe, false)).collect()
    }

    /// With the writers frozen: waits until the program has read everything, at most until `deadline`; what it has not read by
    /// then is returned (stdout, stderr) and the program is stopped, so that it stays where it is.
    pub async fn settle(&self, deadline: Instant) -> Result<(Vec<u8>, Vec<u8>)> {
        let readers = self.readers()?;
        let [out, err] = &readers[..] else { return Ok(Default::default()) };
        loop {
            if fd::queued(out)? + fd::queued(err)? == 0 {
                return Ok(Default::default());
            }
            if Instant::now() >= deadline {
                break;
            }
            sleep(POLL).await;
        }
        self.stop().await?;
        Ok((fd::peek(out)?, fd::peek(err)?))
    }

    /// Stops the program and waits until it is stopped.
    pub async fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP);
        let deadline = Instant::now() + Duration::from_millis(200);
        while !*self.exited.borrow() && !is_stopped(self.pid) {
            if Instant::now() >= deadline {
                self.signal(Signal::SIGCONT);
                bail!("the logging program {} could not be stopped", self.pid);
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Lets a stopped program go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Throws away what the program has not read (it was carried away), then lets it go on.
    pub fn discard(&self) {
        match self.readers() {
            Ok(readers) => {
                let mut scratch = vec![0; 16 << 10];
                for pipe in &readers {
                    while matches!(fd::read(pipe, &mut scratch), Ok(n) if n > 0) {}
                }
            }
            Err(e) => log::warn!("output for the logging program {} stays in its pipe: {e:#}", self.pid),
        }
        self.release();
        self.resume();
    }

    /// Puts carried output into the pipes, before anything that the process will write.
    pub fn preload(&self, stdout: &[u8], stderr: &[u8]) -> Result<()> {
        let pipes = self.pipes.lock().unwrap_or_else(|e| e.into_inner());
        for (pipe, bytes) in pipes.iter().zip([stdout, stderr]) {
            let Some(pipe) = pipe.as_ref().filter(|_| !bytes.is_empty()) else { continue };
            let needed = fd::queued(&fd::reopen(pipe, false)?)? + bytes.len();
            if needed > fd::capacity(pipe)? {
                fd::set_capacity(pipe, needed)?;
            }
            let mut rest = bytes;
            let own = fd::reopen(pipe, true)?;
            while !rest.is_empty() {
                let n = fd::write(&own, rest).context("handing carried output to the logging program")?;
                rest = &rest[n..];
            }
        }
        Ok(())
    }
}

impl Drop for Logger {
    /// Without our hold on its pipes the program reads their end; a stopped one could not.
    fn drop(&mut self) {
        self.resume();
    }
}

/// Puts three descriptors at 3, 4 and 5. Runs between fork and exec.
fn place(wanted: [RawFd; 3]) -> io::Result<()> {
    let mut high = [0; 3];
    for (slot, fd) in high.iter_mut().zip(wanted) {
        // SAFETY: plain system call; a descriptor above 5 cannot be hit by the dup2 below.
        *slot = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 6) };
        if *slot < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for (at, fd) in (3..).zip(high) {
        // SAFETY: plain system call; dup2 leaves the new descriptor open across exec.
        if unsafe { libc::dup2(fd, at) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Waits for a byte (or, for `binary`, the end) on the ready pipe.
async fn said_ready(pipe: OwnedFd, must_say: bool) -> Result<()> {
    fd::set_nonblocking(&pipe)?;
    let pipe = ends::watch(pipe, Interest::READABLE)?;
    let deadline = Instant::now() + READY;
    let wait = async {
        loop {
            let mut guard = pipe.readable().await?;
            if let Ok(outcome) = guard.try_io(|pipe| fd::read(pipe.get_ref(), &mut [0])) {
                return outcome;
            }
        }
    };
    match timeout_at(deadline, wait).await {
        Err(_) => bail!("it did not say that it is ready within {READY:?}"),
        Ok(Err(e)) => Err(e).context("reading its ready pipe"),
        Ok(Ok(0)) if must_say => bail!("it closed its ready pipe without a word; it may have crashed"),
        Ok(Ok(_)) => Ok(()),
    }
}

fn is_stopped(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
}
