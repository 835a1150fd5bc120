//! Memory with a book about it: which version each page holds. And the few system calls on memory that all behaviours need.

use std::io::Error;
use std::ops::Range;

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, c_int, c_void};

use super::content::{self, PAGE};

/// What a wrong byte, or a system call that failed, ends with.
pub type Checked<T = ()> = Result<T, String>;

/// Readable and writable.
pub const RW: c_int = PROT_READ | PROT_WRITE;

/// The error of the system call that has just failed.
pub fn failed<T>(what: &str) -> Checked<T> {
    Err(format!("{what}: {}", Error::last_os_error()))
}

/// mmap(2) of whole pages: `at` null for a place of the kernel's choice, `fd` -1 for anonymous memory.
pub fn map(at: *mut u8, pages: usize, prot: c_int, flags: c_int, fd: c_int) -> Checked<*mut u8> {
    let anonymous = if fd < 0 { MAP_ANONYMOUS } else { 0 };
    // SAFETY: either at a place of the kernel's choice, or (MAP_FIXED) over memory that the caller owns.
    let got = unsafe { libc::mmap(at.cast(), pages * PAGE, prot, flags | anonymous, fd, 0) };
    if got == MAP_FAILED { failed("mmap") } else { Ok(got.cast()) }
}

/// munmap(2).
pub fn unmap(at: *mut u8, pages: usize) -> Checked {
    // SAFETY: the caller owns these pages and no reference into them is left.
    if unsafe { libc::munmap(at.cast(), pages * PAGE) } < 0 { failed("munmap") } else { Ok(()) }
}

/// mprotect(2).
pub fn protect(at: *mut u8, pages: usize, prot: c_int) -> Checked {
    // SAFETY: the caller owns these pages and touches them only as `prot` allows.
    if unsafe { libc::mprotect(at.cast(), pages * PAGE, prot) } < 0 { failed("mprotect") } else { Ok(()) }
}

/// madvise(2).
pub fn advise(at: *mut u8, pages: usize, advice: c_int) -> Checked {
    // SAFETY: the caller owns these pages and expects what the advice does to their content.
    if unsafe { libc::madvise(at.cast::<c_void>(), pages * PAGE, advice) } < 0 {
        return failed(&format!("madvise {advice}"));
    }
    Ok(())
}

/// Pages at a place, and the version of each. Does not own the place: behaviours map, move and unmap it.
pub struct Book {
    /// Where the first page is.
    pub at: *mut u8,
    salt: u64,
    versions: Vec<u32>,
}

impl Book {
    /// About `pages` pages of zeros at `at`. `salt`: so that no two books have a page in common.
    pub fn new(at: *mut u8, pages: usize, salt: u64) -> Book {
        Book { at, salt, versions: vec![0; pages] }
    }

    /// Fresh private anonymous pages.
    pub fn private(pages: usize, salt: u64) -> Checked<Book> {
        Ok(Book::new(map(std::ptr::null_mut(), pages, RW, MAP_PRIVATE, -1)?, pages, salt))
    }

    /// Fresh shared anonymous pages.
    pub fn shared(pages: usize, salt: u64) -> Checked<Book> {
        Ok(Book::new(map(std::ptr::null_mut(), pages, RW, MAP_SHARED, -1)?, pages, salt))
    }

    /// How many pages.
    pub fn len(&self) -> usize {
        self.versions.len()
    }

    /// One page's place.
    pub fn place(&self, page: usize) -> *mut u8 {
        assert!(page < self.len());
        // SAFETY: within the pages that the book is about.
        unsafe { self.at.add(page * PAGE) }
    }

    /// The bytes of one page.
    pub fn page(&mut self, page: usize) -> &mut [u8] {
        // SAFETY: the book's maker mapped these pages, and only one process (or thread) uses a book's pages at a time.
        unsafe { std::slice::from_raw_parts_mut(self.place(page), PAGE) }
    }

    /// Checks a page, then writes its next version.
    pub fn write(&mut self, page: usize) -> Checked {
        self.check(page)?;
        self.write_unseen(page);
        Ok(())
    }

    /// Writes the next version whatever the page holds.
    pub fn write_unseen(&mut self, page: usize) {
        let (salt, version) = (self.salt, self.versions[page] + 1);
        content::fill(self.page(page), salt, page as u64, version);
        self.versions[page] = version;
    }

    /// What the next version of a page would be.
    pub fn next(&self, page: usize) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        content::fill(&mut bytes, self.salt, page as u64, self.versions[page] + 1);
        bytes
    }

    /// One page holds what was written last.
    pub fn check(&mut self, page: usize) -> Checked {
        let (salt, version) = (self.salt, self.versions[page]);
        content::check(self.page(page), salt, page as u64, version)
    }

    /// These pages do; how many they are.
    pub fn check_some(&mut self, pages: Range<usize>) -> Checked<usize> {
        let count = pages.len();
        pages.into_iter().try_for_each(|page| self.check(page))?;
        Ok(count)
    }

    /// All do.
    pub fn check_all(&mut self) -> Checked<usize> {
        self.check_some(0..self.len())
    }

    /// These pages were given back: they read as zeros now.
    pub fn zeroed(&mut self, pages: Range<usize>) {
        self.versions[pages].fill(0);
    }

    /// It is known that this page holds this version.
    pub fn set(&mut self, page: usize, version: u32) {
        self.versions[page] = version;
    }

    /// More pages of zeros, or fewer pages.
    pub fn resize(&mut self, pages: usize) {
        self.versions.resize(pages, 0);
    }
}

/// Numbers that look random, the same ones for the same seed.
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 33) as usize) % end.max(1)
    }

    /// A range of at least one and at most `most` within `0..end`.
    pub fn range(&mut self, end: usize, most: usize) -> Range<usize> {
        let start = self.below(end);
        start..start + 1 + self.below(most.min(end - start))
    }
}
