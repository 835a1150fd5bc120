//! Which way of tracking works on this kernel: each is tried on a child of ours, with a page that the child writes when told.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::scan::{PAGE, Pagemap, Select};
use super::uffd::Uffd;
use crate::memory::inject;

/// A page that a child of ours writes when told to.
struct Writer {
    pid: i32,
    page: u64,
    /// To the child, and from it.
    ask: OwnedFd,
    answer: OwnedFd,
}

fn last(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written to `ends`.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(last("pipe"));
    }
    // SAFETY: fresh descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

impl Writer {
    fn new() -> Result<Self, String> {
        let ((orders, ask), (answer, done)) = (pipe()?, pipe()?);
        // SAFETY: a fresh anonymous mapping; the kernel chooses the address.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(last("mmap"));
        }
        // SAFETY: the child makes system calls only (no allocation, no lock) until it is killed or told to end.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let mut byte = 0u8;
            // SAFETY: descriptors and the page are copies of the parent's, which stay open and mapped here; `byte` is a local. Nothing allocates,
            // nothing locks: another thread of the parent may have held any lock at the fork.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(ask.as_raw_fd());
                while libc::read(orders.as_raw_fd(), (&raw mut byte).cast(), 1) == 1 {
                    page.cast::<u8>().write_volatile(byte);
                    libc::write(done.as_raw_fd(), (&raw const byte).cast(), 1);
                }
                libc::_exit(0)
            }
        }
        // SAFETY: exactly the mapping made above; the child has its own.
        unsafe { libc::munmap(page, PAGE as usize) };
        if pid < 0 {
            return Err(last("fork"));
        }
        Ok(Self { pid, page: page as u64, ask, answer })
    }

    /// The child writes its page.
    fn write(&self, value: u8) -> Result<(), String> {
        let mut byte = value;
        // SAFETY: one byte from and to a local.
        unsafe {
            if libc::write(self.ask.as_raw_fd(), (&raw const byte).cast(), 1) != 1
                || libc::read(self.answer.as_raw_fd(), (&raw mut byte).cast(), 1) != 1
            {
                return Err(last("the child for the trial"));
            }
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: our own child, by its pid; it may have been collected by the shim's reaper, then both calls fail harmlessly:
        // a pid is not given out again this soon.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// Does `uffd-wp` work? Else: why not.
pub fn uffd_wp() -> Result<(), String> {
    let child = Writer::new()?;
    child.write(1)?;
    let uffd = inject::userfaultfd(child.pid).map_err(|e| format!("{e:#}"))?;
    let uffd = Uffd::handshake(uffd).map_err(|e| format!("no WP_ASYNC (Linux 6.7): {e}"))?;
    let range = child.page..child.page + PAGE;
    uffd.register(range.clone()).map_err(|e| format!("UFFDIO_REGISTER: {e}"))?;
    let mut pagemap = Pagemap::open(child.pid).map_err(|e| format!("{e:#}"))?;
    let mut written = || -> Result<bool, String> {
        let found =
            pagemap.scan(range.clone(), Select::Written, true).map_err(|e| format!("PAGEMAP_SCAN: {e}"))?;
        Ok(!found.is_empty())
    };
    if !written()? {
        return Err("a new page was not reported".into());
    }
    if written()? {
        return Err("a clean page was reported as written".into());
    }
    child.write(2)?;
    if !written()? {
        return Err("a written page was not reported".into());
    }
    Ok(())
}

/// Does `soft-dirty` work? Else: why not.
pub fn soft_dirty() -> Result<(), String> {
    let child = Writer::new()?;
    child.write(1)?;
    let mut pagemap = Pagemap::open(child.pid).map_err(|e| format!("{e:#}"))?;
    let range = child.page..child.page + PAGE;
    let mut dirty = || -> Result<bool, String> {
        let found =
            pagemap.scan(range.clone(), Select::SoftDirty, false).map_err(|e| format!("pagemap: {e}"))?;
        Ok(!found.is_empty())
    };
    let path = format!("/proc/{}/clear_refs", child.pid);
    File::options()
        .write(true)
        .open(path)
        .and_then(|mut f| f.write_all(b"4"))
        .map_err(|e| format!("clear_refs: {e}"))?;
    if dirty()? {
        return Err("the bit does not clear".into());
    }
    child.write(2)?;
    if !dirty()? {
        return Err("not in this kernel".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_trials_give_an_answer_here() {
        // Whatever the kernel: never a false report of a clean or a written page.
        for result in [super::uffd_wp(), super::soft_dirty()] {
            if let Err(e) = result {
                assert!(!e.contains("was reported") && !e.contains("was not reported"), "{e}");
            }
        }
    }
}
