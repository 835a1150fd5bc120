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
    io,
    sync::{
        Mutex as SyncMutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify, watch},
    time::sleep,
};

use super::{
    ends::{Read, Sink, Source, Watched},
    flow::{Flow, OnEnd, Step},
};

/// How often a descriptor is tried again whose readiness cannot be waited for (a pty without a process, a remembered hang-up).
const RETRY: Duration = Duration::from_millis(20);

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

/// One direction of one stream.
pub struct Pump {
    pub(super) name: &'static str,
    silent: bool,
    pub(super) state: Mutex<Flow>,
    /// Bytes that go before everything else; taken over by the next step.
    pub(super) first: SyncMutex<Vec<u8>>,
    /// No more input is coming: an empty source is an ended one.
    closing: AtomicBool,
    kick: Notify,
    done: watch::Sender<bool>,
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
            state: Mutex::new(Flow::new(source, sink, is_input, on_end)),
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
            state.close();
            state.on_end.take()
        };
        self.done.send_replace(true);
        if let Some(on_end) = on_end {
            on_end();
        }
    }

    /// Moves one chunk, or says what it waits for.
    pub(super) async fn step(&self, state: &mut Flow) -> Step {
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
}

/// Waits until a write may succeed.
pub(super) async fn writable(fd: &Watched) {
    match fd.writable().await {
        Ok(guard) if guard.ready().is_write_closed() => sleep(RETRY).await,
        Ok(_) => {}
        Err(_) => sleep(RETRY).await,
    }
}
