//! One direction of one stream: a task that moves bytes from a [`Source`] to a [`Sink`].
//!
//! ```text
//!            +--------- Phase::Run ----------+        Phase::Held: nothing moves
//!   source --| read (scratch) -> write; what |--> sink    (quiesce, or a destination before its commit)
//!            | the sink refuses -> pending   |        Phase::Closed: the ends are dropped
//!            +-------------------------------+
//! ```
//! Bytes are either still in the source, or in `pending`, or in the sink: never anywhere else between two steps, and a step runs
//! under the pump's lock. That is what makes a pause exact.

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    sync::{
        Mutex as SyncMutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::Interest,
    sync::{Mutex, Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};

use super::{
    ends::{Read, Sink, Source, Watched},
    fd,
};

/// Bytes that one step moves at most: what a pipe holds by default, so that one call empties it.
const CHUNK: usize = 64 << 10;
/// How often a descriptor is tried again whose readiness cannot be waited for (a pty without a process, a remembered hang-up).
const RETRY: Duration = Duration::from_millis(20);
/// Most bytes of a pty's output that a quiesce takes over.
const TTY_LIMIT: usize = fd::PEEK_LIMIT;

thread_local! {
    /// Shared by all pumps of the thread; the kernel gives it memory when the first byte moves.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What all pumps of a process do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Copy.
    Run,
    /// Leave everything where it is.
    Held,
    /// Drop both ends and whatever is pending.
    Closed,
}

/// Run when a stream has ended by itself.
pub type OnEnd = Box<dyn FnOnce() + Send>;

/// One direction of one stream.
pub struct Pump {
    name: &'static str,
    silent: bool,
    state: Mutex<State>,
    /// Bytes that go before everything else; taken over by the next step.
    first: SyncMutex<Vec<u8>>,
    /// No more input is coming: an empty source is an ended one.
    closing: AtomicBool,
    kick: Notify,
    done: watch::Sender<bool>,
}

struct State {
    source: Option<Source>,
    sink: Option<Sink>,
    pending: Vec<u8>,
    from: usize,
    writing: Option<JoinHandle<io::Result<()>>>,
    on_end: Option<OnEnd>,
    /// Read end of a stdin pipe whose write end we have closed: what the process has not read yet can still be looked at.
    unread: Option<OwnedFd>,
    is_input: bool,
    complained: bool,
}

/// What a step has done, or what the next one waits for.
enum Step {
    Moved,
    Readable(Watched),
    Writable(Watched),
    Later,
    Kicked,
    Ended,
}

impl Pump {
    /// A pump; `is_input` says that the sink is the process's own end (its stdin pipe or its pty). Copies once [`Pump::run`] is spawned.
    pub fn new(
        name: &'static str,
        source: Source,
        sink: Sink,
        is_input: bool,
        on_end: Option<OnEnd>,
    ) -> Pump {
        Pump {
            name,
            silent: matches!(source, Source::Silent),
            state: Mutex::new(State {
                source: Some(source),
                sink: Some(sink),
                pending: Vec::new(),
                from: 0,
                writing: None,
                on_end,
                unread: None,
                is_input,
                complained: false,
            }),
            first: SyncMutex::new(Vec::new()),
            closing: AtomicBool::new(false),
            kick: Notify::new(),
            done: watch::Sender::new(false),
        }
    }

    /// The task: copies until the source ends or the phase is `Closed` (or its sender is gone).
    pub async fn run(self: std::sync::Arc<Self>, mut phase: watch::Receiver<Phase>) {
        let mut hung_up = false;
        loop {
            let now = *phase.borrow_and_update();
            match now {
                Phase::Run => {}
                Phase::Closed => break,
                Phase::Held => {
                    if phase.changed().await.is_err() {
                        break;
                    }
                    continue;
                }
            }
            let step = {
                let mut state = self.state.lock().await;
                // A quiesce may have had the lock in the meantime.
                if *phase.borrow() != Phase::Run {
                    continue;
                }
                let step = self.step(&mut state).await;
                if hung_up && matches!(step, Step::Readable(_)) {
                    hung_up = false;
                    sleep(RETRY).await;
                    if let Some(Err(e)) = state.source.as_mut().map(Source::rearm) {
                        log::warn!("{}: {e:#}", self.name);
                    }
                    continue;
                }
                step
            };
            if matches!(step, Step::Ended) {
                break;
            }
            let wait = async {
                match step {
                    Step::Moved | Step::Ended => tokio::task::yield_now().await,
                    Step::Readable(fd) => match fd.readable().await {
                        Ok(guard) => hung_up = guard.ready().is_read_closed(),
                        Err(_) => sleep(RETRY).await,
                    },
                    Step::Writable(fd) => writable(&fd).await,
                    Step::Later => sleep(RETRY).await,
                    Step::Kicked => std::future::pending().await,
                }
            };
            tokio::select! {
                () = wait => {}
                () = self.kick.notified() => {}
                changed = phase.changed() => if changed.is_err() { break },
            }
        }
        self.finish().await;
    }

    async fn finish(&self) {
        let on_end = {
            let mut state = self.state.lock().await;
            if let (true, Some(Sink::Pipe(pipe))) = (state.is_input && state.source.is_none(), &state.sink) {
                state.unread = fd::reopen(pipe.get_ref(), false).ok();
            }
            state.source = None;
            state.sink = None;
            state.pending = Vec::new();
            state.from = 0;
            state.on_end.take()
        };
        self.done.send_replace(true);
        if let Some(on_end) = on_end {
            on_end();
        }
    }

    /// Moves one chunk, or says what it waits for.
    async fn step(&self, state: &mut State) -> Step {
        let first = std::mem::take(&mut *self.first.lock().unwrap_or_else(|e| e.into_inner()));
        if !first.is_empty() {
            state.put_first(first);
        }
        if let Some(step) = state.flush(self.name).await {
            return step;
        }
        let closing = self.closing.load(Ordering::Acquire);
        match state.advance() {
            Ok(Read::Bytes(_)) => Step::Moved,
            Ok(Read::End) => {
                state.source = None;
                Step::Ended
            }
            Ok(Read::Empty | Read::Vacant) if closing => {
                state.source = None;
                Step::Ended
            }
            Ok(Read::Vacant) => Step::Later,
            Ok(Read::Empty) => match &state.source {
                Some(Source::Pipe(w) | Source::Tty(w)) => Step::Readable(w.clone()),
                Some(Source::File(_)) => Step::Later,
                Some(Source::Silent) | None => Step::Kicked,
            },
            Err(e) => {
                if e.kind() != io::ErrorKind::BrokenPipe {
                    log::warn!("{}: copying stopped: {e}", self.name);
                }
                state.source = None;
                state.sink = None;
                Step::Ended
            }
        }
    }

    /// Says that nothing more is coming: the stream ends as soon as its source is empty, even if other processes hold it.
    /// Pipes do not need it (they end by themselves) unless nobody feeds them.
    pub fn close_when_empty(&self) {
        self.closing.store(true, Ordering::Release);
        self.kick.notify_one();
    }

    /// Whether nobody feeds this stream.
    pub fn is_silent(&self) -> bool {
        self.silent
    }

    /// Puts bytes before everything that is still to be moved.
    pub fn prepend(&self, bytes: Vec<u8>) {
        let mut first = self.first.lock().unwrap_or_else(|e| e.into_inner());
        let mut all = bytes;
        all.append(&mut first);
        *first = all;
        drop(first);
        self.kick.notify_one();
    }

    /// Waits until the stream has ended and its sink is closed.
    pub async fn ended(&self) {
        let mut done = self.done.subscribe();
        // The sender lives in self: an error cannot happen.
        let _ = done.wait_for(|done| *done).await;
    }

    /// Whether the stream has ended.
    pub fn has_ended(&self) -> bool {
        *self.done.borrow()
    }

    /// For a held output whose writers are frozen: moves what the sink takes until `deadline`, then returns what it did not take.
    /// Everything returned is still here too: in the pipe, or (a pty cannot be looked into) in `pending`.
    pub async fn settle(&self, deadline: Instant) -> Result<Vec<u8>> {
        let Ok(mut state) = timeout_at(deadline, self.state.lock()).await else {
            bail!("{}: a write to the log does not return", self.name);
        };
        while state.sink.is_some() {
            match timeout_at(deadline, self.step(&mut state)).await {
                Err(_) => bail!("{}: a write to the log does not return", self.name),
                Ok(Step::Moved) if Instant::now() < deadline => {}
                Ok(Step::Writable(fd)) => {
                    if timeout_at(deadline, writable(&fd)).await.is_err() {
                        break;
                    }
                }
                Ok(_) => break,
            }
        }
        if state.writing.is_some() {
            bail!("{}: a write to the log does not return", self.name);
        }
        state.hoard_tty().with_context(|| format!("{}: reading the terminal", self.name))?;
        let mut left = state.pending[state.from..].to_vec();
        if let Some(source) = &state.source {
            left.extend(source.peek().with_context(|| format!("{}: looking into the pipe", self.name))?);
        }
        Ok(left)
    }

    /// For a held input: what the process has not read yet, in order, all of it left where it is. The flag says that the process
    /// will read the end of its stdin after that.
    pub async fn unread(&self, deadline: Instant) -> Result<(Vec<u8>, bool)> {
        let Ok(state) = timeout_at(deadline, self.state.lock()).await else {
            bail!("{}: busy", self.name);
        };
        let mut bytes = match (&state.unread, &state.sink) {
            (Some(read), _) => fd::peek(read)?,
            // A pty's input queue is the console's business.
            (None, Some(Sink::Pipe(pipe))) if !is_tty(pipe) => fd::peek(&fd::reopen(pipe.get_ref(), false)?)?,
            _ => Vec::new(),
        };
        bytes.extend_from_slice(&state.pending[state.from..]);
        bytes.extend_from_slice(&self.first.lock().unwrap_or_else(|e| e.into_inner()));
        if let Some(source) = &state.source {
            bytes.extend(source.peek()?);
        }
        Ok((bytes, state.source.is_none()))
    }

    /// For a held input: moves what fits into the process's pipe now.
    pub async fn push(&self) {
        let mut state = self.state.lock().await;
        let first = std::mem::take(&mut *self.first.lock().unwrap_or_else(|e| e.into_inner()));
        state.put_first(first);
        let _ = state.flush(self.name).await;
    }

    /// Capacity of the process's pipe, if that is what is at its end.
    pub async fn capacity(&self) -> Option<usize> {
        let state = self.state.lock().await;
        match (state.is_input, &state.source, &state.sink) {
            (false, Some(Source::Pipe(w)), _) | (true, _, Some(Sink::Pipe(w))) => {
                fd::capacity(w.get_ref()).ok()
            }
            _ => None,
        }
    }

    /// Gives the process's pipe a capacity.
    pub async fn set_capacity(&self, bytes: usize) -> Result<()> {
        let state = self.state.lock().await;
        match (state.is_input, &state.source, &state.sink) {
            (false, Some(Source::Pipe(w)), _) | (true, _, Some(Sink::Pipe(w))) => {
                fd::set_capacity(w.get_ref(), bytes)
            }
            _ => Ok(()),
        }
    }
}

impl State {
    fn put_first(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(&self.pending[self.from..]);
        self.pending = bytes;
        self.from = 0;
    }

    /// Writes what is pending. `None` when nothing is left.
    async fn flush(&mut self, name: &str) -> Option<Step> {
        if let Some(writing) = &mut self.writing {
            let outcome = writing.await;
            self.writing = None;
            self.judge(name, outcome.unwrap_or_else(|e| Err(io::Error::other(e))));
        }
        while self.from < self.pending.len() {
            match &self.sink {
                Some(Sink::Pipe(w)) => match write_now(w, &self.pending[self.from..]) {
                    Ok(n) => self.from += n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        return Some(Step::Writable(w.clone()));
                    }
                    Err(e) if self.is_input => {
                        log::debug!("{name}: the process does not read any more: {e}");
                        self.source = None;
                        self.sink = None;
                        return Some(Step::Ended);
                    }
                    Err(e) => {
                        self.from = self.pending.len();
                        self.judge(name, Err(e));
                    }
                },
                Some(Sink::File(file)) => {
                    let (file, mut bytes) = (file.clone(), std::mem::take(&mut self.pending));
                    let from = std::mem::take(&mut self.from);
                    bytes.drain(..from);
                    let task = tokio::task::spawn_blocking(move || io::Write::write_all(&mut &*file, &bytes));
                    let outcome = self.writing.insert(task).await;
                    self.writing = None;
                    self.judge(name, outcome.unwrap_or_else(|e| Err(io::Error::other(e))));
                }
                Some(Sink::Nowhere) | None => self.from = self.pending.len(),
            }
        }
        if !self.pending.is_empty() {
            self.pending = Vec::new();
            self.from = 0;
        }
        None
    }

    /// Says once that a log does not take what is written. The container goes on: blocking it would be worse than a gap in a log
    /// on a full disk.
    fn judge(&mut self, name: &str, outcome: io::Result<()>) {
        if let Err(e) = outcome
            && !std::mem::replace(&mut self.complained, true)
        {
            log::warn!("{name}: output is lost, the log cannot be written: {e}");
        }
    }

    /// Reads a chunk and writes it; what the sink does not take becomes `pending`.
    fn advance(&mut self) -> io::Result<Read> {
        let Some(source) = &self.source else { return Ok(Read::End) };
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.is_empty() {
                scratch.resize(CHUNK, 0);
            }
            let outcome = source.read(scratch)?;
            let Read::Bytes(n) = outcome else { return Ok(outcome) };
            let mut written = 0;
            match &self.sink {
                Some(Sink::Pipe(w)) => {
                    while written < n {
                        match write_now(w, &scratch[written..n]) {
                            Ok(more) => written += more,
                            Err(e) if e.kind() == io::ErrorKind::WouldBlock || !self.is_input => break,
                            Err(e) => return Err(e),
                        }
                    }
                }
                Some(Sink::File(_)) => {}
                Some(Sink::Nowhere) | None => written = n,
            }
            self.pending.extend_from_slice(&scratch[written..n]);
            Ok(outcome)
        })
    }

    /// Reads all that a pty still has into `pending`.
    fn hoard_tty(&mut self) -> Result<()> {
        let Some(source @ Source::Tty(_)) = &self.source else { return Ok(()) };
        let mut buffer = vec![0; 4096];
        while let Read::Bytes(n) = source.read(&mut buffer)? {
            self.pending.extend_from_slice(&buffer[..n]);
            if self.pending.len() - self.from > TTY_LIMIT {
                bail!("more than {TTY_LIMIT} bytes of output wait");
            }
        }
        Ok(())
    }
}

fn is_tty(fd: &Watched) -> bool {
    nix::unistd::isatty(fd.get_ref()).unwrap_or(false)
}

/// Writes once; a full pipe says `WouldBlock`, and then the event loop has been told to report when there is room. (`try_io` alone
/// would not even try before the loop has seen the descriptor once.)
fn write_now(fd: &Watched, bytes: &[u8]) -> io::Result<usize> {
    // A pty that is stopped by flow control takes nothing and says so with a zero.
    let once = |fd: &OwnedFd| match fd::write(fd, bytes) {
        Ok(0) if !bytes.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
        other => other,
    };
    match once(fd.get_ref()) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => fd.try_io(Interest::WRITABLE, once),
        other => other,
    }
}

/// Waits until a write may succeed.
async fn writable(fd: &Watched) {
    match fd.writable().await {
        Ok(guard) if guard.ready().is_write_closed() => sleep(RETRY).await,
        Ok(_) => {}
        Err(_) => sleep(RETRY).await,
    }
}
