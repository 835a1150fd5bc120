//! One walk: every entry looked at, those that changed sent. Here: the way through the directories, and what is said of them.
//! [`frame`]: which of a directory's names come, stay and go. [`leaf`]: everything that is no directory.

mod frame;
mod leaf;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, fstat, fstatat};
use xxhash_rust::xxh3::xxh3_64;

use super::{Held, Known};
use crate::rootfs::capture::CaptureOptions;
use crate::rootfs::entry::{self, Entry, FLAGS, Kind, MAX_DEPTH, MAX_PATH, Meta, Time};
use crate::rootfs::read;
use crate::rootfs::stamp::{self, Seen, Stamp};
use crate::rootfs::sys::{self, Inode};
use crate::rootfs::writers::Writers;
use crate::rootfs::xattr::{self, OverlayXattrs};
use crate::rootfs::{Sink, Stats};
use frame::{Frame, Step};
use leaf::{Group, Index, unchanged};

pub(super) struct Walk<'a> {
    pub sink: &'a mut dyn Sink,
    pub overlay: OverlayXattrs,
    pub buffer: Vec<u8>,
    pub held: &'a mut Held,
    writers: &'a Writers,
    /// Not the first round.
    pub delta: bool,
    /// Names may disappear.
    pub running: bool,
    /// There may be another walk.
    pub keep: bool,
    old: Option<&'a Known>,
    /// Where each inode of the old tree with this number was: made when it is first asked for.
    index: Option<Index<'a>>,
    /// Inodes with several names of which one was passed.
    groups: HashMap<(u64, u64), Group>,
    /// From the root down to the directory in hand.
    levels: Vec<Level>,
    pub stats: Stats,
    /// Regular files passed.
    pub regular: u64,
    scratch: Vec<u8>,
}

struct Level {
    fd: OwnedFd,
    path: Vec<u8>,
    /// Its entry was sent, as everything in it needs.
    sent: bool,
    meta: Option<Meta>,
    hash: u64,
}

/// What a name turned out to be.
enum Child {
    /// No more, which the destination was told.
    None,
    Known(Known),
    Directory(OwnedFd),
}

impl<'a> Walk<'a> {
    pub fn new(
        sink: &'a mut dyn Sink,
        options: &CaptureOptions,
        held: &'a mut Held,
        writers: &'a Writers,
    ) -> Walk<'a> {
        let buffer = vec![0; options.chunk.clamp(4 << 10, 64 << 20)];
        Walk {
            sink,
            overlay: options.overlay,
            buffer,
            held,
            writers,
            delta: false,
            running: true,
            keep: true,
            old: None,
            index: None,
            groups: HashMap::new(),
            levels: Vec::new(),
            stats: Stats::default(),
            regular: 0,
            scratch: Vec::new(),
        }
    }

    pub fn tree(&mut self, root: BorrowedFd<'_>, old: Option<&'a Known>) -> Result<Known> {
        self.old = old;
        self.stats.looked += 1;
        // No recursion: the depth is the container's to choose, the stack is not.
        let mut frames = vec![self.enter(root.try_clone_to_owned()?, Vec::new(), old)?];
        loop {
            let frame = frames.last_mut().expect("the root's is returned below");
            match frame.next() {
                Step::Gone(name) => self.gone(name)?,
                Step::Look(name, old) => match self.child(&name, old)? {
                    Child::Known(child) => frame.known.names.push((name, child)),
                    Child::None => {}
                    Child::Directory(node) => {
                        let path = self.path(&name);
                        frames.push(self.enter(node, path, old)?);
                    }
                },
                Step::End => {
                    let mut done = frames.pop().expect("it is the last");
                    let level = self.levels.pop().expect("one for each frame");
                    done.known.meta = level.hash;
                    let Some(above) = frames.last_mut() else { return Ok(done.known) };
                    above.known.names.push((entry::split(&level.path).1.into(), done.known));
                }
            }
        }
    }

    /// Looks at a directory and makes it the one in hand.
    fn enter(&mut self, node: OwnedFd, path: Vec<u8>, old: Option<&'a Known>) -> Result<Frame<'a>> {
        let shown = || format!("\"{}\"", path.escape_ascii());
        let stat = fstat(&node)?;
        let mut now = Stamp::of(&stat);
        let mut kept = old.filter(|o| o.is_dir() && o.seen.stamp.key == now.key);
        let atime = read::time(stat.st_atime, stat.st_atime_nsec);
        let same = kept.filter(|o| !stamp::changed(&o.seen, &now) && o.atime == atime && !path.is_empty());
        let mut known = Known {
            seen: Seen { stamp: now, settled: true },
            atime,
            id: 0,
            meta: 0,
            marks: same.map_or(0, |o| o.marks),
            names: Vec::new(),
        };
        let mut listing = Vec::new();
        if let Some(same) = same {
            // Its names are what they were; only what they stand for may have changed.
            self.levels.push(Level { fd: node, path, sent: false, meta: None, hash: same.meta });
        } else {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOATIME;
            let fd = sys::open_beneath(node.as_fd(), b".", flags)
                .context("opening the directory")
                .with_context(shown)?;
            let stat = fstat(&fd)?;
            now = Stamp::of(&stat);
            let meta = self.directory_meta(fd.as_fd(), &stat).with_context(shown)?;
            known.marks = marks(&meta);
            let hash = self.hash(&Kind::Directory, &meta);
            let opaque = meta.xattrs.iter().any(|x| xattr::is_opaque(&x.name, &x.value));
            // What it hides or shows of the image is another directory than before: all of it anew.
            let other = match (old, kept) {
                (Some(_), Some(kept)) => kept.marks != known.marks,
                (Some(_), None) => true,
                (None, _) => opaque,
            };
            if self.delta && other && !path.is_empty() {
                self.need()?;
                self.send(Entry::Remove { path: path.clone() })?;
                kept = None;
            }
            let list = sys::read_dir(fd);
            let (fd, names) = match list {
                Ok((dir, names)) => (dir.as_fd().try_clone_to_owned()?, names),
                // Removed meanwhile: an empty one.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => (node, Vec::new()),
                Err(e) => return Err(e).context("reading the directory").with_context(shown),
            };
            listing = names;
            let send = kept.is_none_or(|k| k.meta != hash) || path.is_empty();
            self.levels.push(Level { fd, path, sent: false, meta: Some(meta), hash });
            if send {
                self.need()?;
            }
        }
        known.seen = Seen { stamp: now, settled: stamp::settled(now.ctime, self.writers.since, false) };
        let olds: &'a [(Box<[u8]>, Known)] = kept.map_or(&[], |k| &k.names);
        known.names.reserve_exact(olds.len().max(listing.len()));
        let listing = same.is_none().then(|| listing.into_iter());
        Ok(Frame { known, listing, olds: olds.iter().peekable() })
    }

    /// A name of the directory in hand.
    fn child(&mut self, name: &[u8], old: Option<&'a Known>) -> Result<Child> {
        self.stats.looked += 1;
        ensure!(self.levels.len() <= MAX_DEPTH, "names nested deeper than {MAX_DEPTH} levels");
        let level = self.levels.last().expect("inside a directory");
        ensure!(level.path.len() + 1 + name.len() <= MAX_PATH, "a path of more than {MAX_PATH} bytes");
        let dir = level.fd.as_fd();
        if let Some(old) = old.filter(|o| !o.is_dir()) {
            match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) if unchanged(old, &stat) => {
                    if let Some(known) = self.still(name, old, &stat)? {
                        return Ok(Child::Known(known));
                    }
                }
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(e) => return Err(e).with_context(|| self.shown(name)),
            }
        }
        let dir = self.levels.last().expect("as above").fd.as_fd();
        // O_PATH first: opening a device or FIFO can block or have effects, and the name may change its meaning between
        // a look and an open.
        let node = match sys::open_beneath(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(self.vanished(name, old)?.map_or(Child::None, Child::Known));
            }
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                bail!("{}: a mount point inside the writable layer", self.shown(name))
            }
            Err(e) => return Err(e).context("opening").with_context(|| self.shown(name)),
        };
        let stat = fstat(&node)?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return Ok(Child::Directory(node));
        }
        let leaf = self.leaf(node.as_fd(), stat, name, old).with_context(|| self.shown(name))?;
        Ok(leaf.map_or(Child::None, Child::Known))
    }

    /// Gone between two looks; the next round finds whatever is there then.
    fn vanished(&mut self, name: &[u8], old: Option<&Known>) -> Result<Option<Known>> {
        self.stats.changed += 1;
        if old.is_some() {
            self.gone(name)?;
        }
        Ok(None)
    }

    fn gone(&mut self, name: &[u8]) -> Result<()> {
        self.need()?;
        let path = self.path(name);
        self.send(Entry::Remove { path })
    }

    /// Sends the entries of the directory in hand and those above that were not sent yet.
    pub fn need(&mut self) -> Result<()> {
        if self.levels.last().is_none_or(|l| l.sent) {
            return Ok(());
        }
        for at in 0..self.levels.len() {
            if self.levels[at].sent {
                continue;
            }
            let meta = match self.levels[at].meta.take() {
                Some(meta) => meta,
                None => {
                    let fd = sys::reopen(self.levels[at].fd.as_fd(), OFlag::O_RDONLY | OFlag::O_NOATIME)
                        .context("opening a directory for its attributes")?;
                    let meta = self.directory_meta(fd.as_fd(), &fstat(&fd)?)?;
                    self.levels[at].hash = self.hash(&Kind::Directory, &meta);
                    meta
                }
            };
            self.levels[at].sent = true;
            let path = self.levels[at].path.clone();
            self.send(Entry::Node { path, kind: Kind::Directory, meta })?;
        }
        Ok(())
    }

    fn directory_meta(&mut self, fd: BorrowedFd<'_>, stat: &FileStat) -> Result<Meta> {
        let mut meta = read::meta(stat, &Inode::Open(fd), self.overlay, &mut self.stats)?;
        meta.flags = sys::flags(fd).context("reading inode flags")? & FLAGS;
        Ok(meta)
    }

    /// Of everything that the destination holds of an entry besides data and path.
    pub fn hash(&mut self, kind: &Kind, meta: &Meta) -> u64 {
        let mut meta = meta.clone();
        if matches!(kind, Kind::Symlink { .. }) {
            // Every look at where it leads changes it.
            meta.atime = Time::default();
        }
        self.scratch.clear();
        Entry::Node { path: Vec::new(), kind: kind.clone(), meta }.encode(&mut self.scratch);
        xxh3_64(&self.scratch)
    }

    /// Can a stamp that was just taken be trusted later?
    pub fn settled(&self, stamp: &Stamp) -> bool {
        let (open, mapped) = self.writers.of(stamp.key);
        !mapped && stamp::settled(stamp.ctime, self.writers.since, open)
    }

    /// Is it mapped now, so that it may have changed with nothing to show for it?
    pub fn mapped(&self, stamp: &Stamp) -> bool {
        self.writers.of(stamp.key).1
    }

    pub fn new_id(&mut self) -> u64 {
        self.held.ids += 1;
        self.held.ids
    }

    pub fn send(&mut self, entry: Entry) -> Result<()> {
        self.stats.count(&entry);
        self.sink.entry(&entry)
    }

    fn path(&self, name: &[u8]) -> Vec<u8> {
        join(&self.levels.last().expect("inside a directory").path, name)
    }

    fn shown(&self, name: &[u8]) -> String {
        format!("\"{}\"", self.path(name).escape_ascii())
    }
}

/// The marks that decide which directory of the image shows through.
fn marks(meta: &Meta) -> u64 {
    let mut sum = 0u64;
    for x in meta.xattrs.iter().filter(|x| xattr::is_layout(&x.name)) {
        sum = xxh3_64(&[&sum.to_le_bytes()[..], &x.name, b"\0", &x.value].concat());
    }
    sum
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        return name.to_vec();
    }
    [dir, b"/", name].concat()
}
