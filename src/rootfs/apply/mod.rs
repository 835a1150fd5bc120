//! A [`Sink`] that writes a layer's directory. The stream comes from a peer and is not trusted: no symbolic link is ever
//! followed, and every name is a single component below a directory that is held open.
//!
//! The order within an inode: data, owner (which clears setuid and capabilities), attributes, mode, times. A directory
//! gets its own when the stream leaves it: until then it is root's, mode 0700, without a default ACL that its children
//! would inherit, and its times would change with every child. Flags that forbid changes come at the very end.
//!
//! The first round fills an empty directory. Every later one changes what is there; the last of them may come when the
//! overlay is mounted and is then made through the mount ([`Apply::through`], and [`merged`] says why).
//!
//! | module | what lives there |
//! |---|---|
//! | [`node`] | what is made under a name, and what goes first |
//! | [`filled`] | the open file and the open directories, and what each gets when it is left |
//! | [`attributes`] | setting those |
//! | [`mounted`], [`merged`] | changes through the mounted overlay; what it would be told (pure) |
//! | [`room`] | the disk is not filled up |
//!
//! Here: how a layer is opened, its rounds, and the order of a stream's entries.

mod attributes;
mod filled;
mod merged;
mod mounted;
mod node;
mod room;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::entry::{self, Entry, Kind, MAX_DEPTH, Totals};
use super::layer::WritableLayer;
use super::sys;
use super::xattr::OverlayXattrs;
use super::{Sink, Stats};
use filled::{Directory, File, Protected};
use mounted::Mount;
use room::Room;

pub use mounted::{NeedsUnmount, Unmount};

/// Writes streams of entries into a directory. Dropped before [`Apply::finish`], it leaves what it has written; no flag
/// that would stand in the way of removing it is set by then.
pub struct Apply {
    overlay: OverlayXattrs,
    upper: OwnedFd,
    mount: Option<Mount>,
    /// Rounds that are complete.
    rounds: u32,
    /// This round changes what is there.
    delta: bool,
    /// Open directories from the root down to the one being filled. Empty before the root's entry.
    directories: Vec<Directory>,
    last: Option<(Vec<u8>, Last)>,
    file: Option<File>,
    /// A name removed through the mount where the image's own showed through and was hidden.
    hidden: Option<Vec<u8>>,
    /// Inodes that get [`PROTECTED`](entry::PROTECTED) flags at the end.
    protected: BTreeMap<Vec<u8>, Protected>,
    stats: Stats,
    end: Option<Totals>,
    /// Which device nodes are made; all without it.
    nodes: Option<Nodes>,
    room: Room,
}

/// Tells whether a device node may be made: block device or not, major and minor number.
pub type Nodes = Box<dyn Fn(bool, u32, u32) -> bool + Send>;

/// What the last entry with a path was: two things may come for one path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Node,
    Link,
    Remove,
}

impl Apply {
    /// For the upper directory of a usual overlay mount, which must be empty. Its own attributes are replaced.
    ///
    /// # Errors
    /// Not a directory, or not empty.
    pub fn new(dir: &Path) -> Result<Self> {
        let apply = Self::open(dir, OverlayXattrs::Trusted)?;
        let listing = sys::open_beneath(apply.upper.as_fd(), b".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let (_, names) = sys::read_dir(listing).with_context(|| format!("reading {}", dir.display()))?;
        ensure!(
            names.is_empty(),
            "{} is not empty: a layer would be mixed with what is there",
            dir.display()
        );
        Ok(apply)
    }

    /// For the layer of a container that is being made here. **Everything in its directory is removed**: a fresh snapshot
    /// of the native snapshotter holds a copy of the image; a fresh upper directory holds nothing.
    ///
    /// # Errors
    /// Not a directory; something cannot be removed; a mount point inside.
    pub fn for_layer(layer: &WritableLayer) -> Result<Self> {
        let apply = Self::open(&layer.dir, layer.kind.overlay_xattrs())?;
        sys::empty(apply.upper.as_fd(), MAX_DEPTH * 2)
            .with_context(|| format!("emptying the writable layer {}", layer.dir.display()))?;
        Ok(apply)
    }

    /// For a layer that earlier rounds have filled, whose `Apply` is no more: the flags that forbid changes, which it
    /// would have set at its end, are lost. `merged` is where the overlay is mounted, if it is.
    ///
    /// # Errors
    /// As [`Apply::through`].
    pub fn resume(layer: &WritableLayer, merged: Option<&Path>) -> Result<Self> {
        let mut apply = Self::open(&layer.dir, layer.kind.overlay_xattrs())?;
        apply.rounds = 1;
        if let Some(merged) = merged {
            apply.through(merged, None)?;
        }
        Ok(apply)
    }

    fn open(dir: &Path, overlay: OverlayXattrs) -> Result<Self> {
        Ok(Apply {
            overlay,
            upper: open_root(dir).with_context(|| format!("opening the writable layer {}", dir.display()))?,
            mount: None,
            rounds: 0,
            delta: false,
            directories: Vec::new(),
            last: None,
            file: None,
            hidden: None,
            protected: BTreeMap::new(),
            stats: Stats::default(),
            end: None,
            nodes: None,
            room: Room::default(),
        })
    }

    /// Other device nodes than these are refused; whiteouts are none.
    pub fn only_devices(mut self, nodes: Nodes) -> Self {
        self.nodes = Some(nodes);
        self
    }

    /// Ends a round: completes what is still open and checks the totals.
    ///
    /// # Errors
    /// The stream was cut short or its totals differ; the last attributes cannot be set.
    pub fn round(&mut self) -> Result<Stats> {
        let Some(end) = self.end.take() else {
            bail!("the writable layer was cut short after {} entries", self.stats.entries);
        };
        ensure!(
            (end.entries, end.bytes) == (self.stats.entries, self.stats.bytes_data),
            "the writable layer arrived with {} entries and {} bytes of data; {} and {} were announced",
            self.stats.entries,
            self.stats.bytes_data,
            end.entries,
            end.bytes
        );
        self.last = None;
        self.delta = false;
        self.rounds += 1;
        Ok(std::mem::take(&mut self.stats))
    }

    /// Ends the last round, and sets what forbids further changes.
    ///
    /// # Errors
    /// As [`Apply::round`].
    pub fn finish(mut self) -> Result<Stats> {
        let stats = self.round()?;
        self.finish_rounds()?;
        Ok(stats)
    }

    /// After the last round, which [`Apply::round`] has ended: sets what forbids further changes.
    ///
    /// # Errors
    /// They cannot be set.
    pub fn finish_rounds(mut self) -> Result<()> {
        for (path, protected) in std::mem::take(&mut self.protected) {
            self.protect(&path, &protected).with_context(|| format!("\"{}\"", path.escape_ascii()))?;
        }
        Ok(())
    }

    /// Where changes are made.
    fn root(&self) -> BorrowedFd<'_> {
        self.mount.as_ref().map_or(self.upper.as_fd(), |m| m.root.as_fd())
    }

    fn accept(&mut self, entry: &Entry) -> Result<()> {
        ensure!(self.end.is_none(), "an entry after the end mark");
        entry.check(self.overlay)?;
        let Some(path) = entry.path() else { return self.mark(entry) };
        let kind = match entry {
            Entry::Link { .. } => Last::Link,
            Entry::Remove { .. } => Last::Remove,
            _ => Last::Node,
        };
        let patch = matches!(entry, Entry::Node { kind: Kind::Patch { .. }, .. });
        match &self.last {
            None => {
                ensure!(path.is_empty(), "the root's entry is not the first");
                ensure!(self.delta == (self.rounds > 0), "the beginning of a round is missing");
            }
            Some((last, before)) => match entry::order(last, path) {
                Ordering::Less => {}
                Ordering::Equal => match before {
                    Last::Remove if kind != Last::Remove => {}
                    Last::Link if patch => {}
                    _ => bail!("sent twice"),
                },
                Ordering::Greater => bail!("out of order: sent after \"{}\"", last.escape_ascii()),
            },
        }
        self.close_file()?;
        self.uncover(Some(path))?;
        self.leave_until(Some(path))?;
        match entry {
            Entry::Node { path, kind, meta } => self.node(path, kind, meta)?,
            Entry::Link { path, target } => self.link(path, target)?,
            Entry::Remove { path } => self.remove(path)?,
            Entry::Round { .. } | Entry::Hole { .. } | Entry::End(_) => unreachable!("they have no path"),
        }
        self.last = Some((path.to_vec(), kind));
        self.stats.count(entry);
        Ok(())
    }

    fn mark(&mut self, entry: &Entry) -> Result<()> {
        match entry {
            Entry::Round { .. } => {
                ensure!(self.last.is_none() && !self.delta, "the beginning of a round inside one");
                ensure!(self.rounds > 0, "a later round without the first");
                self.delta = true;
            }
            Entry::Hole { offset, len } => self.hole(*offset, *len)?,
            Entry::End(totals) => {
                ensure!(self.last.is_some(), "the end without the root's entry");
                self.close_file()?;
                self.uncover(None)?;
                self.leave_until(None)?;
                self.end = Some(*totals);
            }
            Entry::Node { .. } | Entry::Link { .. } | Entry::Remove { .. } => {
                unreachable!("they have a path")
            }
        }
        Ok(())
    }
}

impl Sink for Apply {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.accept(entry).with_context(|| match entry.path() {
            Some(path) => format!("applying the layer entry \"{}\"", path.escape_ascii()),
            None => "applying a mark of the layer".into(),
        })
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(file) = &mut self.file else { bail!("layer data that belongs to no file") };
        ensure!(self.end.is_none(), "layer data after the end mark");
        let end = file.range(offset, bytes.len() as u64)?;
        let shown = file.path.escape_ascii();
        self.room.data(self.upper.as_fd(), bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            match nix::sys::uio::pwrite(&file.fd, &bytes[done..], (offset + done as u64) as libc::off_t) {
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e).with_context(|| format!("writing \"{shown}\"")),
            }
        }
        file.next = end;
        file.written += bytes.len() as u64;
        self.stats.bytes_data += bytes.len() as u64;
        Ok(())
    }
}

fn open_root(dir: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(dir, flags, Mode::empty())
}
