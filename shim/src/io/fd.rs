//! Descriptors: pipes, FIFOs, opening a pipe a second time, looking into a pipe without reading it. No policy.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{Gid, Uid, fchown, pipe2},
};

/// Most bytes that are looked at in one pipe: what a migration carries per stream. Larger pipes need a privileged `F_SETPIPE_SZ`.
pub const PEEK_LIMIT: usize = 1 << 20;

/// A pipe `(read end, write end)`, close-on-exec, owned by `owner` so that a container that runs as another user can reopen
/// `/dev/stdout`.
pub fn pipe(owner: Option<(u32, u32)>) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    if let Some((uid, gid)) = owner {
        fchown(&read, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .with_context(|| format!("giving a pipe to {uid}:{gid}"))?;
    }
    Ok((read, write))
}

/// Makes reads and writes through this open file description return `EAGAIN` instead of blocking. Only for descriptions that
/// no container shares.
pub fn set_nonblocking(fd: &impl AsFd) -> Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).context("F_GETFL")?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).context("F_SETFL")?;
    Ok(())
}

/// Opens the pipe behind `fd` again, non-blocking, for reading or for writing: a new open file description, so that its flags
/// are not the container's.
pub fn reopen(fd: &impl AsFd, write: bool) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let file = OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .with_context(|| format!("opening a pipe again through {path}"))?;
    Ok(file.into())
}

/// Opens a path non-blocking. With `read` and `write` both set a FIFO opens at once, whoever is at the other end.
pub fn open(path: &Path, read: bool, write: bool) -> io::Result<File> {
    OpenOptions::new().read(read).write(write).custom_flags(libc::O_NONBLOCK).open(path)
}

/// `read(2)`, repeated when a signal interrupts it.
pub fn read(fd: &impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => return other.map_err(io::Error::from),
        }
    }
}

/// `write(2)`, repeated when a signal interrupts it.
pub fn write(fd: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::write(fd, bytes) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Bytes that a read would return now (`FIONREAD`).
pub fn queued(fd: &impl AsFd) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int through the pointer, which is valid for the call.
    let rc = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &mut n) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(n.max(0) as usize) }
}

/// Capacity of a pipe in bytes.
pub fn capacity(fd: &impl AsFd) -> Result<usize> {
    Ok(fcntl(fd, FcntlArg::F_GETPIPE_SZ).context("F_GETPIPE_SZ")? as usize)
}

/// Sets the capacity of a pipe; the kernel rounds it up to a power of two of pages.
pub fn set_capacity(fd: &impl AsFd, bytes: usize) -> Result<()> {
    let bytes = i32::try_from(bytes).context("pipe size")?;
    fcntl(fd, FcntlArg::F_SETPIPE_SZ(bytes)).with_context(|| format!("making a pipe hold {bytes} bytes"))?;
    Ok(())
}

/// What is in the pipe behind `fd` (its read end), all of it and left where it is: `tee(2)` into a pipe of our own with as many
/// slots. Errors when there is more than [`PEEK_LIMIT`].
pub fn peek(fd: &impl AsFd) -> Result<Vec<u8>> {
    let n = queued(fd).context("FIONREAD of a pipe")?;
    if n == 0 {
        return Ok(Vec::new());
    }
    if n > PEEK_LIMIT {
        bail!("{n} bytes wait in a pipe, more than the {PEEK_LIMIT} that can be carried");
    }
    let (read_end, write_end) = pipe(None)?;
    set_capacity(&write_end, capacity(fd)?)?;
    // SAFETY: plain system call on two pipe descriptors that live through it.
    let copied = unsafe {
        libc::tee(fd.as_fd().as_raw_fd(), write_end.as_raw_fd(), PEEK_LIMIT, libc::SPLICE_F_NONBLOCK)
    };
    if copied < 0 {
        return Err(io::Error::last_os_error()).context("tee of a pipe");
    }
    if copied as usize != n {
        bail!("a pipe held {n} bytes but tee saw {copied}");
    }
    drop(write_end);
    let mut bytes = vec![0; n];
    io::Read::read_exact(&mut File::from(read_end), &mut bytes).context("reading the copy of a pipe")?;
    Ok(bytes)
}

/// A second descriptor of the same open file description.
pub fn duplicate(fd: &impl AsFd) -> Result<OwnedFd> {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3)).context("F_DUPFD_CLOEXEC")?;
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peek_leaves_everything() {
        let (r, w) = pipe(None).unwrap();
        assert!(peek(&r).unwrap().is_empty());
        // Many small writes: one slot of the pipe each.
        for i in 0..100u8 {
            write(&w, &[i, i]).unwrap();
        }
        let expected: Vec<u8> = (0..100u8).flat_map(|i| [i, i]).collect();
        assert_eq!(peek(&r).unwrap(), expected);
        assert_eq!(peek(&r).unwrap(), expected);
        let mut got = vec![0; 300];
        assert_eq!(read(&r, &mut got).unwrap(), 200);
        assert_eq!(&got[..200], &expected[..]);
    }

    #[test]
    fn peek_full_pipe() {
        let (r, w) = pipe(None).unwrap();
        let full = vec![7u8; capacity(&w).unwrap()];
        let again = reopen(&w, true).unwrap();
        assert_eq!(write(&again, &full).unwrap(), full.len());
        assert_eq!(peek(&r).unwrap(), full);
        assert_eq!(write(&again, b"x").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // The container's own description did not become non-blocking.
        let flags = OFlag::from_bits_retain(fcntl(&w, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
    }
}
