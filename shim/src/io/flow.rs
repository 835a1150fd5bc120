//! What a pump has between two steps: both ends and the bytes that the sink did not take; and the moving of bytes itself.
//! When to move, and when not to, is in [`super::pump`].

use std::{cell::RefCell, io, os::fd::OwnedFd};

use anyhow::{Result, bail};
use tokio::{io::Interest, task::JoinHandle};

use super::{
    ends::{Read, Sink, Source, Watched},
    fd,
};

/// Bytes that one step moves at most: what a pipe holds by default, so that one call empties it.
const CHUNK: usize = 64 << 10;
/// Most bytes of a pty's output that a quiesce takes over.
const TTY_LIMIT: usize = fd::PEEK_LIMIT;

thread_local! {
    /// Shared by all flows of the thread; the kernel gives it memory when the first byte moves.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Run when a stream has ended by itself.
pub type OnEnd = Box<dyn FnOnce() + Send>;

/// The state of one direction of one stream.
pub struct Flow {
    pub(super) source: Option<Source>,
    pub(super) sink: Option<Sink>,
    pub(super) pending: Vec<u8>,
    pub(super) from: usize,
    pub(super) writing: Option<JoinHandle<io::Result<()>>>,
    pub(super) on_end: Option<OnEnd>,
    /// Read end of a stdin pipe whose write end we have closed: what the process has not read yet can still be looked at.
    pub(super) unread: Option<OwnedFd>,
    pub(super) is_input: bool,
    pub(super) complained: bool,
}

/// What a step has done, or what the next one waits for.
pub enum Step {
    /// Bytes have moved (or were taken over).
    Moved,
    /// The source has nothing now.
    Readable(Watched),
    /// The sink is full.
    Writable(Watched),
    /// Nothing that can be waited for.
    Later,
    /// Only a kick or a change of phase.
    Kicked,
    /// The stream has ended.
    Ended,
}

impl Flow {
    /// A flow from `source` to `sink`.
    pub fn new(source: Source, sink: Sink, is_input: bool, on_end: Option<OnEnd>) -> Flow {
        Flow {
            source: Some(source),
            sink: Some(sink),
            pending: Vec::new(),
            from: 0,
            writing: None,
            on_end,
            unread: None,
            is_input,
            complained: false,
        }
    }

    /// Drops both ends and what is pending. Of a stdin that has ended a read end is kept: what the process has not read yet can
    /// then still be looked at.
    pub fn close(&mut self) {
        if let (true, Some(Sink::Pipe(pipe))) = (self.is_input && self.source.is_none(), &self.sink) {
            self.unread = fd::reopen(pipe.get_ref(), false).ok();
        }
        self.source = None;
        self.sink = None;
        self.pending = Vec::new();
        self.from = 0;
    }

    /// Puts bytes before what is pending.
    pub fn put_first(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(&self.pending[self.from..]);
        self.pending = bytes;
        self.from = 0;
    }

    /// Writes what is pending. `None` when nothing is left.
    pub async fn flush(&mut self, name: &str) -> Option<Step> {
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
    pub fn advance(&mut self) -> io::Result<Read> {
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
    pub fn hoard_tty(&mut self) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carried_bytes_go_before_pending_ones() {
        let mut flow = Flow::new(Source::Silent, Sink::Nowhere, false, None);
        (flow.pending, flow.from) = (b"old new".to_vec(), 4);
        flow.put_first(b"first ".to_vec());
        assert_eq!((&flow.pending[..], flow.from), (&b"first new"[..], 0));
    }
}
