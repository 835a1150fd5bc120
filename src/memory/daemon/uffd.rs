//! One userfaultfd: its messages read, pages placed. Numbers and layouts are those of linux/userfaultfd.h; which error means what
//! is from userfaultfd(2), ioctl_userfaultfd(2) and mm/userfaultfd.c.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

#[repr(C)]
#[derive(Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

nix::ioctl_read!(uffdio_wake, 0xaa, 0x02, UffdioRange);
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdioCopy);
nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, UffdioZeropage);

const MESSAGE: usize = 32;
/// Messages taken by one read.
const MESSAGES: usize = 64;
/// An address that is valid in every task, mapped or not: see [`Uffd::exited`].
pub(super) const PROBE: u64 = 1 << 30;

/// What a descriptor tells.
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The task forked; the child's descriptor.
    Fork(Uffd),
    /// mremap has moved memory.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How much.
        len: u64,
    },
    /// The content of this range is gone: thrown away (MADV_DONTNEED; zero from now on) or unmapped.
    Gone(Range<u64>),
}

/// What became of an attempt to place pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// So many bytes are there and whoever waited for them runs; at least a page.
    Done(u64),
    /// The first page was there before.
    Present,
    /// The task is changing its mappings: an event is to be read first.
    Again,
    /// Not all of the range is in one mapping that is registered with this descriptor.
    NotMapped,
    /// The task's memory is at its limit.
    NoMemory,
    /// The task has ended or executed another program.
    Exited,
}

/// A userfaultfd that is not ours: made by a task for its own memory.
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Takes a descriptor that a task handed over.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let is = std::fs::read_link(&name).with_context(|| format!("looking at {name}"))?;
        if is.as_os_str() != "anon_inode:[userfaultfd]" {
            bail!("a task handed over {} instead of a userfaultfd", is.display());
        }
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("setting up a userfaultfd")?;
        Ok(Self(fd))
    }

    /// Keeps it open for ever: closing it would give zeros to whoever waits for a page.
    pub fn leak(self) {
        std::mem::forget(self.0);
    }

    /// The messages that wait; empty when there are none.
    pub fn read(&self) -> Result<Vec<Event>> {
        let mut buf = [0; MESSAGE * MESSAGES];
        let n = match nix::unistd::read(&self.0, &mut buf) {
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            other => other.context("reading a userfaultfd")?,
        };
        buf[..n].chunks_exact(MESSAGE).map(decode).collect()
    }

    /// Places pages, and wakes whoever waits for them.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Result<Placed> {
        let len = bytes.len() as u64;
        let mut arg = UffdioCopy { dst: to, src: bytes.as_ptr() as u64, len, ..Default::default() };
        // SAFETY: `arg` is what this ioctl takes; the kernel reads `bytes` only, and writes into the other task's memory.
        let result = unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut arg) };
        outcome(result, len, arg.copy).with_context(|| format!("placing {len} bytes at {to:#x}"))
    }

    /// Places zero pages, and wakes whoever waits for them.
    pub fn zero(&self, range: Range<u64>) -> Result<Placed> {
        let len = range.end - range.start;
        let mut arg = UffdioZeropage { range: UffdioRange { start: range.start, len }, ..Default::default() };
        // SAFETY: `arg` is what this ioctl takes.
        let result = unsafe { uffdio_zeropage(self.0.as_raw_fd(), &raw mut arg) };
        outcome(result, len, arg.zeropage).with_context(|| format!("placing zeros at {:#x}", range.start))
    }

    /// Lets whoever waits in the range look again.
    pub fn wake(&self, range: Range<u64>) -> Result<()> {
        let mut arg = UffdioRange { start: range.start, len: range.end - range.start };
        // SAFETY: `arg` is what this ioctl takes.
        unsafe { uffdio_wake(self.0.as_raw_fd(), &raw mut arg) }.context("waking a task")?;
        Ok(())
    }

    /// Has the memory ended, with its last task or by execve? Changes nothing: the kernel looks for the memory first, and then cannot
    /// read the page that is offered, at an address where nobody has one.
    pub fn exited(&self, page: u64) -> bool {
        let mut arg = UffdioCopy { dst: PROBE, src: 0, len: page, ..Default::default() };
        // SAFETY: `arg` is what this ioctl takes; a source that is not mapped is an error and nothing else.
        let result = unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut arg) };
        matches!(outcome(result, page, arg.copy), Ok(Placed::Exited))
    }
}

fn outcome(result: Result<i32, Errno>, len: u64, done: i64) -> Result<Placed> {
    Ok(match result {
        Ok(_) => Placed::Done(len),
        Err(Errno::EAGAIN) if done > 0 => Placed::Done(done as u64),
        Err(Errno::EAGAIN | Errno::EINTR) => Placed::Again,
        Err(Errno::EEXIST) => Placed::Present,
        Err(Errno::ENOENT) => Placed::NotMapped,
        Err(Errno::ENOMEM) => Placed::NoMemory,
        // ENOSPC: the same, before Linux 4.13.
        Err(Errno::ESRCH | Errno::ENOSPC) => Placed::Exited,
        Err(e) => return Err(e.into()),
    })
}

pub(super) fn decode(message: &[u8]) -> Result<Event> {
    let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    Ok(match message[0] {
        0x12 => Event::Fault(word(16)),
        0x13 => {
            let fd = i32::from_ne_bytes(message[8..12].try_into().expect("four bytes"));
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let _ = fcntl(&fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
            Event::Fork(Uffd::new(fd)?)
        }
        0x14 => Event::Remap { from: word(8), to: word(16), len: word(24) },
        0x15 | 0x16 => Event::Gone(word(8)..word(16)),
        other => bail!("unknown userfaultfd event {other:#x}"),
    })
}
