//! The writable layer of a container: captured as a stream of entries and applied exactly on the other node.
//!
//! # Layout
//!
//! | file | what lives there |
//! |---|---|
//! | [`layer`] | which directory is the writable layer: containerd's mounts read, nothing touched |
//! | [`entry`] | one entry of the stream, its limits, the order of entries |
//! | [`wire`] | an entry as bytes and back; the bytes are not trusted |
//! | [`xattr`] | which extended attributes travel, which stay, which stop the move |
//! | [`mod@capture`] | a directory read into a [`Sink`], once |
//! | [`staged`] | the same in rounds, while it changes: later ones send what changed since |
//! | [`stamp`] | whether an inode may have changed since it was looked at |
//! | `blocks` | which blocks of a file changed |
//! | [`content`] | a file's content block by block with strong hashes, by several threads |
//! | [`writers`] | which files the tasks may be writing |
//! | `directory` | names of a directory and what they stand for, without following anything |
//! | `read` | one inode's entry |
//! | [`apply`] | a [`Sink`] that writes a directory, in one round or several, the last perhaps through the mounted overlay |
//! | [`times`] | what CRIU's own work in the root must not change |
//! | [`diff`] | two directories compared entry by entry (tests, doctor) |
//! | [`testing`] | random layers through a real overlay mount, moved and compared |
//!
//! Not here: who sends the stream (`migrate`), open-but-deleted files (CRIU's ghost files carry them), mounting.
//!
//! # The stream
//!
//! The root's entry first, then depth first, the names of a directory in byte order, so that a parent always comes
//! before its children and every path is greater than the one before ([`entry::order`]); the data of a file follows its
//! entry; [`Entry::End`] with the totals ends it. [`Apply`] checks all of this and never follows a symbolic link.
//!
//! Later rounds begin with [`Entry::Round`]. They have the entries that changed and the directories above them;
//! [`Entry::Remove`] comes in its place in the order, and before what takes the name over; [`Kind::Patch`] is followed by
//! what changed of a file ([`Entry::Hole`] and data).

pub mod apply;
mod blocks;
pub mod capture;
pub mod content;
pub mod diff;
mod directory;
pub mod entry;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod layer;
mod read;
pub mod staged;
pub mod stamp;
mod sys;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_hostile;
#[cfg(test)]
mod tests_rounds;
pub mod times;
pub mod wire;
pub mod writers;
pub mod xattr;

pub use apply::{Apply, NeedsUnmount};
pub use capture::{CaptureOptions, capture};
pub use diff::{CompareOptions, Difference, compare};
pub use directory::{Directory, punch, reopen};
pub use entry::{Entry, Kind, Meta, Time, Totals, Xattr};
pub use layer::{LayerKind, MountSpec, WritableLayer};
pub use staged::Staged;
pub use times::KeptTimes;
pub use writers::Writers;
pub use xattr::OverlayXattrs;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Where a captured layer goes: the network's encoder, or [`Apply`].
pub trait Sink {
    /// Takes the next entry. The order is that of the module's documentation.
    fn entry(&mut self, entry: &Entry) -> Result<()>;
    /// Takes bytes at `offset` of the regular file whose entry was sent last. Offsets ascend; what is never sent is a
    /// hole and reads as zeros.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;
}

impl<S: Sink + ?Sized> Sink for &mut S {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        (**self).entry(entry)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        (**self).data(offset, bytes)
    }
}

/// What was captured or applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// All entries, the root's included, the end mark not.
    pub entries: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Directories that hide what the layers below have under the same name.
    pub opaque: u64,
    /// Regular files (first names of inodes).
    pub files: u64,
    /// Second and later names of inodes.
    pub links: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// FIFOs, sockets, character and block devices.
    pub special: u64,
    /// Whiteouts: names deleted from the layers below.
    pub whiteouts: u64,
    /// Bytes of file content sent.
    pub bytes_data: u64,
    /// Bytes of file content that are holes.
    pub bytes_holes: u64,
    /// Extended attributes sent.
    pub xattrs: u64,
    /// Extended attributes that mean something on the source's disk only and were left out ([`xattr`]).
    pub xattrs_dropped: u64,
    /// Inode flags that the destination's filesystem does not know (never immutable or append-only: those are errors).
    pub flags_dropped: u64,
    /// Files and names that changed while they were read. Always 0 for frozen tasks.
    pub changed: u64,
    /// Later rounds: names that disappeared, with all that was below them.
    pub removed: u64,
    /// Later rounds: files of which only what changed was sent.
    pub patched: u64,
    /// The source's side: entries that were looked at, sent or not.
    pub looked: u64,
    /// The source's side: bytes of file content that were read to see whether they changed, those sent included.
    pub bytes_read: u64,
    /// The destination's side: the changes could not be made below the mounted overlay, it was unmounted for them.
    pub unmounted: bool,
}

impl Stats {
    /// Counts one entry.
    pub(crate) fn count(&mut self, entry: &Entry) {
        let Entry::Node { kind, meta, .. } = entry else {
            match entry {
                Entry::Link { .. } => self.links += 1,
                Entry::Remove { .. } => self.removed += 1,
                _ => return,
            }
            self.entries += 1;
            return;
        };
        self.entries += 1;
        self.xattrs += meta.xattrs.len() as u64;
        match kind {
            Kind::Directory => {
                self.directories += 1;
                self.opaque += u64::from(meta.xattrs.iter().any(|x| xattr::is_opaque(&x.name, &x.value)));
            }
            Kind::File { .. } => self.files += 1,
            Kind::Patch { .. } => self.patched += 1,
            Kind::Symlink { .. } => self.symlinks += 1,
            Kind::Whiteout => self.whiteouts += 1,
            Kind::Fifo | Kind::Socket | Kind::CharDevice { .. } | Kind::BlockDevice { .. } => {
                self.special += 1
            }
        }
    }
}
