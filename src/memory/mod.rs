//! Memory on the move: which pages were written, how they travel while the container runs, where they wait on the destination,
//! and how the restored tasks get them.
//!
//! | room | what lives there |
//! |---|---|
//! | [`range`] | sets of pages |
//! | [`maps`] | a task's mappings, from /proc |
//! | [`smaps`] | their flags, without looking at their pages |
//! | [`inject`] | one system call inside a running task (ptrace) |
//! | [`tracker`] | which pages were written since the last look: userfaultfd write protection, soft-dirty, hashes |
//! | [`read`] | pages of a running or frozen task, zero pages found |
//! | [`buffer`] | memory of ours for a container's pages |
//! | [`batch`] | pages on the wire: many runs in one frame |
//! | [`sets`] | ranges of a space on the wire: what is wanted, what is still on the source |
//! | [`compress`] | none, lz4, zstd, and the choice between them |
//! | [`rate`] | the bandwidth limit |
//! | [`converge`] | when to stop copying and freeze: a pure decision |
//! | [`store`] | the destination's pages, on tmpfs |
//! | [`daemon`] | the page daemon: userfaults of restored tasks, background fill, pages that are still on the source |
//!
//! What a migration does with these, in which order, is [`crate::migrate`]'s business; CRIU's images are [`crate::criu`]'s.

pub mod batch;
mod buffer;
pub mod compress;
pub mod converge;
pub mod daemon;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod inject;
pub mod maps;
pub mod range;
pub mod rate;
pub mod read;
pub mod sets;
pub mod smaps;
pub mod store;
pub mod tracker;

pub use range::RangeSet;

use crate::criu::ImageKind;

/// One memory: a task's address space (the id is its pid in the container), or a piece of shared memory (CRIU's `shmid`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Space {
    /// Which kind of memory.
    pub kind: ImageKind,
    /// Which one.
    pub id: u64,
}
