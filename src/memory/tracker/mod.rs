//! Which pages were written since the last look. Copying them is [`super::read`]'s business, sending them [`crate::migrate`]'s.
//!
//! | file | what |
//! |---|---|
//! | [`class`] | what a mapping means: private, shared, nobody's |
//! | [`existing`] | which pages there are, written or not |
//! | [`scan`] | PAGEMAP_SCAN and the words of pagemap |
//! | [`uffd`] | the ioctls of a userfaultfd |
//! | [`protect`] | tracker `uffd-wp` |
//! | [`late`] | protecting right before reading |
//! | [`shared`] | bookkeeping of shared memory: whose mappings, which have vanished |
//! | [`soft_dirty`] | tracker `soft-dirty` |
//! | [`hash`] | tracker `hash` |
//! | [`sent`] | what was sent, as hashes |
//! | [`still`] | a task held still for a moment |
//! | [`probe`] | which of them work here |
//! | [`cost`] | what a write to a protected page costs here |
//!
//! The rule for all: **protect first, then read.** A look names pages; their content is read after it, by way of [`in_portions`]. A write
//! that comes between protecting and reading is found by the next look. What was not watched all the time since the last look (a new
//! mapping, a new task, another program after an exec) counts as written whole. A page that was named and has gone since needs no
//! mention: CRIU does not list it.
//!
//! Writes that no page table sees are not found by any tracker but `hash`: a device's DMA into pages pinned before the look
//! (an O_DIRECT read in flight, RDMA). Shared memory has one hole more: a task, or a second mapping, that comes *and* goes between two
//! looks.

mod class;
mod cost;
pub mod existing;
mod hash;
mod late;
mod probe;
mod protect;
mod scan;
mod sent;
mod shared;
mod soft_dirty;
mod still;
mod task;
#[cfg(test)]
mod tests;
mod uffd;

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{RangeSet, Space};

pub use cost::write_fault;
pub use late::in_portions;
pub use probe::{soft_dirty as try_soft_dirty, uffd_wp as try_uffd_wp};
pub use task::{Task, tasks};

/// How written pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// userfaultfd write protection that the kernel resolves itself (WP_ASYNC) with PAGEMAP_SCAN: Linux 6.7.
    UffdWp,
    /// Bit 55 of /proc/PID/pagemap after a `4` in clear_refs; absent on arm64 and many distribution kernels.
    SoftDirty,
    /// Pages are read and compared with what was sent: any kernel, at the price of reading all memory each round.
    Hash,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrackerKind::UffdWp => "uffd-wp",
            TrackerKind::SoftDirty => "soft-dirty",
            TrackerKind::Hash => "hash",
        })
    }
}

/// What must be sent (again) of one space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whose memory.
    pub space: Space,
    /// Where to read it.
    pub source: Source,
    /// Which pages: addresses of a task, or offsets of shared memory.
    pub written: RangeSet,
}

/// Where to read a space's pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A task's addresses.
    Task(i32),
    /// Shared memory: /proc/PID/map_files/START-END (hexadecimal), at file offsets.
    SharedMap {
        /// A task that maps it.
        pid: i32,
        /// First address of the mapping.
        start: u64,
        /// End of the mapping.
        end: u64,
        /// File offset of `start`.
        pgoff: u64,
    },
}

/// Finds written pages.
pub trait Tracker: Send {
    /// Which one it is.
    fn kind(&self) -> TrackerKind;

    /// The first call starts tracking, and everything populated is "written". Later: what was written since. `last`: the tasks are
    /// frozen and nothing is protected again. New tasks, execs, forks and mappings are found by itself.
    fn look(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>>;

    /// From here on the first look at memory may leave it unprotected: everything is read by way of [`in_portions`].
    fn protect_late(&mut self) {}

    /// Did the last look leave memory of this source unprotected?
    fn is_late(&self, _source: &Source) -> bool {
        false
    }

    /// Protects what the last look left unprotected in `window`, and says which pages of it must be read after that: those that the look
    /// named there and those written since.
    fn protect(&mut self, _source: &Source, _window: Range<u64>) -> Result<RangeSet> {
        Ok(RangeSet::new())
    }

    /// Lifts what tracking costs the tasks and leaves nothing in them. Drop does the same. The next look would start anew.
    fn stop(&mut self) -> Result<()>;

    /// Does this tracker compare with what was sent, so that [`Self::sent`] must be called?
    fn wants_sent(&self) -> bool {
        false
    }

    /// Pages of a space as they were read and sent, whole pages from `vaddr` on. Without this call `hash` names every page at each
    /// look: a hash of its own reading would not be that of the content that was sent.
    fn sent(&mut self, _space: Space, _vaddr: u64, _bytes: &[u8]) {}

    /// As [`Self::sent`] for pages of zeros.
    fn sent_zero(&mut self, _space: Space, _vaddr: u64, _len: u64) {}
}

/// The best tracker that works here, by really trying on a child of ours; tried once.
pub fn detect() -> TrackerKind {
    static KIND: OnceLock<TrackerKind> = OnceLock::new();
    *KIND.get_or_init(|| choose(try_uffd_wp().is_ok(), || try_soft_dirty().is_ok()))
}

/// The order of preference.
pub fn choose(uffd_wp: bool, soft_dirty: impl FnOnce() -> bool) -> TrackerKind {
    if uffd_wp {
        TrackerKind::UffdWp
    } else if soft_dirty() {
        TrackerKind::SoftDirty
    } else {
        TrackerKind::Hash
    }
}

/// A tracker that has not looked yet.
pub fn open(kind: TrackerKind) -> Result<Box<dyn Tracker>> {
    Ok(match kind {
        TrackerKind::UffdWp => Box::new(protect::UffdWp::new()),
        TrackerKind::SoftDirty => Box::new(soft_dirty::SoftDirty::new()),
        TrackerKind::Hash => Box::new(hash::Hash::new()),
    })
}
