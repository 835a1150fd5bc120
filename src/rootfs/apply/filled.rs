//! What is being filled, the open file and the open directories, until each has its own attributes; and what forbids
//! changes, which comes at the very end.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::OFlag;

use super::attributes::{self, Exact};
use super::{Apply, merged};
use crate::rootfs::entry::{self, Meta, PROTECTED, Xattr};
use crate::rootfs::sys::{self, Inode};
use crate::rootfs::xattr::OverlayXattrs;

/// What forbids changes of an inode.
pub(super) struct Protected {
    flags: u32,
    /// overlayfs keeps such flags of its own in an attribute: this one, if the mount is taken away before the end.
    mark: Option<Xattr>,
}

pub(super) struct Directory {
    pub(super) path: Vec<u8>,
    pub(super) fd: OwnedFd,
    pub(super) meta: Meta,
    /// It was there before this round.
    pub(super) reused: bool,
}

/// The regular file that data goes to.
pub(super) struct File {
    pub(super) path: Vec<u8>,
    pub(super) fd: OwnedFd,
    pub(super) meta: Meta,
    pub(super) size: u64,
    /// Where the next data may begin.
    pub(super) next: u64,
    pub(super) written: u64,
    pub(super) patch: bool,
}

impl File {
    pub(super) fn new(path: &[u8], fd: OwnedFd, size: u64, meta: &Meta, patch: bool) -> File {
        File { path: path.to_vec(), fd, meta: meta.clone(), size, next: 0, written: 0, patch }
    }

    /// Checks that a range is inside of the file and after what came before; returns its end.
    pub(super) fn range(&self, offset: u64, len: u64) -> Result<u64> {
        let shown = self.path.escape_ascii();
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let Some(end) = end else {
            bail!("\"{shown}\": {len} bytes at {offset} in a file of {} bytes", self.size);
        };
        ensure!(offset >= self.next, "\"{shown}\": data at {offset} comes after data up to {}", self.next);
        Ok(end)
    }
}

impl Apply {
    pub(super) fn protect(&self, path: &[u8], protected: &Protected) -> Result<()> {
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
    pub(super) fn leave_until(&mut self, path: Option<&[u8]>) -> Result<()> {
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

    pub(super) fn close_file(&mut self) -> Result<()> {
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

    pub(super) fn hole(&mut self, offset: u64, len: u64) -> Result<()> {
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
}

/// Is `path` strictly below directory `dir`?
pub(super) fn is_below(path: &[u8], dir: &[u8]) -> bool {
    dir.is_empty() && !path.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
}
