//! Which way this kernel can tell dirty memory from clean, by trying each on a page of our own. The trackers themselves do not
//! live here; this names the one that this node would use.
//!
//! - `uffd-wp`: userfaultfd write-protection that the kernel resolves itself (WP_ASYNC) with PAGEMAP_SCAN, Linux 6.7.
//! - `soft-dirty`: bit 55 of /proc/PID/pagemap after a `4` in clear_refs; absent on arm64 and many distribution kernels.
//! - `hash`: pages are read and compared; any kernel, at the price of reading all memory each round.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::Finding;

/// What [`gather`] saw: for each tracker whether the trial worked, or where it failed.
#[derive(Clone, Debug)]
pub struct Facts {
    /// userfaultfd with WP_ASYNC and PAGEMAP_SCAN.
    pub uffd_wp: Result<(), String>,
    /// The soft-dirty bit.
    pub soft_dirty: Result<(), String>,
}

/// Tries both.
pub fn gather() -> Facts {
    Facts { uffd_wp: try_uffd_wp(), soft_dirty: try_soft_dirty() }
}

/// The tracker that a migration from this node would use.
pub fn choice(facts: &Facts) -> &'static str {
    match (&facts.uffd_wp, &facts.soft_dirty) {
        (Ok(()), _) => "uffd-wp",
        (_, Ok(())) => "soft-dirty",
        _ => "hash",
    }
}

/// Never a failure: comparing pages works everywhere.
pub fn verdict(facts: &Facts) -> Finding {
    let why = |r: &Result<(), String>| match r {
        Ok(()) => "works".to_string(),
        Err(e) => e.clone(),
    };
    let found = format!(
        "{} (uffd-wp: {}; soft-dirty: {})",
        choice(facts),
        why(&facts.uffd_wp),
        why(&facts.soft_dirty)
    );
    match choice(facts) {
        "hash" => Finding::warn(
            "memory tracker",
            found,
            "every round of a live migration would read and compare all memory: Linux 6.7 or CONFIG_MEM_SOFT_DIRTY is advised",
        ),
        _ => Finding::ok("memory tracker", found),
    }
}

/// One anonymous page, unmapped on drop.
struct Page {
    at: *mut u8,
    len: usize,
}

impl Page {
    fn new() -> Result<Self, String> {
        // SAFETY: sysconf has no preconditions.
        let len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        // SAFETY: a fresh anonymous mapping; the kernel chooses the address.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(last("mmap"));
        }
        Ok(Self { at: at.cast(), len })
    }

    /// Dirties the page.
    fn touch(&self, value: u8) {
        // SAFETY: `at` is the start of a writable mapping of this struct's own; volatile so that the write happens.
        unsafe { self.at.write_volatile(value) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn last(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

// linux/userfaultfd.h and linux/fs.h; the numbers are the same on x86_64 and aarch64.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

fn try_uffd_wp() -> Result<(), String> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(last("userfaultfd"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [UFFD_API, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, 0];
    // SAFETY: struct uffdio_api is three u64.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) } < 0 {
        return Err("no WP_ASYNC (Linux 6.7)".into());
    }
    let page = Page::new()?;
    let mut register = [page.at as u64, page.len as u64, UFFDIO_REGISTER_MODE_WP, 0];
    // SAFETY: struct uffdio_register is four u64, and the range is ours.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER as _, register.as_mut_ptr()) } < 0 {
        return Err(last("UFFDIO_REGISTER"));
    }
    let pagemap = File::open("/proc/self/pagemap").map_err(|e| format!("pagemap: {e}"))?;
    page.touch(1);
    scan(&pagemap, &page)?; // protects
    if scan(&pagemap, &page)? {
        return Err("a clean page was reported as written".into());
    }
    page.touch(2);
    if !scan(&pagemap, &page)? {
        return Err("a written page was not reported".into());
    }
    Ok(())
}

/// PAGEMAP_SCAN of the page with re-protection: was it written since the last scan?
fn scan(pagemap: &File, page: &Page) -> Result<bool, String> {
    let mut region = [0u64; 3]; // struct page_region: start, end, categories
    let mut arg: [u64; 12] = [
        96, // size of struct pm_scan_arg
        PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        page.at as u64,
        page.at as u64 + page.len as u64,
        0, // walk_end
        region.as_mut_ptr() as u64,
        1, // vec_len
        0, // max_pages
        0, // category_inverted
        PAGE_IS_WRITTEN,
        0, // category_anyof_mask
        PAGE_IS_WRITTEN,
    ];
    // SAFETY: struct pm_scan_arg is twelve u64 and points at one struct page_region that outlives the call.
    let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, arg.as_mut_ptr()) };
    if n < 0 {
        return Err(last("PAGEMAP_SCAN"));
    }
    Ok(n == 1)
}

fn try_soft_dirty() -> Result<(), String> {
    const SOFT_DIRTY: u64 = 1 << 55; // Documentation/admin-guide/mm/soft-dirty.rst
    let page = Page::new()?;
    page.touch(1);
    let pagemap = File::open("/proc/self/pagemap").map_err(|e| format!("pagemap: {e}"))?;
    let entry = || -> Result<u64, String> {
        let mut word = [0u8; 8];
        let at = page.at as u64 / page.len as u64 * 8;
        pagemap.read_exact_at(&mut word, at).map_err(|e| format!("pagemap: {e}"))?;
        Ok(u64::from_ne_bytes(word))
    };
    File::options()
        .write(true)
        .open("/proc/self/clear_refs")
        .and_then(|mut f| f.write_all(b"4"))
        .map_err(|e| format!("clear_refs: {e}"))?;
    if entry()? & SOFT_DIRTY != 0 {
        return Err("the bit does not clear".into());
    }
    page.touch(2);
    if entry()? & SOFT_DIRTY == 0 {
        return Err("not in this kernel".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn facts(uffd: bool, soft: bool) -> Facts {
        let result = |ok: bool| if ok { Ok(()) } else { Err("no".to_string()) };
        Facts { uffd_wp: result(uffd), soft_dirty: result(soft) }
    }

    #[test]
    fn the_best_tracker_that_works_is_chosen() {
        assert_eq!(choice(&facts(true, true)), "uffd-wp");
        assert_eq!(choice(&facts(false, true)), "soft-dirty");
        assert_eq!(choice(&facts(false, false)), "hash");
        assert_eq!(verdict(&facts(false, false)).level, Level::Warn);
        assert_eq!(verdict(&facts(true, false)).level, Level::Ok);
    }

    #[test]
    fn the_trial_gives_an_answer_here() {
        // Whatever the kernel: never a false report of a clean or a written page.
        let facts = gather();
        for result in [&facts.uffd_wp, &facts.soft_dirty] {
            if let Err(e) = result {
                assert!(!e.contains("was reported") && !e.contains("was not reported"), "{e}");
            }
        }
    }
}
