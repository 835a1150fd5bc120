//! A [`Sink`] that writes a layer's directory. The stream comes from a peer and is not trusted: no symbolic link is ever
//! followed, and every name is a single component below a directory that is held open.
//!
//! The order within an inode: data, owner (which clears setuid and capabilities), attributes, mode, times. A directory
//! gets its own when the stream leaves it: until then it is root's, mode 0700, without a default ACL that its children
//! would inherit, and its times would change with every child. Flags that forbid changes come at the very end.
//!
//! The first round fills an empty directory. Every later one changes what is there; the last of them may come when the
//! overlay is mounted and is then made through the mount ([`Apply::through`], and [`merged`] says why).

mod attributes;
mod merged;
mod room;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{ftruncate, linkat, symlinkat};

use super::entry::{self, Entry, Kind, MAX_DEPTH, Meta, PROTECTED, Totals, Xattr};
use super::layer::WritableLayer;
use super::sys::{self, Inode};
use super::xattr::{OverlayXattrs, is_leftover};
use super::{Sink, Stats};
use attributes::Exact;
use room::Room;

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
    /// Inodes that get [`PROTECTED`] flags at the end.
    protected: BTreeMap<Vec<u8>, Protected>,
    stats: Stats,
    end: Option<Totals>,
    /// Which device nodes are made; all without it.
    nodes: Option<Nodes>,
    room: Room,
}

/// Tells whether a device node may be made: block device or not, major and minor number.
pub type Nodes = Box<dyn Fn(bool, u32, u32) -> bool + Send>;

/// What takes the mount away; told why.
pub type Unmount = Box<dyn FnMut(&str) -> Result<()> + Send>;

/// The mounted overlay.
struct Mount {
    root: OwnedFd,
    unmount: Option<Unmount>,
}

/// The mount must be taken away before this entry (and what follows) can be applied.
#[derive(Debug, thiserror::Error)]
#[error("the writable layer cannot be changed below the mounted root filesystem: {why}")]
pub struct NeedsUnmount {
    /// What cannot be said through the mount.
    pub why: String,
}

/// What forbids changes of an inode.
struct Protected {
    flags: u32,
    /// overlayfs keeps such flags of its own in an attribute: this one, if the mount is taken away before the end.
    mark: Option<Xattr>,
}

struct Directory {
    path: Vec<u8>,
    fd: OwnedFd,
    meta: Meta,
    /// It was there before this round.
    reused: bool,
}

/// What the last entry with a path was: two things may come for one path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Node,
    Link,
    Remove,
}

/// The regular file that data goes to.
struct File {
    path: Vec<u8>,
    fd: OwnedFd,
    meta: Meta,
    size: u64,
    /// Where the next data may begin.
    next: u64,
    written: u64,
    patch: bool,
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

    /// The overlay is mounted at `merged` by now: from here on changes are made through it. Does nothing for a layer
    /// that is no overlay's. Between two rounds only.
    ///
    /// An entry that cannot be made that way has `unmount` called, which must take the mount away (and with it whoever
    /// uses it); the rest then goes into the layer itself, [`Stats::unmounted`] tells of it, and the caller mounts anew.
    /// Without `unmount` the entry is refused with [`NeedsUnmount`] and can be applied again after [`Apply::unmounted`].
    ///
    /// # Errors
    /// Not a directory; the mount shows other owners than the layer has (idmapped), which is [`NeedsUnmount`].
    pub fn through(&mut self, merged: &Path, unmount: Option<Unmount>) -> Result<()> {
        ensure!(self.last.is_none(), "the layer was mounted in the middle of a round");
        if self.overlay == OverlayXattrs::None {
            return Ok(());
        }
        let root = open_root(merged).with_context(|| format!("opening {}", merged.display()))?;
        let (through, layer) = (fstat(&root)?, fstat(&self.upper)?);
        let owner = |s: &FileStat| (s.st_uid, s.st_gid, s.st_mode, s.st_mtime, s.st_mtime_nsec);
        if owner(&through) != owner(&layer) {
            let why = format!("{} does not show the layer's own owners", merged.display());
            return Err(NeedsUnmount { why }.into());
        }
        self.mount = Some(Mount { root, unmount });
        Ok(())
    }

    /// The overlay is no longer mounted.
    ///
    /// # Errors
    /// A directory that is being filled is not in the layer.
    pub fn unmounted(&mut self) -> Result<()> {
        self.mount = None;
        self.stats.unmounted = true;
        for at in 0..self.directories.len() {
            let path = &self.directories[at].path;
            let below = if path.is_empty() { b"." } else { &path[..] };
            let fd = sys::open_beneath(self.upper.as_fd(), below, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                .with_context(|| format!("opening \"{}\" again", path.escape_ascii()))?;
            self.directories[at].fd = fd;
        }
        Ok(())
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

    fn protect(&self, path: &[u8], protected: &Protected) -> Result<()> {
        let path = if path.is_empty() { b"." } else { path };
        let node = sys::open_beneath(self.root(), path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        // Reading does not change the access time here: nothing is read.
        let fd = sys::reopen(node.as_fd(), OFlag::O_RDONLY)?;
        let mut flags = protected.flags | sys::flags(fd.as_fd())?;
        if let Some(mark) = &protected.mark {
            if self.mount.is_some() {
                flags |= merged::flags_of(&mark.value);
            } else {
                Inode::Open(fd.as_fd()).set_xattr(&CString::new(mark.name.as_slice())?, &mark.value)?;
            }
        }
        sys::set_flags(fd.as_fd(), flags).with_context(|| format!("setting inode flags {flags:#x}"))
    }

    /// Finishes the directories that are not on the way to `path`; all of them for none.
    fn leave_until(&mut self, path: Option<&[u8]>) -> Result<()> {
        while let Some(top) = self.directories.last() {
            if path.is_some_and(|path| is_below(path, &top.path)) {
                break;
            }
            let Directory { path, fd, meta, reused } = self.directories.pop().expect("there is a last one");
            self.complete(fd.as_fd(), &path, &meta, reused).with_context(|| {
                format!("setting the attributes of directory \"{}\"", path.escape_ascii())
            })?;
        }
        Ok(())
    }

    fn close_file(&mut self) -> Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        if !file.patch {
            self.stats.bytes_holes += file.size - file.written;
        }
        self.complete(file.fd.as_fd(), &file.path, &file.meta, file.patch)
            .with_context(|| format!("setting the attributes of \"{}\"", file.path.escape_ascii()))
    }

    /// Owner, attributes, mode, flags and times of an open file or directory.
    fn complete(&mut self, fd: BorrowedFd<'_>, path: &[u8], meta: &Meta, reused: bool) -> Result<()> {
        let through = self.mount.as_ref().map(|_| merged::seen_through(meta, self.overlay));
        let overlay = if through.is_some() { OverlayXattrs::None } else { self.overlay };
        let mark = meta.xattrs.iter().find(|x| merged::is_flags(&x.name, self.overlay)).cloned();
        let flags = meta.flags & PROTECTED;
        let meta = through.as_ref().unwrap_or(meta);
        let exact = (reused && self.delta).then_some(Exact { overlay, keep_marks: path.is_empty() });
        self.stats.flags_dropped += u64::from(!attributes::set(fd, meta, exact)?);
        if flags == 0 && mark.is_none() {
            self.protected.remove(path);
        } else {
            self.protected.insert(path.to_vec(), Protected { flags, mark });
        }
        Ok(())
    }

    fn node(&mut self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        if path.is_empty() {
            return self.root_entry(meta);
        }
        self.room.entry(self.upper.as_fd())?;
        if let (Some(nodes), Some((block, major, minor))) = (&self.nodes, kind.device()) {
            ensure!(
                nodes(block, major, minor),
                "the device {} {major}:{minor}, which this node's policy does not allow: `devices` in the section \
                 [policy] of its agent.toml would",
                if block { 'b' } else { 'c' }
            );
        }
        self.may_go_through(path, kind, meta)?;
        match kind {
            Kind::Directory => return self.directory(path, meta),
            Kind::Patch { size } => return self.patch(path, *size, meta),
            _ => {}
        }
        if self.delta {
            self.make_way(path)?;
        }
        let name = entry::split(path).1;
        let through = self.mount.as_ref().map(|_| merged::seen_through(meta, self.overlay));
        let parent = self.parent(path)?;
        let make = |kind: SFlag, device: libc::dev_t| {
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknodat(parent, name, kind, mode, device).context("creating the node")?;
            attributes::set_by_name(parent, name, through.as_ref().unwrap_or(meta), true)
        };
        match kind {
            Kind::Directory | Kind::Patch { .. } => unreachable!("handled above"),
            Kind::File { size } => {
                let fd = sys::create_file(parent, name).context("creating the file")?;
                ftruncate(&fd, *size as libc::off_t)
                    .with_context(|| format!("making a file of {size} bytes"))?;
                self.file = Some(File::new(path, fd, *size, meta, false));
            }
            Kind::Symlink { target } => {
                symlinkat(target.as_slice(), parent, name).context("creating the symlink")?;
                attributes::set_by_name(parent, name, through.as_ref().unwrap_or(meta), false)?;
            }
            Kind::Fifo => make(SFlag::S_IFIFO, 0)?,
            Kind::Socket => make(SFlag::S_IFSOCK, 0)?,
            // The mount has left one of its own if there is anything to hide.
            Kind::Whiteout if self.mount.is_some() => {}
            Kind::Whiteout => make(SFlag::S_IFCHR, 0)?,
            Kind::CharDevice { major, minor } => {
                make(SFlag::S_IFCHR, makedev((*major).into(), (*minor).into()))?;
            }
            Kind::BlockDevice { major, minor } => {
                make(SFlag::S_IFBLK, makedev((*major).into(), (*minor).into()))?;
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], meta: &Meta) -> Result<()> {
        let name = entry::split(path).1;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut there = None;
        if self.delta {
            // One that is opaque is none of the image's.
            let other = self.mount.is_some() && merged::is_opaque(meta) && !self.is_opaque_in_layer(path);
            let node = if other { None } else { self.look(self.parent(path)?, name)? };
            match node {
                Some((_, stat)) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {
                    let fd = sys::open_beneath(self.parent(path)?, name, flags)?;
                    prepare(fd.as_fd()).context("preparing the directory")?;
                    there = Some(fd);
                }
                _ => self.make_way(path)?,
            }
        }
        let reused = there.is_some();
        let fd = match there {
            Some(fd) => fd,
            None => {
                let parent = self.parent(path)?;
                mkdirat(parent, name, Mode::S_IRWXU).context("creating the directory")?;
                sys::open_beneath(parent, name, flags)?
            }
        };
        self.directories.push(Directory { path: path.to_vec(), fd, meta: meta.clone(), reused });
        Ok(())
    }

    fn patch(&mut self, path: &[u8], size: u64, meta: &Meta) -> Result<()> {
        ensure!(self.delta, "a change to a file in the first round");
        let name = entry::split(path).1;
        let is_file = |n: &(OwnedFd, FileStat)| n.1.st_mode & libc::S_IFMT == libc::S_IFREG;
        // Not the image's file, which would be copied up.
        ensure!(
            self.in_layer(path)?.as_ref().is_some_and(is_file),
            "a change to a file that did not come before"
        );
        let Some((node, _)) = self.look(self.parent(path)?, name)?.filter(is_file) else {
            bail!("a change to something that is no file")
        };
        sys::clear_protection(sys::reopen(node.as_fd(), OFlag::O_RDONLY)?.as_fd())?;
        let fd = sys::reopen(node.as_fd(), OFlag::O_WRONLY).context("opening the file")?;
        ftruncate(&fd, size as libc::off_t).with_context(|| format!("making a file of {size} bytes"))?;
        self.file = Some(File::new(path, fd, size, meta, true));
        Ok(())
    }

    /// Takes the mount away if the entry cannot be made through it.
    fn may_go_through(&mut self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        if self.mount.is_none() {
            return Ok(());
        }
        let node = self.in_layer(path)?;
        let has = |name: &[u8]| {
            let (fd, _) = node.as_ref()?;
            Inode::of_path_fd(fd.as_fd()).xattr(&CString::new(name).ok()?).ok()?
        };
        match merged::cannot(kind, meta, self.overlay, has) {
            Some(why) => self.take_mount_away(why),
            None => Ok(()),
        }
    }

    fn take_mount_away(&mut self, why: String) -> Result<()> {
        let Some(Mount { unmount: Some(unmount), .. }) = &mut self.mount else {
            return Err(NeedsUnmount { why }.into());
        };
        let mut unmount = std::mem::replace(unmount, Box::new(|_| Ok(())));
        // Nothing of ours may keep it busy: descriptors of the layer's directories take the place of the mount's.
        self.unmounted()?;
        unmount(&why).with_context(|| format!("unmounting the root filesystem, because {why}"))
    }

    /// What the layer itself has under a path, whatever the mount shows.
    fn in_layer(&self, path: &[u8]) -> Result<Option<(OwnedFd, FileStat)>> {
        self.look(self.upper.as_fd(), path)
    }

    fn is_opaque_in_layer(&self, path: &[u8]) -> bool {
        let Ok(Some((fd, _))) = self.in_layer(path) else { return false };
        let inode = Inode::of_path_fd(fd.as_fd());
        [c"trusted.overlay.opaque", c"user.overlay.opaque"]
            .iter()
            .any(|n| inode.xattr(n).is_ok_and(|v| v.as_deref() == Some(b"y")))
    }

    fn look(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<Option<(OwnedFd, FileStat)>> {
        match sys::open_beneath(dir, path, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Ok(fd) => {
                let stat = fstat(&fd)?;
                Ok(Some((fd, stat)))
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(e).context("looking for what is there"),
        }
    }

    /// Removes what is under a name.
    fn make_way(&mut self, path: &[u8]) -> Result<()> {
        sys::remove(self.parent(path)?, entry::split(path).1, MAX_DEPTH * 2)
            .context("removing what was there before")?;
        let gone: Vec<_> = self
            .protected
            .range(path.to_vec()..)
            .map(|(p, _)| p)
            .take_while(|p| p.starts_with(path))
            .filter(|p| *p == path || is_below(p, path))
            .cloned()
            .collect();
        gone.iter().for_each(|p| {
            self.protected.remove(p);
        });
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<()> {
        ensure!(self.delta, "a removal in the first round");
        let is_whiteout = |node: Option<(OwnedFd, FileStat)>| {
            node.is_some_and(|(_, s)| s.st_mode & libc::S_IFMT == libc::S_IFCHR && s.st_rdev == 0)
        };
        if self.mount.is_some() && is_whiteout(self.in_layer(path)?) {
            self.take_mount_away("a name of the image is no longer hidden".into())?;
        }
        self.make_way(path)?;
        if self.mount.is_some() && is_whiteout(self.in_layer(path)?) {
            self.hidden = Some(path.to_vec());
        }
        Ok(())
    }

    /// A removal that hid a name of the image must be followed by something else under it: the layer of the source hides
    /// nothing there.
    fn uncover(&mut self, next: Option<&[u8]>) -> Result<()> {
        if self.hidden.as_deref() == next {
            self.hidden = None;
        }
        let Some(path) = self.hidden.clone() else { return Ok(()) };
        if self.mount.is_some() {
            self.take_mount_away("a name of the image shows through again".into())?;
        }
        self.hidden = None;
        let (dir, name) = entry::split(&path);
        let dir = if dir.is_empty() { b"." } else { dir };
        let dir = sys::open_beneath(self.upper.as_fd(), dir, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        sys::remove(dir.as_fd(), name, 0).context("removing a whiteout").map(drop)
    }

    fn hole(&mut self, offset: u64, len: u64) -> Result<()> {
        let Some(file) = self.file.as_mut().filter(|f| f.patch) else {
            bail!("a hole that belongs to no changed file")
        };
        let end = file.range(offset, len)?;
        // The last block goes only if it is within the range as a whole.
        let len = if end == file.size { len.next_multiple_of(64 << 10) } else { len };
        let len = len.min(entry::MAX_SIZE - offset);
        sys::punch(file.fd.as_fd(), offset, len).context("making a hole")?;
        // Data may follow that fills some of it.
        file.next = offset;
        Ok(())
    }

    fn root_entry(&mut self, meta: &Meta) -> Result<()> {
        let fd = sys::open_beneath(self.root(), b".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        if self.delta {
            prepare(fd.as_fd()).context("preparing the root")?;
        } else {
            let inode = Inode::Open(fd.as_fd());
            for name in inode.xattr_names()? {
                if is_leftover(name.to_bytes(), self.overlay) {
                    inode.remove_xattr(&name).with_context(|| format!("removing {name:?}"))?;
                }
            }
        }
        self.directories.push(Directory { path: Vec::new(), fd, meta: meta.clone(), reused: true });
        Ok(())
    }

    fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        // In the first round everything below the root was made by this stream; openat2 takes no symlink on the way.
        let node = sys::open_beneath(self.root(), target, OFlag::O_PATH | OFlag::O_NOFOLLOW)
            .with_context(|| format!("opening \"{}\" to link to it", target.escape_ascii()))?;
        if self.delta {
            self.make_way(path)?;
        } else {
            ensure!(entry::order(target, path) == Ordering::Less, "a hard link to a name that comes later");
        }
        let name = entry::split(path).1;
        let parent = self.parent(path)?;
        match linkat(&node, c"", parent, name, AtFlags::AT_EMPTY_PATH) {
            Ok(()) => Ok(()),
            // The filesystems differ in how many names an inode may have; overlayfs shares one whiteout among many, and
            // whiteouts are all alike.
            Err(Errno::EMLINK) => {
                let stat = fstat(&node)?;
                ensure!(
                    stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == 0,
                    "the destination's filesystem allows no more hard links to \"{}\"",
                    target.escape_ascii()
                );
                let mode = Mode::from_bits_truncate(stat.st_mode);
                mknodat(parent, name, SFlag::S_IFCHR, mode, 0).context("creating a whiteout")
            }
            Err(e) => Err(e).with_context(|| format!("linking to \"{}\"", target.escape_ascii())),
        }
    }

    /// The open directory that `path` goes into.
    fn parent(&self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        let (parent, _) = entry::split(path);
        let top = self.directories.last().filter(|d| d.path == parent);
        let Some(top) = top else { bail!("its directory was not sent before it") };
        Ok(top.fd.as_fd())
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

impl File {
    fn new(path: &[u8], fd: OwnedFd, size: u64, meta: &Meta, patch: bool) -> File {
        File { path: path.to_vec(), fd, meta: meta.clone(), size, next: 0, written: 0, patch }
    }

    /// Checks that a range is inside of the file and after what came before; returns its end.
    fn range(&self, offset: u64, len: u64) -> Result<u64> {
        let shown = self.path.escape_ascii();
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let Some(end) = end else {
            bail!("\"{shown}\": {len} bytes at {offset} in a file of {} bytes", self.size);
        };
        ensure!(offset >= self.next, "\"{shown}\": data at {offset} comes after data up to {}", self.next);
        Ok(end)
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

/// Is `path` strictly below directory `dir`?
fn is_below(path: &[u8], dir: &[u8]) -> bool {
    dir.is_empty() && !path.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
}

/// Makes a directory that is there ready to be filled: through a mount this copies it up from the image.
fn prepare(fd: BorrowedFd<'_>) -> Result<()> {
    sys::clear_protection(fd)?;
    fchmod(fd, Mode::S_IRWXU)?;
    let inode = Inode::Open(fd);
    for name in inode.xattr_names()? {
        // Children would inherit it.
        if name.to_bytes() == b"system.posix_acl_default" {
            inode.remove_xattr(&name)?;
        }
    }
    Ok(())
}

fn open_root(dir: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(dir, flags, Mode::empty())
}
