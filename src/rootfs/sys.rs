//! The system calls of this room, thin: descriptors in, errors out. What to do with them is decided elsewhere.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::Mode;

use super::entry::MAX_XATTR_VALUE;

/// Opens a path below `dir` that passes no symbolic link, no mount point and never leaves `dir`. With `O_PATH` and
/// `O_NOFOLLOW` the last name may be a symbolic link, which is then what is opened.
///
/// ELOOP: a symbolic link on the way; EXDEV: a mount point.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> io::Result<OwnedFd> {
    open_how(dir, path, flags, Mode::empty())
}

/// Creates a file that did not exist, mode 0600, for writing.
pub fn create_file(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
    open_how(dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
}

fn open_how(dir: BorrowedFd<'_>, path: &[u8], flags: OFlag, mode: Mode) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).mode(mode).resolve(resolve);
    Ok(nix::fcntl::openat2(dir, path, how)?)
}

/// Opens what an `O_PATH` descriptor stands for, which cannot have become something else since it was looked at.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(proc_path(fd).as_c_str(), flags | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// The names of a directory in byte order, without `.` and `..`, and the descriptor that they are relative to.
pub fn read_dir(fd: OwnedFd) -> io::Result<(Dir, Vec<CString>)> {
    let mut dir = Dir::from_fd(fd)?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok((dir, names))
}

fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("no NUL in a number")
}

/// An inode whose attributes are read or written: by its descriptor, or, where that is an `O_PATH` one (symbolic links,
/// devices, sockets: they cannot or must not be opened), through /proc, which leads to this very inode.
pub enum Inode<'a> {
    /// A descriptor open for reading or writing.
    Open(BorrowedFd<'a>),
    /// The path in /proc of an `O_PATH` descriptor.
    Path(CString, std::marker::PhantomData<BorrowedFd<'a>>),
}

impl<'a> Inode<'a> {
    /// For an `O_PATH` descriptor.
    pub fn of_path_fd(fd: BorrowedFd<'a>) -> Self {
        Inode::Path(proc_path(fd), std::marker::PhantomData)
    }

    /// The names of the extended attributes, in byte order.
    pub fn xattr_names(&self) -> io::Result<Vec<CString>> {
        let mut small = [0u8; 512];
        let len = match self.list(&mut small) {
            Ok(len) => return Ok(split_names(&small[..len])),
            Err(Errno::ERANGE) => self.list(&mut []).map_err(io::Error::from)?,
            // A filesystem without extended attributes has none.
            Err(Errno::EOPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        };
        // Names may be added meanwhile to a running container's file; the kernel's limit is always enough.
        let mut large = vec![0u8; len.max(64 << 10)];
        let len = self.list(&mut large).map_err(io::Error::from)?;
        Ok(split_names(&large[..len]))
    }

    fn list(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        let (ptr, len) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: the buffer is valid for `len` bytes, the descriptor or path is alive.
        let n = unsafe {
            match self {
                Inode::Open(fd) => libc::flistxattr(fd.as_raw_fd(), ptr, len),
                Inode::Path(path, _) => libc::listxattr(path.as_ptr(), ptr, len),
            }
        };
        Errno::result(n).map(|n| n as usize)
    }

    /// The value of an attribute; none when it is not (or no longer) there.
    pub fn xattr(&self, name: &CStr) -> io::Result<Option<Vec<u8>>> {
        let mut small = [0u8; 256];
        match self.get(name, &mut small) {
            Ok(len) => return Ok(Some(small[..len].to_vec())),
            Err(Errno::ENODATA) => return Ok(None),
            Err(Errno::ERANGE) => {}
            Err(e) => return Err(e.into()),
        }
        let mut large = vec![0u8; MAX_XATTR_VALUE];
        match self.get(name, &mut large) {
            Ok(len) => {
                large.truncate(len);
                Ok(Some(large))
            }
            Err(Errno::ENODATA) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn get(&self, name: &CStr, buffer: &mut [u8]) -> nix::Result<usize> {
        let (ptr, len) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: the buffer is valid for `len` bytes, name and path end with a NUL, the descriptor is alive.
        let n = unsafe {
            match self {
                Inode::Open(fd) => libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), ptr, len),
                Inode::Path(path, _) => libc::getxattr(path.as_ptr(), name.as_ptr(), ptr, len),
            }
        };
        Errno::result(n).map(|n| n as usize)
    }

    /// Sets an attribute, whether it exists or not.
    pub fn set_xattr(&self, name: &CStr, value: &[u8]) -> io::Result<()> {
        let (ptr, len) = (value.as_ptr().cast(), value.len());
        // SAFETY: the value is valid for `len` bytes, name and path end with a NUL, the descriptor is alive.
        let n = unsafe {
            match self {
                Inode::Open(fd) => libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), ptr, len, 0),
                Inode::Path(path, _) => libc::setxattr(path.as_ptr(), name.as_ptr(), ptr, len, 0),
            }
        };
        Ok(Errno::result(n).map(drop)?)
    }

    /// Removes an attribute.
    pub fn remove_xattr(&self, name: &CStr) -> io::Result<()> {
        // SAFETY: name and path end with a NUL, the descriptor is alive.
        let n = unsafe {
            match self {
                Inode::Open(fd) => libc::fremovexattr(fd.as_raw_fd(), name.as_ptr()),
                Inode::Path(path, _) => libc::removexattr(path.as_ptr(), name.as_ptr()),
            }
        };
        Ok(Errno::result(n).map(drop)?)
    }
}

fn split_names(list: &[u8]) -> Vec<CString> {
    let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
    let mut names: Vec<CString> = names.map(|n| CString::new(n).expect("split at NUL")).collect();
    names.sort_unstable();
    names
}

// Both are declared with a long and move an int (ioctl_iflags(2)).
const FS_IOC_GETFLAGS: libc::c_ulong =
    nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()) as libc::c_ulong;
const FS_IOC_SETFLAGS: libc::c_ulong =
    nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()) as libc::c_ulong;

/// Inode flags of an open file or directory; 0 on a filesystem without them.
pub fn flags(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int into the long, which is zero in the rest.
    let n = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFLAGS as _, &mut flags) };
    match Errno::result(n) {
        Ok(_) => Ok(flags as u32),
        Err(Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// Sets the inode flags of an open file or directory.
pub fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let flags = libc::c_long::from(flags);
    // SAFETY: the kernel reads an int from the long.
    let n = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_SETFLAGS as _, &flags) };
    Ok(Errno::result(n).map(drop)?)
}

/// The next range of data at or after `from`, not looking beyond `size`; none when only a hole is left.
pub fn next_data(fd: BorrowedFd<'_>, from: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= size {
        return Ok(None);
    }
    let start = match seek(fd, from, libc::SEEK_DATA) {
        Ok(at) => at,
        Err(Errno::ENXIO) => return Ok(None),
        // A filesystem that cannot tell: everything is data.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some((from, size))),
        Err(e) => return Err(e.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = match seek(fd, start, libc::SEEK_HOLE) {
        Ok(at) => at.min(size),
        // The file became shorter between the two calls.
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok((end > start).then_some((start, end)))
}

fn seek(fd: BorrowedFd<'_>, from: u64, whence: libc::c_int) -> nix::Result<u64> {
    // SAFETY: no memory is involved.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), from as libc::off_t, whence) };
    Errno::result(at).map(|at| at as u64)
}

/// Empties a directory that belongs to us: everything below it is removed, flags that forbid it included. Stops at
/// mount points (EXDEV).
pub fn empty(dir: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    use nix::unistd::{UnlinkatFlags, unlinkat};
    let listing = open_beneath(dir, b".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    clear_protection(listing.as_fd())?;
    let (listing, names) = read_dir(listing)?;
    for name in names {
        let here = listing.as_fd();
        match unlinkat(here, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => continue,
            Err(Errno::EISDIR) => {}
            Err(Errno::EPERM) => {
                let node = open_beneath(here, name.to_bytes(), OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
                let kind = nix::sys::stat::fstat(&node)?.st_mode & libc::S_IFMT;
                if kind != libc::S_IFDIR {
                    // Only regular files can carry the flags (a device cannot be asked without opening it).
                    if kind == libc::S_IFREG {
                        clear_protection(reopen(node.as_fd(), OFlag::O_RDONLY)?.as_fd())?;
                    }
                    unlinkat(here, name.as_c_str(), UnlinkatFlags::NoRemoveDir)?;
                    continue;
                }
            }
            Err(e) => return Err(e.into()),
        }
        if depth == 0 {
            return Err(io::Error::other("directories nested too deeply"));
        }
        let child = open_beneath(here, name.to_bytes(), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        empty(child.as_fd(), depth - 1)?;
        unlinkat(here, name.as_c_str(), UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

/// Removes a name and, if it is a directory, all that is below; false if there was none. As [`empty`].
pub fn remove(parent: BorrowedFd<'_>, name: &[u8], depth: usize) -> io::Result<bool> {
    use nix::unistd::{UnlinkatFlags, unlinkat};
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) => return Ok(true),
        Err(Errno::ENOENT) => return Ok(false),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(e) => return Err(e.into()),
    }
    let node = open_beneath(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
    match nix::sys::stat::fstat(&node)?.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            empty(node.as_fd(), depth)?;
            unlinkat(parent, name, UnlinkatFlags::RemoveDir)?;
        }
        libc::S_IFREG => {
            clear_protection(reopen(node.as_fd(), OFlag::O_RDONLY)?.as_fd())?;
            unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
        }
        _ => return Err(Errno::EPERM.into()),
    }
    Ok(true)
}

/// Makes a range of a file a hole; zeros are written where the filesystem has none.
pub fn punch(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(fd, flags, offset as libc::off_t, len as libc::off_t) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP) => {
            let zeros = [0u8; 64 << 10];
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let n = zeros.len().min((end - at) as usize);
                at += nix::sys::uio::pwrite(fd, &zeros[..n], at as libc::off_t)? as u64;
            }
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Takes the flags away that forbid changes.
pub fn clear_protection(fd: BorrowedFd<'_>) -> io::Result<()> {
    let now = flags(fd)?;
    if now & super::entry::PROTECTED != 0 {
        set_flags(fd, now & !super::entry::PROTECTED)?;
    }
    Ok(())
}
