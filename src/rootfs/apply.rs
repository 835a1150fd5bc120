//! A [`Sink`] that writes a layer's directory. The stream comes from a peer and is not trusted: no name is followed that
//! the stream has not created, and every one is a single component below a directory that is held open.
//!
//! The order within an inode: data, owner (which clears setuid and capabilities), attributes, mode, times. A directory
//! gets its own when the stream leaves it: until then it is root's, mode 0700, without a default ACL that its children
//! would inherit, and its times would change with every child. Flags that forbid changes come at the very end.

use std::cmp::Ordering;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{
    Mode, SFlag, UtimensatFlags, fchmod, fstat, futimens, makedev, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat, ftruncate, linkat, symlinkat};

use super::entry::{self, Entry, Kind, MAX_DEPTH, Meta, PROTECTED, Time, Totals};
use super::layer::WritableLayer;
use super::sys::{self, Inode};
use super::xattr::{OverlayXattrs, is_leftover};
use super::{Sink, Stats};

/// Writes a stream of entries into a directory. Dropped before [`Apply::finish`], it leaves what it has written; no flag
/// that would stand in the way of removing it is set by then.
pub struct Apply {
    overlay: OverlayXattrs,
    /// Open directories from the root down to the one being filled. Empty before the root's entry.
    directories: Vec<Directory>,
    root: OwnedFd,
    last: Option<Vec<u8>>,
    file: Option<File>,
    /// Inodes that get [`PROTECTED`] flags at the end.
    protected: Vec<(Vec<u8>, u32)>,
    stats: Stats,
    end: Option<Totals>,
}

struct Directory {
    path: Vec<u8>,
    fd: OwnedFd,
    meta: Meta,
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
}

impl Apply {
    /// For the upper directory of a usual overlay mount, which must be empty. Its own attributes are replaced.
    ///
    /// # Errors
    /// Not a directory, or not empty.
    pub fn new(dir: &Path) -> Result<Self> {
        let apply = Self::open(dir, OverlayXattrs::Trusted)?;
        let listing = sys::open_beneath(apply.root.as_fd(), b".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
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
        sys::empty(apply.root.as_fd(), MAX_DEPTH * 2)
            .with_context(|| format!("emptying the writable layer {}", layer.dir.display()))?;
        Ok(apply)
    }

    fn open(dir: &Path, overlay: OverlayXattrs) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(dir, flags, Mode::empty())
            .with_context(|| format!("opening the writable layer {}", dir.display()))?;
        Ok(Apply {
            overlay,
            directories: Vec::new(),
            root,
            last: None,
            file: None,
            protected: Vec::new(),
            stats: Stats::default(),
            end: None,
        })
    }

    /// Completes what is still open and checks the totals.
    ///
    /// # Errors
    /// The stream was cut short or its totals differ; the last attributes cannot be set.
    pub fn finish(mut self) -> Result<Stats> {
        let Some(end) = self.end else {
            bail!("the writable layer was cut short after {} entries", self.stats.entries);
        };
        self.close_file()?;
        self.leave_until(None)?;
        ensure!(
            (end.entries, end.bytes) == (self.stats.entries, self.stats.bytes_data),
            "the writable layer arrived with {} entries and {} bytes of data; {} and {} were announced",
            self.stats.entries,
            self.stats.bytes_data,
            end.entries,
            end.bytes
        );
        for (path, flags) in std::mem::take(&mut self.protected) {
            self.protect(&path, flags).with_context(|| format!("\"{}\"", path.escape_ascii()))?;
        }
        Ok(self.stats)
    }

    fn protect(&self, path: &[u8], flags: u32) -> Result<()> {
        let path = if path.is_empty() { b"." } else { path };
        let node = sys::open_beneath(self.root.as_fd(), path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        // Reading does not change the access time here: nothing is read.
        let fd = sys::reopen(node.as_fd(), OFlag::O_RDONLY)?;
        let flags = flags | sys::flags(fd.as_fd())?;
        sys::set_flags(fd.as_fd(), flags).with_context(|| format!("setting inode flags {flags:#x}"))
    }

    /// Finishes the directories that are not on the way to `path`; all of them for none.
    fn leave_until(&mut self, path: Option<&[u8]>) -> Result<()> {
        while let Some(top) = self.directories.last() {
            if path.is_some_and(|path| is_below(path, &top.path)) {
                break;
            }
            let Directory { path, fd, meta } = self.directories.pop().expect("there is a last one");
            self.complete(fd.as_fd(), &path, &meta).with_context(|| {
                format!("setting the attributes of directory \"{}\"", path.escape_ascii())
            })?;
        }
        Ok(())
    }

    fn close_file(&mut self) -> Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        self.stats.bytes_holes += file.size - file.written;
        self.complete(file.fd.as_fd(), &file.path, &file.meta)
            .with_context(|| format!("setting the attributes of \"{}\"", file.path.escape_ascii()))
    }

    /// Owner, attributes, mode, flags and times of an open file or directory.
    fn complete(&mut self, fd: BorrowedFd<'_>, path: &[u8], meta: &Meta) -> Result<()> {
        fchown(fd, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid))).context("owner")?;
        set_xattrs(&Inode::Open(fd), meta)?;
        fchmod(fd, Mode::from_bits_truncate(meta.mode)).context("mode")?;
        let plain = meta.flags & !PROTECTED;
        if plain != 0 {
            // Some filesystems lack some of these; none of them changes what a program reads.
            let now = sys::flags(fd)?;
            if sys::set_flags(fd, now | plain).is_err() {
                self.stats.flags_dropped += 1;
            }
        }
        let protected = meta.flags & PROTECTED;
        if protected != 0 {
            self.protected.push((path.to_vec(), protected));
        }
        futimens(fd, &timespec(meta.atime), &timespec(meta.mtime)).context("times")
    }

    fn node(&mut self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        if path.is_empty() {
            return self.root_entry(meta);
        }
        let name = entry::split(path).1;
        let parent = self.parent(path)?;
        match kind {
            Kind::Directory => {
                mkdirat(parent, name, Mode::S_IRWXU).context("creating the directory")?;
                let fd = sys::open_beneath(parent, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
                self.directories.push(Directory { path: path.to_vec(), fd, meta: meta.clone() });
            }
            Kind::File { size } => {
                let fd = sys::create_file(parent, name).context("creating the file")?;
                ftruncate(&fd, *size as libc::off_t)
                    .with_context(|| format!("making a file of {size} bytes"))?;
                self.file = Some(File {
                    path: path.to_vec(),
                    fd,
                    meta: meta.clone(),
                    size: *size,
                    next: 0,
                    written: 0,
                });
            }
            Kind::Symlink { target } => {
                symlinkat(target.as_slice(), parent, name).context("creating the symlink")?;
                complete_by_name(parent, name, meta, false)?;
            }
            Kind::Fifo => make(parent, name, SFlag::S_IFIFO, 0, meta)?,
            Kind::Socket => make(parent, name, SFlag::S_IFSOCK, 0, meta)?,
            Kind::Whiteout => make(parent, name, SFlag::S_IFCHR, 0, meta)?,
            Kind::CharDevice { major, minor } => {
                make(parent, name, SFlag::S_IFCHR, makedev((*major).into(), (*minor).into()), meta)?;
            }
            Kind::BlockDevice { major, minor } => {
                make(parent, name, SFlag::S_IFBLK, makedev((*major).into(), (*minor).into()), meta)?;
            }
        }
        Ok(())
    }

    fn root_entry(&mut self, meta: &Meta) -> Result<()> {
        let inode = Inode::Open(self.root.as_fd());
        for name in inode.xattr_names()? {
            if is_leftover(name.to_bytes(), self.overlay) {
                inode.remove_xattr(&name).with_context(|| format!("removing {name:?}"))?;
            }
        }
        let fd = self.root.try_clone()?;
        self.directories.push(Directory { path: Vec::new(), fd, meta: meta.clone() });
        Ok(())
    }

    fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let name = entry::split(path).1;
        let parent = self.parent(path)?;
        // Everything below the root was made by this stream, and openat2 takes no symlink on the way.
        let node = sys::open_beneath(self.root.as_fd(), target, OFlag::O_PATH | OFlag::O_NOFOLLOW)
            .with_context(|| format!("opening \"{}\" to link to it", target.escape_ascii()))?;
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
        let Some(path) = entry.path() else {
            if let Entry::End(totals) = entry {
                ensure!(self.last.is_some(), "the end without the root's entry");
                self.end = Some(*totals);
            }
            return Ok(());
        };
        match &self.last {
            None => ensure!(path.is_empty(), "the root's entry is not the first"),
            Some(last) => match entry::order(last, path) {
                Ordering::Less => {}
                Ordering::Equal => bail!("sent twice"),
                Ordering::Greater => bail!("out of order: sent after \"{}\"", last.escape_ascii()),
            },
        }
        self.close_file()?;
        self.leave_until(Some(path))?;
        match entry {
            Entry::Node { path, kind, meta } => self.node(path, kind, meta)?,
            Entry::Link { path, target } => self.link(path, target)?,
            Entry::End(_) => unreachable!("it has no path"),
        }
        self.last = Some(path.to_vec());
        self.stats.count(entry);
        Ok(())
    }
}

impl Sink for Apply {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.accept(entry).with_context(|| match entry.path() {
            Some(path) => format!("applying the layer entry \"{}\"", path.escape_ascii()),
            None => "applying the end of the layer".into(),
        })
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(file) = &mut self.file else { bail!("layer data that belongs to no file") };
        ensure!(self.end.is_none(), "layer data after the end mark");
        let shown = file.path.escape_ascii();
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= file.size);
        let Some(end) = end else {
            bail!("\"{shown}\": {} bytes at {offset} in a file of {} bytes", bytes.len(), file.size);
        };
        ensure!(offset >= file.next, "\"{shown}\": data at {offset} comes after data up to {}", file.next);
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

fn make(parent: BorrowedFd<'_>, name: &[u8], kind: SFlag, device: libc::dev_t, meta: &Meta) -> Result<()> {
    mknodat(parent, name, kind, Mode::S_IRUSR | Mode::S_IWUSR, device).context("creating the node")?;
    complete_by_name(parent, name, meta, true)
}

/// Attributes of what cannot be opened. The name was created just now, in a directory that only we know.
fn complete_by_name(parent: BorrowedFd<'_>, name: &[u8], meta: &Meta, has_mode: bool) -> Result<()> {
    ensure!(meta.flags == 0, "inode flags on something that cannot have any");
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).context("owner")?;
    if has_mode || !meta.xattrs.is_empty() {
        let node = sys::open_beneath(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        let inode = Inode::of_path_fd(node.as_fd());
        set_xattrs(&inode, meta)?;
        if has_mode {
            // fchmod does not take an O_PATH descriptor; its path in /proc leads to the inode itself.
            let Inode::Path(path, _) = &inode else { bail!("not a path") };
            let mode = Mode::from_bits_truncate(meta.mode);
            nix::sys::stat::fchmodat(
                AT_FDCWD,
                path.as_c_str(),
                mode,
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )
            .context("mode")?;
        }
    }
    utimensat(parent, name, &timespec(meta.atime), &timespec(meta.mtime), UtimensatFlags::NoFollowSymlink)
        .context("times")
}

fn set_xattrs(inode: &Inode<'_>, meta: &Meta) -> Result<()> {
    for x in &meta.xattrs {
        let name = CString::new(x.name.as_slice())?;
        inode.set_xattr(&name, &x.value).with_context(|| format!("extended attribute {name:?}"))?;
    }
    Ok(())
}

fn timespec(time: Time) -> TimeSpec {
    TimeSpec::new(time.secs, time.nanos.into())
}
