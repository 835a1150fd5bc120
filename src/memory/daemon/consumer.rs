//! One memory that is being filled: a restored task's, or that of a child which it forked meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::pieces::Pieces;
use super::uffd::{Placed, Uffd};
use crate::memory::Space;
use crate::memory::store::Store;

/// How long an address space in which mappings change is left alone before the next attempt. It usually takes its task a few
/// microseconds of its own time; that is what we wait for.
const AGAIN: Duration = Duration::from_micros(200);
/// The same when the task's memory limit is in the way.
const NO_MEMORY: Duration = Duration::from_millis(10);

/// What placing needs besides the consumer.
pub struct Tools<'a> {
    /// Where the pages are.
    pub store: &'a Store,
    /// At least as large as whatever is placed at once.
    pub buf: &'a mut [u8],
    /// Size of a page.
    pub page: u64,
    /// Size of the window around a fault, a power of two.
    pub window: u64,
}

/// Why placing came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Everything was placed, or was there.
    All,
    /// To be tried again, at [`Consumer::again`] or when an event has come.
    Again,
    /// The page at this address has no place.
    NotMapped(u64),
    /// The task has gone.
    Exited,
}

/// What became of a fault.
pub enum Served {
    /// Bytes placed from the store, and the addresses in the space that they are among.
    Local(u64, Range<u64>),
    /// Zeros.
    Zero,
    /// To be asked for, the page's addresses in the space.
    Remote(Range<u64>),
    /// To be tried again.
    Later,
    /// The task has gone, or the address is no longer mapped.
    Nobody,
}

/// One memory.
pub struct Consumer {
    /// None once it has been closed.
    uffd: Option<Uffd>,
    /// Whose pages it gets.
    pub space: Space,
    /// Forked after the restore?
    pub child: bool,
    /// What waits for pages in the store.
    pub local: Pieces,
    /// What waits for pages on the source.
    pub remote: Pieces,
    /// Faults to be tried again.
    pub retry: Vec<u64>,
    /// Faults that wait for the source, and since when.
    pub waiting: BTreeMap<u64, Instant>,
    /// Where the background fill goes on.
    pub cursor: u64,
    /// No attempt before this.
    pub again: Option<Instant>,
    /// The task has ended or executed another program.
    pub gone: bool,
    /// The keeper's number for the descriptor.
    pub kept: Option<u32>,
}

impl Drop for Consumer {
    /// A descriptor that is closed gives zeros to the task: that may only happen in [`Consumer::close`].
    fn drop(&mut self) {
        match self.uffd.take() {
            Some(uffd) if !self.gone => uffd.leak(),
            _ => {}
        }
    }
}

impl Consumer {
    /// A restored task.
    pub fn new(uffd: Uffd, space: Space, local: Pieces, remote: Pieces) -> Self {
        Self {
            uffd: Some(uffd),
            space,
            child: false,
            local,
            remote,
            retry: Vec::new(),
            waiting: BTreeMap::new(),
            cursor: 0,
            again: None,
            gone: false,
            kept: None,
        }
    }

    /// A child of this one, forked now: what waits here waits there. (Pages that were placed before were inherited, and none has been placed since:
    /// the kernel refuses while the event is on its way.)
    pub fn fork(&self, uffd: Uffd) -> Self {
        let mut child = Self::new(uffd, self.space, self.local.clone(), self.remote.clone());
        child.child = true;
        child
    }

    /// Ends the registration: from now on missing pages are zero. For memories that have all pages, or whose tasks are dead.
    pub fn close(mut self) {
        drop(self.uffd.take());
    }

    /// The descriptor.
    pub fn uffd(&self) -> &Uffd {
        self.uffd.as_ref().expect("only close, which consumes, takes it")
    }

    /// For poll.
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.uffd().as_fd()
    }

    /// Nothing waits, and nobody.
    pub fn complete(&self) -> bool {
        self.local.is_empty() && self.remote.is_empty() && self.retry.is_empty() && self.waiting.is_empty()
    }

    /// Is it left alone for now?
    pub fn resting(&self, now: Instant) -> bool {
        self.again.is_some_and(|at| at > now)
    }

    /// The content of a range is gone, or the range itself.
    pub fn forget(&mut self, range: Range<u64>) {
        self.local.remove(range.clone());
        self.remote.remove(range.clone());
        self.look_again(range);
    }

    /// mremap.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        self.local.remap(from, to, len);
        self.remote.remap(from, to, len);
        self.look_again(from..from.saturating_add(len));
        self.look_again(to..to.saturating_add(len));
    }

    /// Whoever waits for the source in this range has to be told something else, or something more.
    pub fn look_again(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let waiters: Vec<u64> = self.waiting.range(range).map(|(at, _)| *at).collect();
        for at in waiters {
            self.waiting.remove(&at);
            self.retry.push(at);
        }
    }

    /// Places bytes at `at`. What is placed, and what was there before, waits no more.
    pub fn place(&mut self, at: u64, bytes: &[u8], page: u64) -> Result<(u64, Stop)> {
        let len = bytes.len() as u64;
        let (mut done, mut placed, mut step) = (0, 0, len);
        while done < len {
            let n = step.min(len - done);
            let here = at + done;
            match self.uffd().copy(here, &bytes[done as usize..(done + n) as usize])? {
                Placed::Done(n) => {
                    self.local.remove(here..here + n);
                    done += n;
                    placed += n;
                    step = step.max(n).saturating_mul(2);
                }
                Placed::Present => {
                    self.local.remove(here..here + page);
                    self.uffd().wake(here..here + page)?;
                    done += page;
                }
                // The range may reach over the end of a mapping: the part before it has a place.
                Placed::NotMapped if n > page => step = (n / 2 / page * page).max(page),
                Placed::NotMapped => return Ok((placed, Stop::NotMapped(here))),
                Placed::Again => return Ok((placed, self.rest(AGAIN))),
                Placed::NoMemory => return Ok((placed, self.rest(NO_MEMORY))),
                Placed::Exited => return Ok((placed, self.exited())),
            }
        }
        Ok((placed, Stop::All))
    }

    fn rest(&mut self, how_long: Duration) -> Stop {
        self.again = Some(Instant::now() + how_long);
        Stop::Again
    }

    fn exited(&mut self) -> Stop {
        self.gone = true;
        Stop::Exited
    }

    /// Answers a fault as far as that can be done here.
    pub fn fault(&mut self, address: u64, tools: &mut Tools<'_>) -> Result<Served> {
        let page = tools.page;
        let at = address & !(page - 1);
        let window = (at & !(tools.window - 1))..(at | (tools.window - 1)).saturating_add(1);
        if let Some(p) = self.remote.at(at) {
            let image = p.image + (at - p.start);
            return Ok(Served::Remote(image..image + page));
        }
        let Some(p) = self.local.at(at) else { return self.zero(at, window.end, page) };
        let (start, end) = (window.start.max(p.start), window.end.min(p.end));
        let images = p.image + (start - p.start)..p.image + (end - p.start);
        let bytes = &mut tools.buf[..(end - start) as usize];
        tools.store.read_at(self.space, p.image + (start - p.start), bytes)?;
        let (before, rest) = bytes.split_at((at - start) as usize);
        let (wanted, after) = rest.split_at(page as usize);
        // The page itself first: its thread runs while the others follow.
        let (mut placed, stop) = self.place(at, wanted, page)?;
        match stop {
            Stop::All => {}
            Stop::Again => {
                self.retry.push(at);
                return Ok(Served::Later);
            }
            Stop::NotMapped(_) => {
                self.uffd().wake(at..at + page)?;
                return Ok(Served::Nobody);
            }
            Stop::Exited => return Ok(Served::Nobody),
        }
        for (at, bytes) in [(at + page, after), (start, before)] {
            let (n, stop) = self.place(at, bytes, page)?;
            placed += n;
            if stop != Stop::All {
                // Neighbours are a courtesy; what is in their way is met again when their own turn comes.
                break;
            }
        }
        self.cursor = end;
        Ok(Served::Local(placed, images))
    }

    /// Nobody has this page: zeros, for its neighbours up to the window's end as well.
    fn zero(&mut self, at: u64, window_end: u64, page: u64) -> Result<Served> {
        let next = |pieces: &Pieces| pieces.next(at).map_or(u64::MAX, |p| p.start);
        let mut end = window_end.min(next(&self.local)).min(next(&self.remote));
        loop {
            match self.uffd().zero(at..end)? {
                Placed::NotMapped if end > at + page => end = at + page,
                Placed::Done(_) => return Ok(Served::Zero),
                Placed::Present | Placed::NotMapped => {
                    self.uffd().wake(at..at + page)?;
                    return Ok(Served::Nobody);
                }
                not_now @ (Placed::Again | Placed::NoMemory) => {
                    self.rest(if not_now == Placed::Again { AGAIN } else { NO_MEMORY });
                    self.retry.push(at);
                    return Ok(Served::Later);
                }
                Placed::Exited => {
                    self.exited();
                    return Ok(Served::Nobody);
                }
            }
        }
    }
}
