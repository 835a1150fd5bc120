//! Guard pages (MADV_GUARD_INSTALL, Linux 6.13) that come and go between pages that are used: whoever touches one is refused. There is enough
//! memory that CRIU is not shown it. On kernels without them it is memory like any other.
//!
//! They are where nothing was ever written. A userfaultfd hears nothing of guard pages, and fills one like an empty place
//! (`pte_none_mostly`, mm/userfaultfd.c): what waits for such a page while memory still follows would come all the same.

use std::ops::Range;

use super::book::{Book, Checked, Random, advise, failed};
use super::worker::{Behaviour, Setup};

const PAGES: usize = 40 << 8;
/// So many pages in turn are used and left alone.
const BLOCK: usize = 32;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

fn used(page: usize) -> bool {
    (page / BLOCK).is_multiple_of(2)
}

pub struct Guards {
    memory: Book,
    guarded: Vec<bool>,
    known: bool,
    /// What reads from memory and refuses where the task itself would end.
    pipe: [i32; 2],
    rng: Random,
}

impl Guards {
    pub fn new(setup: &Setup) -> Checked<Guards> {
        let mut memory = Book::private(PAGES, setup.salt)?;
        for page in (0..PAGES).filter(|page| used(*page)) {
            memory.write(page)?;
        }
        let known = advise(memory.place(BLOCK), 1, MADV_GUARD_INSTALL).is_ok();
        let mut pipe = [0; 2];
        // SAFETY: a place for two descriptors.
        if unsafe { libc::pipe(pipe.as_mut_ptr()) } < 0 {
            return failed("pipe");
        }
        let mut guarded = vec![false; PAGES];
        guarded[BLOCK] = known;
        Ok(Guards { memory, guarded, known, pipe, rng: Random::new(setup.salt) })
    }

    fn refused(&self, page: usize) -> bool {
        let mut byte = 0u8;
        // SAFETY: the kernel reads the byte, or says that it cannot; a byte is read back into one of ours.
        unsafe {
            let written = libc::write(self.pipe[1], self.memory.place(page).cast(), 1);
            if written == 1 {
                libc::read(self.pipe[0], (&raw mut byte).cast(), 1);
            }
            written != 1
        }
    }

    fn check(&mut self, page: usize) -> Checked {
        match (self.guarded[page], self.refused(page)) {
            (false, false) => self.memory.check(page),
            (true, true) => Ok(()),
            (true, false) => Err(format!("page {page} is no guard page any more")),
            (false, true) => Err(format!("page {page} cannot be read")),
        }
    }
}

impl Behaviour for Guards {
    fn step(&mut self) -> Checked {
        let Range { start, end } = self.rng.range(PAGES, BLOCK);
        // within a block
        let some = start..end.min((start / BLOCK + 1) * BLOCK);
        if used(start) {
            for page in some {
                self.memory.write(page)?;
            }
            return Ok(());
        }
        some.clone().try_for_each(|page| self.check(page))?;
        if self.known {
            let guard = self.rng.below(2) == 0;
            let advice = if guard { MADV_GUARD_INSTALL } else { MADV_GUARD_REMOVE };
            advise(self.memory.place(start), some.len(), advice)?;
            self.guarded[some].fill(guard);
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        (0..PAGES).try_for_each(|page| self.check(page))?;
        Ok(PAGES)
    }

    fn sample(&mut self) -> *mut u8 {
        self.memory.at
    }
}
