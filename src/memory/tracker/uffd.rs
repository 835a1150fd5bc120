//! The ioctls of a userfaultfd that tracks writes: handshake, registration, protection (linux/userfaultfd.h).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Protection of pages that are not there yet, and of file pages, by markers. PAGEMAP_SCAN wants it.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel resolves a write fault itself: the task is never held up by us.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// A userfaultfd of some task's memory. Closing it lifts every registration (13-28 ms per GiB of live memory).
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Of this process's own memory.
    pub fn own() -> io::Result<Self> {
        // SAFETY: the call takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        check(fd as i32)?;
        // SAFETY: a fresh descriptor that nobody else owns.
        Self::handshake(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// The first call on a fresh descriptor: asynchronous write protection.
    pub fn handshake(fd: OwnedFd) -> io::Result<Self> {
        let features = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
        let mut api = [UFFD_API, features, 0];
        // SAFETY: struct uffdio_api is three u64.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) })?;
        Ok(Self(fd))
    }

    /// Puts the mappings in a range under tracking. Nothing is protected yet: everything counts as written.
    pub fn register(&self, range: Range<u64>) -> io::Result<()> {
        let mut register = [range.start, range.end - range.start, REGISTER_MODE_WP, 0];
        // SAFETY: struct uffdio_register is four u64.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER as _, register.as_mut_ptr()) })
    }

    /// Does the memory still exist that it was made for? Not after its tasks have ended or executed another program.
    pub fn alive(&self) -> bool {
        // A range where nobody maps anything (vm.mmap_min_addr): the answer is ENOENT for a living memory.
        let page = super::scan::PAGE;
        self.protect(page..2 * page).map_or_else(|e| e.raw_os_error() != Some(libc::ESRCH), |()| true)
    }

    /// Protects every page of a registered range, also those that are not there (by markers: page tables are made for them).
    pub fn protect(&self, range: Range<u64>) -> io::Result<()> {
        let mut protect = [range.start, range.end - range.start, WRITEPROTECT_MODE_WP];
        loop {
            // SAFETY: struct uffdio_writeprotect is three u64.
            let r =
                unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT as _, protect.as_mut_ptr()) };
            match check(r) {
                // The task's mappings are just changing.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
    }
}

fn check(r: i32) -> io::Result<()> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
