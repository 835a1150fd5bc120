//! The writable layer sent in rounds while the container runs, and once more, after the freeze, only what changed since.
//!
//! The first round is the whole layer. Tasks rename, remove and write under the walk: nothing of that is an error, what
//! was missed differs at the next walk. Later rounds look at every entry (one stat) and read those whose [`Stamp`] moved,
//! is not settled, or that may be written through a mapping; of large files only changed blocks are sent. The last
//! round, with the tasks frozen, leaves the destination with exactly what is there.
//!
//! What the destination holds is remembered as a tree of [`Known`] entries. Each inode there has a number of its own,
//! because those of the source are used again for other files.
//!
//! [`Stamp`]: super::stamp::Stamp

mod content;
mod walk;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;

use super::blocks::Blocks;
use super::capture::CaptureOptions;
use super::entry::{Entry, ROUND_FORMAT, Time, Totals};
use super::layer::WritableLayer;
use super::stamp::Seen;
use super::writers::Writers;
use super::{Sink, Stats};

/// A layer that is sent in rounds.
pub struct Staged {
    root: OwnedFd,
    dir: PathBuf,
    options: CaptureOptions,
    keep: bool,
    held: Held,
    rounds: u32,
    broken: bool,
}

/// What the destination holds.
#[derive(Default)]
struct Held {
    root: Option<Known>,
    /// Content of its files, by [`Known::id`].
    files: HashMap<u64, Blocks>,
    ids: u64,
    seed: u64,
}

/// An entry as it was sent.
#[derive(Clone, Debug)]
struct Known {
    seen: Seen,
    atime: Time,
    /// The inode there: several names of one have the same.
    id: u64,
    /// Hash of the entry, without its path.
    meta: u64,
    /// Hash of the marks that say how a directory is laid over the image's.
    marks: u64,
    /// A directory's, in byte order.
    names: Vec<(Box<[u8]>, Known)>,
}

impl Known {
    fn is_dir(&self) -> bool {
        self.seen.stamp.kind() == libc::S_IFDIR
    }
}

impl Staged {
    /// For the layer of a container that runs.
    ///
    /// # Errors
    /// Its directory cannot be opened.
    pub fn new(layer: &WritableLayer) -> Result<Staged> {
        Staged::open(layer.dir.clone(), CaptureOptions::for_layer(layer), true)
    }

    /// `keep`: there will be further rounds.
    pub(super) fn open(dir: PathBuf, options: CaptureOptions, keep: bool) -> Result<Staged> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(&dir, flags, nix::sys::stat::Mode::empty())
            .with_context(|| format!("opening the writable layer {}", dir.display()))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let held = Held { seed: now.as_nanos() as u64, ..Held::default() };
        Ok(Staged { root, dir, options, keep, held, rounds: 0, broken: false })
    }

    /// Sends a round while the tasks run: the first time everything, then what changed. `writers` were looked up just
    /// before.
    ///
    /// # Errors
    /// As [`super::capture()`], but for what disappears meanwhile. After an error the object is of no use.
    pub fn round(&mut self, writers: &Writers, sink: &mut dyn Sink) -> Result<Stats> {
        self.walk(writers, sink, true)
    }

    /// Sends the last round: nobody changes the layer any more.
    ///
    /// # Errors
    /// As [`super::capture()`].
    pub fn last(&mut self, writers: &Writers, sink: &mut dyn Sink) -> Result<Stats> {
        self.walk(writers, sink, false)
    }

    /// Rounds sent so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    fn walk(&mut self, writers: &Writers, sink: &mut dyn Sink, running: bool) -> Result<Stats> {
        let context = || format!("capturing the writable layer {}", self.dir.display());
        anyhow::ensure!(!self.broken, "{}: an earlier round failed", context());
        self.broken = true;
        if self.rounds > 0 {
            sink.entry(&Entry::Round { format: ROUND_FORMAT }).with_context(context)?;
        }
        let old = self.held.root.take();
        let mut walk = walk::Walk::new(sink, &self.options, &mut self.held, writers);
        walk.delta = self.rounds > 0;
        walk.running = running;
        walk.keep = self.keep;
        let root = walk.tree(self.root.as_fd(), old.as_ref()).with_context(context)?;
        let (stats, files) = (walk.stats, walk.regular);
        sink.entry(&Entry::End(Totals { entries: stats.entries, bytes: stats.bytes_data }))?;
        if running && self.keep {
            self.held.forget_unused(&root, files);
        }
        self.held.root = Some(root);
        self.rounds += 1;
        self.broken = false;
        Ok(stats)
    }
}

impl Held {
    /// Drops the content of files that are no more, once it is worth a look at the whole tree.
    fn forget_unused(&mut self, root: &Known, regular: u64) {
        if self.files.len() as u64 <= regular + regular / 4 + 64 {
            return;
        }
        let mut used = std::collections::HashSet::new();
        let mut open = vec![root];
        while let Some(known) = open.pop() {
            used.insert(known.id);
            open.extend(known.names.iter().map(|(_, k)| k));
        }
        self.files.retain(|id, _| used.contains(id));
    }
}
