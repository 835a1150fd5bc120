//! A buffer for a container's memory: in no core dump of ours.

use std::ops::{Deref, DerefMut};

use anyhow::{Result, ensure};

/// Anonymous memory of its own, page aligned, marked MADV_DONTDUMP.
pub struct Buffer {
    at: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value alone, as a Vec's does.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Zeros.
    pub fn new(len: usize) -> Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping wherever the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        ensure!(at != libc::MAP_FAILED, "mapping {len} bytes: {}", std::io::Error::last_os_error());
        // SAFETY: the range is the mapping that was just made; the advice changes no content.
        unsafe { libc::madvise(at, len, libc::MADV_DONTDUMP) };
        Ok(Self { at: at.cast(), len })
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, initialised by the kernel, and ours until drop.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nobody borrows it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}
