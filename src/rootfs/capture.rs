//! A layer's directory read into a [`Sink`], by descriptors only: what is looked at is what is sent, even if the tasks
//! run meanwhile and rename things away (a checkpoint of a live container; in a migration they are frozen).

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use super::entry::{Entry, FLAGS, Kind, MAX_DEPTH, MAX_PATH, MAX_XATTR_VALUE, Meta, Time, Totals, Xattr};
use super::layer::WritableLayer;
use super::sys::{self, Inode};
use super::xattr::{OverlayXattrs, Verdict, judge};
use super::{Sink, Stats};

/// How to read a layer.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Where overlayfs keeps its marks.
    pub overlay: OverlayXattrs,
    /// Bytes of data handed to the sink at once.
    pub chunk: usize,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        CaptureOptions { overlay: OverlayXattrs::default(), chunk: 1 << 20 }
    }
}

impl CaptureOptions {
    /// Those that fit the layer.
    pub fn for_layer(layer: &WritableLayer) -> Self {
        CaptureOptions { overlay: layer.kind.overlay_xattrs(), ..Self::default() }
    }
}

/// Sends everything below `upper`, and its own attributes, to `sink`; the end mark included.
///
/// The source is not changed; not even its access times are, but for those of symlinks (there is no `O_NOATIME` for
/// readlink).
///
/// # Errors
/// Reading fails; the sink fails; a file is an overlayfs `metacopy`, or another mark says that the layer is not complete
/// by itself; a mount point inside; names nested deeper than [`MAX_DEPTH`].
pub fn capture(upper: &Path, options: &CaptureOptions, sink: &mut dyn Sink) -> Result<Stats> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(upper, flags, nix::sys::stat::Mode::empty())
        .with_context(|| format!("opening the writable layer {}", upper.display()))?;
    let buffer = vec![0; options.chunk.clamp(4 << 10, 64 << 20)];
    let mut walk =
        Walk { sink, overlay: options.overlay, buffer, links: HashMap::new(), stats: Stats::default() };
    walk.tree(root).with_context(|| format!("capturing the writable layer {}", upper.display()))?;
    Ok(walk.stats)
}

struct Walk<'a> {
    sink: &'a mut dyn Sink,
    overlay: OverlayXattrs,
    buffer: Vec<u8>,
    /// First names of inodes with several, and how many of them are still to be seen.
    links: HashMap<(u64, u64), (Vec<u8>, u64)>,
    stats: Stats,
}

/// A directory whose content is being sent.
struct Frame {
    dir: Dir,
    names: std::vec::IntoIter<CString>,
    path: Vec<u8>,
}

impl Walk<'_> {
    fn tree(&mut self, root: OwnedFd) -> Result<()> {
        let mut frames = vec![self.directory(root.as_fd(), Vec::new())?];
        loop {
            let depth = frames.len();
            let Some(frame) = frames.last_mut() else { break };
            let Some(name) = frame.names.next() else {
                frames.pop();
                continue;
            };
            ensure!(depth <= MAX_DEPTH, "names nested deeper than {MAX_DEPTH} levels");
            let mut path = frame.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            ensure!(path.len() <= MAX_PATH, "a path of more than {MAX_PATH} bytes");
            let below = self
                .node(frame.dir.as_fd(), name.to_bytes(), &path)
                .with_context(|| format!("\"{}\"", path.escape_ascii()))?;
            if let Some(node) = below {
                let frame = self.directory(node.as_fd(), path.clone());
                frames.push(frame.with_context(|| format!("\"{}\"", path.escape_ascii()))?);
            }
        }
        let totals = Totals { entries: self.stats.entries, bytes: self.stats.bytes_data };
        self.sink.entry(&Entry::End(totals))
    }

    /// Sends a directory's entry and lists it.
    fn directory(&mut self, node: BorrowedFd<'_>, path: Vec<u8>) -> Result<Frame> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOATIME;
        let fd = sys::open_beneath(node, b".", flags).context("opening the directory")?;
        let stat = fstat(&fd)?;
        let mut meta = self.meta(&stat, &Inode::Open(fd.as_fd()))?;
        meta.flags = sys::flags(fd.as_fd()).context("reading inode flags")? & FLAGS;
        self.send(Entry::Node { path: path.clone(), kind: Kind::Directory, meta })?;
        let (dir, names) = sys::read_dir(fd).context("reading the directory")?;
        Ok(Frame { dir, names: names.into_iter(), path })
    }

    /// Sends the entry of anything but a directory, whose descriptor is handed back instead.
    fn node(&mut self, dir: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<Option<OwnedFd>> {
        // O_PATH first: opening a device or FIFO can block or have effects, and the name may change its meaning between
        // a look and an open.
        let node = match sys::open_beneath(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                self.stats.changed += 1;
                return Ok(None);
            }
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                bail!("a mount point inside the writable layer")
            }
            Err(e) => return Err(e).context("opening"),
        };
        let stat = fstat(&node)?;
        let kind = match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => return Ok(Some(node)),
            _ if self.is_link(&stat, path)? => return Ok(None),
            libc::S_IFREG => {
                self.file(node.as_fd(), path)?;
                return Ok(None);
            }
            libc::S_IFLNK => {
                // Relative to the link itself (readlinkat(2), empty path): no name is looked up again.
                let target = nix::fcntl::readlinkat(&node, c"").context("reading the symlink")?;
                Kind::Symlink { target: std::os::unix::ffi::OsStringExt::into_vec(target) }
            }
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR if stat.st_rdev == 0 => Kind::Whiteout,
            libc::S_IFCHR => {
                Kind::CharDevice { major: libc::major(stat.st_rdev), minor: libc::minor(stat.st_rdev) }
            }
            libc::S_IFBLK => {
                Kind::BlockDevice { major: libc::major(stat.st_rdev), minor: libc::minor(stat.st_rdev) }
            }
            other => bail!("unknown file type {other:o}"),
        };
        let meta = self.meta(&stat, &Inode::of_path_fd(node.as_fd()))?;
        self.send(Entry::Node { path: path.to_vec(), kind, meta })?;
        Ok(None)
    }

    /// Sends a hard link if the inode was sent under another name before; otherwise remembers this one.
    fn is_link(&mut self, stat: &FileStat, path: &[u8]) -> Result<bool> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let key = (stat.st_dev, stat.st_ino);
        let Some((target, left)) = self.links.get_mut(&key) else {
            self.links.insert(key, (path.to_vec(), stat.st_nlink - 1));
            return Ok(false);
        };
        let target = target.clone();
        // Names outside of the layer are never seen (overlayfs keeps one of its whiteouts in the work directory).
        *left -= 1;
        if *left == 0 {
            self.links.remove(&key);
        }
        self.send(Entry::Link { path: path.to_vec(), target })?;
        Ok(true)
    }

    fn file(&mut self, node: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
        // O_NONBLOCK: a lease that a frozen task holds must end in an error, not in a wait.
        let fd =
            sys::reopen(node, OFlag::O_RDONLY | OFlag::O_NOATIME | OFlag::O_NONBLOCK).context("opening")?;
        let stat = fstat(&fd)?;
        let mut meta = self.meta(&stat, &Inode::Open(fd.as_fd()))?;
        meta.flags = sys::flags(fd.as_fd()).context("reading inode flags")? & FLAGS;
        let size = stat.st_size as u64;
        self.send(Entry::Node { path: path.to_vec(), kind: Kind::File { size }, meta })?;
        let sent = self.content(fd.as_fd(), size)?;
        self.stats.bytes_data += sent;
        self.stats.bytes_holes += size - sent;
        let after = fstat(&fd)?;
        let stamp = |s: &FileStat| (s.st_size, s.st_mtime, s.st_mtime_nsec);
        self.stats.changed += u64::from(stamp(&stat) != stamp(&after));
        Ok(())
    }

    /// Sends the ranges of data within the announced size, which a growing file does not exceed and a shrinking one
    /// does not fill.
    fn content(&mut self, fd: BorrowedFd<'_>, size: u64) -> Result<u64> {
        let (mut at, mut sent) = (0, 0);
        while let Some((start, end)) = sys::next_data(fd, at, size).context("looking for holes")? {
            at = start;
            while at < end {
                let want = self.buffer.len().min((end - at) as usize);
                let n = match nix::sys::uio::pread(fd, &mut self.buffer[..want], at as libc::off_t) {
                    Ok(0) => return Ok(sent),
                    Ok(n) => n,
                    Err(Errno::EINTR) => continue,
                    Err(e) => return Err(e).with_context(|| format!("reading {want} bytes at {at}")),
                };
                self.sink.data(at, &self.buffer[..n])?;
                at += n as u64;
                sent += n as u64;
            }
        }
        Ok(sent)
    }

    /// Everything but the flags, which need an open descriptor.
    fn meta(&mut self, stat: &FileStat, inode: &Inode<'_>) -> Result<Meta> {
        let mut xattrs = Vec::new();
        for name in inode.xattr_names().context("listing extended attributes")? {
            let shown = name.to_bytes().escape_ascii();
            match judge(name.to_bytes(), self.overlay) {
                Verdict::Drop => {
                    self.stats.xattrs_dropped += 1;
                    continue;
                }
                Verdict::Refuse(why) => bail!("cannot be moved, extended attribute {shown}: {why}"),
                Verdict::Keep => {}
            }
            let value = inode.xattr(&name).with_context(|| format!("reading extended attribute {shown}"))?;
            let Some(value) = value else { continue };
            debug_assert!(value.len() <= MAX_XATTR_VALUE);
            xattrs.push(Xattr { name: name.into_bytes(), value });
        }
        Ok(Meta {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            atime: time(stat.st_atime, stat.st_atime_nsec),
            flags: 0,
            xattrs,
        })
    }

    fn send(&mut self, entry: Entry) -> Result<()> {
        self.stats.count(&entry);
        self.sink.entry(&entry)
    }
}

fn time(secs: i64, nanos: i64) -> Time {
    Time { secs, nanos: nanos as u32 }
}
