//! The page daemon: gives restored tasks their memory while they run.
//!
//! CRIU registers a task's private anonymous memory with a userfaultfd and hands that over ([`handshake`]). From then on a thread that touches a
//! page which is not there waits, and we are told. Faults are answered at once from the [`Store`], pages that are still on
//! the source are asked for ([`Remote`]), everything that nobody has is zero. Once the tasks run, the rest is filled in behind
//! their backs, faults always first, and the store's memory is given back on the way.
//!
//! | module | what lives there |
//! |---|---|
//! | [`handshake`] | CRIU's side of the restore |
//! | [`uffd`] | one descriptor: messages read, pages placed |
//! | [`pieces`] | which addresses wait for which pages |
//! | [`consumer`] | one memory that is being filled |
//! | [`engine`] | the loop |
//! | [`buffer`] | memory that no core dump shows |
//! | [`ctl`] | orders, events, figures |
//! | [`keeper`] | the process that kills the tasks if ours dies: better dead than full of zeros |
//!
//! One thread does it all: a batch is short enough for a fault to wait for its end (see [`DaemonConfig::batch`]).
//! A descriptor is only ever closed when its memory is complete or gone; on every other way out it stays open, and its tasks
//! wait rather than read zeros.

mod consumer;
mod ctl;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handshake;
pub mod keeper;
mod pieces;
#[cfg(test)]
mod tests;
mod uffd;

use std::ops::Range;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::read::Chunk;
use super::store::Store;
use super::{RangeSet, Space};

pub use ctl::{DaemonCtl, DaemonEvent, DaemonStats};
pub use keeper::Keeper;

/// The name that CRIU looks for in its work directory.
pub const SOCKET: &str = "lazy-pages.socket";

/// Pages that are still on the source.
pub trait Remote: Send {
    /// Readable when there is something to [`Remote::take`].
    fn fd(&self) -> RawFd;
    /// Asks for a page that somebody waits for, before all others; what is around it is the source's to guess. Does not wait for it.
    fn ask(&mut self, space: Space, range: Range<u64>) -> Result<()>;
    /// Takes a piece of what has come (about a megabyte at most: faults wait meanwhile), without waiting. An error is the end
    /// of the source or of the link.
    fn take(&mut self, put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<Came>;
}

/// What there was to [`Remote::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Nothing; the descriptor tells when to come again.
    Nothing,
    /// Something, and more may be there: come again.
    Something,
    /// Nothing, and nothing will: everything has come.
    Everything,
}

/// How the daemon works.
pub struct DaemonConfig {
    /// `lazy-pages.socket` in CRIU's work directory.
    pub socket: PathBuf,
    /// Bytes placed around a fault, a power of two.
    pub window: u64,
    /// Bytes placed at once by the background fill. A fault waits for the end of a batch at most.
    pub batch: u64,
    /// The fill begins this long after CRIU's last word if nobody has said [`DaemonCtl::running`].
    pub fill_delay: Duration,
    /// Who kills the tasks if this process dies.
    pub keeper: Option<Keeper>,
}

impl DaemonConfig {
    /// The measured best.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            window: 64 << 10,
            batch: 256 << 10,
            fill_delay: Duration::from_millis(250),
            keeper: None,
        }
    }
}

/// What is lazy: both sets as [`crate::criu`]'s plan has them. A page in neither is zero.
#[derive(Clone, Debug, Default)]
pub struct LazySets {
    /// Pages that the restored tasks get from the store.
    pub lazy: Vec<(Space, RangeSet)>,
    /// Pages that are still on the source.
    pub remote: Vec<(Space, RangeSet)>,
}

/// A daemon that listens and does not run yet.
pub struct Daemon {
    cfg: DaemonConfig,
    listener: handshake::Listener,
}

impl Daemon {
    /// Listens. To be called before CRIU's restore begins; what CRIU says waits until [`Daemon::run`].
    pub fn listen(cfg: DaemonConfig) -> Result<Self> {
        let listener = handshake::Listener::new(&cfg.socket)?;
        Ok(Self { cfg, listener })
    }

    /// Serves one restore until every page is in place, or until the caller's [`DaemonCtl::abort`] (then
    /// [`DaemonStats::complete`] is false). Takes a thread. `events` is called from it and must not block.
    ///
    /// Fails at once when a lazy page is neither in the store nor remote, and when the restore ends before its tasks are there. After any
    /// other error, which [`DaemonEvent::Failed`] tells, it returns only when the tasks are dead and the caller has said `abort`.
    pub fn run(
        self,
        store: Store,
        sets: &LazySets,
        remote: Option<Box<dyn Remote>>,
        ctl: DaemonCtl,
        events: &mut dyn FnMut(DaemonEvent),
    ) -> Result<DaemonStats> {
        engine::Engine::new(self.cfg, self.listener, store, sets, remote, ctl)?.run(events)
    }
}
