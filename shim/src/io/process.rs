//! [`ProcessIo`]: the streams of one process, from their opening before runc runs to their end after the process's exit.
//!
//! Differences to containerd's own shim, all on purpose: FIFOs are opened before runc runs and never wait for a reader; a stream
//! whose log fails is drained on (the process is not blocked by a full disk); a logging program reads the end of its input as
//! soon as the process has exited, not only at its deletion.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{io::Interest, sync::watch, time::timeout};

use super::{
    ChildStdio, Context, Kind, StdioConfig, StdioKinds,
    ends::{self, Sink, Source, Watched},
    fd,
    logger::Logger,
    pump::{Phase, Pump},
    uri::{self, Target},
};
use crate::console::{self, ConsoleSocket};

/// The streams of one process. Dropping it stops the copying.
pub struct ProcessIo {
    pub(super) kinds: StdioKinds,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) streams: Mutex<Streams>,
    pub(super) logger: Option<Logger>,
}

/// What is open now.
#[derive(Default)]
pub(super) struct Streams {
    pub stdin: Option<Arc<Pump>>,
    pub stdout: Option<Arc<Pump>>,
    pub stderr: Option<Arc<Pump>>,
    /// A writer of our own on the stdin FIFO: without it the process would read the end of its stdin as soon as a client
    /// detaches. Gone after [`ProcessIo::close_stdin`].
    pub keeper: Option<File>,
    /// [`ProcessIo::close_stdin`] was called.
    pub stdin_closed: bool,
    /// The pty's master.
    pub console: Option<Watched>,
    /// Terminal: opened, waiting for the pty.
    waiting: Option<(Option<Source>, Sink)>,
    /// FIFOs of streams that the process does not have: held, so that the client's copy ends with the process and not never.
    idle: Vec<Sink>,
    /// Terminal, while quiesced: what was taken out of its input queue.
    pub taken: Vec<u8>,
}

impl ProcessIo {
    /// Opens the streams of a process without a terminal; a stream without a URI is `/dev/null` for it. Copying starts (unless
    /// the context says `held`).
    pub async fn open(cfg: &StdioConfig, context: &Context<'_>) -> Result<(Arc<ProcessIo>, ChildStdio)> {
        let kind = |uri: &str| if uri.is_empty() { Kind::Null } else { Kind::Pipe };
        let kinds =
            StdioKinds { stdin: kind(&cfg.stdin), stdout: kind(&cfg.stdout), stderr: kind(&cfg.stderr) };
        Self::open_like(&kinds, cfg, context).await
    }

    /// Opens streams of given kinds, whatever has a URI: what a moved process has to find. A pipe without a URI leads nowhere; a
    /// URI of a stream that the process does not have is opened and stays empty. For a terminal use [`ProcessIo::open_console`].
    pub async fn open_like(
        kinds: &StdioKinds,
        cfg: &StdioConfig,
        context: &Context<'_>,
    ) -> Result<(Arc<ProcessIo>, ChildStdio)> {
        if kinds.terminal() {
            bail!("a terminal is opened through its console socket");
        }
        let mut streams = Streams::default();
        let mut child = ChildStdio::default();
        let mut logger = None;
        if let Target::Binary(program) = uri::parse(&cfg.stdout)? {
            let (started, out, err) = Logger::start(&program, context).await?;
            if context.held {
                started.stop().await?;
            }
            child.stdout = Some(out).filter(|_| kinds.stdout == Kind::Pipe);
            child.stderr = Some(err).filter(|_| kinds.stderr == Kind::Pipe);
            logger = Some(started);
        } else {
            for (name, kind, uri, pump, end) in [
                ("stdout", kinds.stdout, &cfg.stdout, &mut streams.stdout, &mut child.stdout),
                ("stderr", kinds.stderr, &cfg.stderr, &mut streams.stderr, &mut child.stderr),
            ] {
                let sink = open_sink(uri)?;
                if kind == Kind::Null {
                    streams.idle.push(sink);
                    continue;
                }
                let (read, write) = fd::pipe(context.owner)?;
                fd::set_nonblocking(&read)?;
                let source = Source::Pipe(ends::watch(read, Interest::READABLE)?);
                *pump = Some(Arc::new(Pump::new(name, source, sink, false, None)));
                *end = Some(write);
            }
        }
        if kinds.stdin != Kind::Null {
            let (read, write) = fd::pipe(context.owner)?;
            fd::set_nonblocking(&write)?;
            let sink = Sink::Pipe(ends::watch(write, Interest::WRITABLE)?);
            let (source, keeper) = open_stdin(&cfg.stdin)?;
            streams.stdin =
                Some(Arc::new(Pump::new("stdin", source.unwrap_or(Source::Silent), sink, true, None)));
            streams.keeper = keeper;
            child.stdin = Some(read);
        }
        let io = Self::assemble(*kinds, streams, logger, context.held);
        io.start();
        Ok((io, child))
    }

    /// Opens the streams of a process with a terminal. The returned socket's path is for `runc --console-socket`; the socket goes
    /// to [`ProcessIo::attach_console`]. `dir` is where its directory is made.
    pub async fn open_console(
        cfg: &StdioConfig,
        dir: &Path,
        context: &Context<'_>,
    ) -> Result<(Arc<ProcessIo>, ConsoleSocket)> {
        let socket = ConsoleSocket::new(dir)?;
        let mut streams = Streams::default();
        let mut logger = None;
        let sink = match uri::parse(&cfg.stdout)? {
            Target::Binary(program) => {
                let (started, out, err) = Logger::start(&program, context).await?;
                let own = fd::reopen(&out, true)?;
                drop((out, err));
                logger = Some(started);
                Sink::Pipe(ends::watch(own, Interest::WRITABLE)?)
            }
            _ => open_sink(&cfg.stdout)?,
        };
        let (source, keeper) = open_stdin(&cfg.stdin)?;
        streams.keeper = keeper;
        streams.waiting = Some((source, sink));
        Ok((Self::assemble(StdioKinds::TTY, streams, logger, context.held), socket))
    }

    fn assemble(kinds: StdioKinds, streams: Streams, logger: Option<Logger>, held: bool) -> Arc<ProcessIo> {
        let phase = watch::Sender::new(if held { Phase::Held } else { Phase::Run });
        Arc::new(ProcessIo { kinds, phase, streams: Mutex::new(streams), logger })
    }

    pub(super) fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn start(&self) {
        let streams = self.streams();
        for pump in [&streams.stdin, &streams.stdout, &streams.stderr].into_iter().flatten() {
            tokio::spawn(pump.clone().run(self.phase.subscribe()));
        }
    }

    /// Waits for the pty's master (runc sends it before it returns; a restore sends it when the pty exists, which may be long
    /// before the tasks run) and starts copying.
    pub async fn attach_console(self: &Arc<Self>, socket: ConsoleSocket) -> Result<()> {
        let master = socket.receive().await?;
        self.attach_master(master)
    }

    /// Starts copying to and from a pty's master.
    pub(super) fn attach_master(self: &Arc<Self>, master: OwnedFd) -> Result<()> {
        console::must_be_tty(&master)?;
        fd::set_nonblocking(&master)?;
        let master = ends::watch(master, Interest::READABLE | Interest::WRITABLE)?;
        let mut streams = self.streams();
        let (stdin, sink) =
            streams.waiting.take().context("these streams have no terminal, or have it already")?;
        streams.stdout =
            Some(Arc::new(Pump::new("console output", Source::Tty(master.clone()), sink, false, None)));
        // As containerd's shim does: when the client has closed stdin the terminal hangs up.
        let io: Weak<ProcessIo> = Arc::downgrade(self);
        let hang_up = Box::new(move || {
            if let Some(io) = io.upgrade() {
                io.hang_up();
            }
        });
        let source = stdin.unwrap_or(Source::Silent);
        let sink = Sink::Pipe(master.clone());
        streams.stdin = Some(Arc::new(Pump::new("console input", source, sink, true, Some(hang_up))));
        streams.console = Some(master);
        drop(streams);
        self.start();
        Ok(())
    }

    /// Lets go of the master once its output has been copied: the kernel sends SIGHUP to the terminal's session.
    fn hang_up(&self) {
        let mut streams = self.streams();
        streams.console = None;
        if let Some(output) = &streams.stdout {
            output.close_when_empty();
        }
    }

    /// What the streams are for the process.
    pub fn kinds(&self) -> StdioKinds {
        self.kinds
    }

    /// containerd's CloseIO: when the clients have closed the FIFO too and everything is copied, the process reads the end of its
    /// stdin (a terminal hangs up).
    pub async fn close_stdin(&self) {
        let mut streams = self.streams();
        streams.stdin_closed = true;
        streams.keeper = None;
        // A FIFO ends by itself now. This is for a stdin that nobody feeds.
        if let Some(stdin) = streams.stdin.as_ref().filter(|pump| pump.is_silent()) {
            stdin.close_when_empty();
        }
    }

    /// Sets the terminal's window size in characters.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        let console = self.streams().console.clone().context("the process has no terminal")?;
        console::resize(console.get_ref().as_fd(), width, height)
    }

    /// The process has exited: a terminal's output ends when what is queued has been copied, even if other processes still have
    /// the terminal. Call it at the exit, not at the deletion: clients wait for the end of the output before they delete.
    pub fn process_exited(&self) {
        let streams = self.streams();
        if self.kinds.terminal()
            && let Some(output) = &streams.stdout
        {
            output.close_when_empty();
        }
        if let Some(logger) = &self.logger {
            logger.release();
        }
    }

    /// After the process's exit: waits until all output has been copied. Other processes that still hold a pipe keep it open:
    /// at most `limit` (containerd's shim: 10 s). A terminal's output ends with the process that it was for.
    pub async fn drain(&self, limit: Duration) {
        self.process_exited();
        let (out, err) = {
            let streams = self.streams();
            (streams.stdout.clone(), streams.stderr.clone())
        };
        let all = async {
            for pump in [&out, &err].into_iter().flatten() {
                pump.ended().await;
            }
        };
        let started = tokio::time::Instant::now();
        if timeout(limit, all).await.is_err() {
            log::warn!(
                "output was not copied to its end within {limit:?}: something still holds or blocks it"
            );
        }
        if let Some(logger) = &self.logger {
            logger.drain(limit.saturating_sub(started.elapsed())).await;
        }
    }

    /// Closes everything. What has not been copied is lost; call [`ProcessIo::drain`] before.
    pub async fn close(&self) {
        self.phase.send_replace(Phase::Closed);
        let pumps = {
            let mut streams = self.streams();
            let pumps = [streams.stdin.take(), streams.stdout.take(), streams.stderr.take()];
            *streams = Streams::default();
            pumps
        };
        for pump in pumps.into_iter().flatten() {
            // Only a write to a file that does not return can make this wait.
            let _ = timeout(Duration::from_secs(1), pump.ended()).await;
        }
        if let Some(logger) = &self.logger {
            logger.close().await;
        }
    }
}

/// Opens stdout's or stderr's URI.
fn open_sink(text: &str) -> Result<Sink> {
    match uri::parse(text)? {
        Target::None => Ok(Sink::Nowhere),
        Target::Path(path) => Sink::open(&path),
        Target::File(path) => Sink::append(&path),
        Target::Binary(_) => bail!("a logging program for stderr must be given for stdout, it serves both"),
    }
}

/// Opens stdin's URI, and for a FIFO a writer of our own.
fn open_stdin(text: &str) -> Result<(Option<Source>, Option<File>)> {
    let path = match uri::parse(text)? {
        Target::None => return Ok((None, None)),
        Target::Path(path) | Target::File(path) => path,
        Target::Binary(_) => bail!("stdin cannot come from a program ({text:?})"),
    };
    let source = Source::open(&path)?;
    let keeper = match &source {
        Source::Pipe(_) => Some(
            fd::open(&path, false, true)
                .with_context(|| format!("opening stdin {} for writing", path.display()))?,
        ),
        _ => None,
    };
    Ok((Some(source), keeper))
}
