//! A directory that belongs to a container, as other rooms may look at it: nothing here follows a symbolic link or passes a mount point.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::fcntl::OFlag;

use super::sys;

/// An open directory and its names.
pub struct Directory {
    dir: Dir,
    names: Vec<CString>,
}

impl Directory {
    /// Reads the directory that an `O_PATH` descriptor stands for.
    pub fn read(node: OwnedFd) -> io::Result<Directory> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOATIME;
        let (dir, names) = sys::read_dir(sys::open_beneath(node.as_fd(), b".", flags)?)?;
        Ok(Directory { dir, names })
    }

    /// In byte order.
    pub fn names(&self) -> impl Iterator<Item = &CStr> {
        self.names.iter().map(CString::as_c_str)
    }

    /// What the name stands for, as an `O_PATH` descriptor.
    ///
    /// # Errors
    /// EXDEV: something is mounted there.
    pub fn open(&self, name: &CStr) -> io::Result<OwnedFd> {
        sys::open_beneath(self.dir.as_fd(), name.to_bytes(), OFlag::O_PATH | OFlag::O_NOFOLLOW)
    }
}

/// Opens the regular file that an `O_PATH` descriptor stands for, for reading, without a trace in its times.
pub fn reopen(node: BorrowedFd<'_>) -> io::Result<File> {
    // O_NONBLOCK: a lease that a frozen task holds must end in an error, not in a wait
    let flags = OFlag::O_RDONLY | OFlag::O_NOATIME | OFlag::O_NONBLOCK;
    Ok(sys::reopen(node, flags)?.into())
}

/// Makes a range of a file a hole.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    sys::punch(file.as_fd(), offset, len)
}
