//! Guard pages (MADV_GUARD_INSTALL, Linux 6.13) that come and go in memory that is used: whoever touches one is refused. There is enough
//! memory that CRIU is not shown it. On kernels without them it is memory like any other.
//!
//! What is there when one has gone is written anew, not looked at: it should be zero, but the kernel tells a userfaultfd of MADV_DONTNEED
//! and not of this, so that what waits for the page still comes if the guard was there for less time than that takes.

use std::ops::Range;

use super::book::{Book, Checked, Random, advise, failed};
use super::worker::{Behaviour, Setup};

const PAGES: usize = 20 << 8;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

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
        for page in 0..PAGES {
            memory.write(page)?;
        }
        let known = advise(memory.place(1), 1, MADV_GUARD_INSTALL).is_ok();
        if known {
            memory.zeroed(1..2);
        }
        let mut pipe = [0; 2];
        // SAFETY: a place for two descriptors.
        if unsafe { libc::pipe(pipe.as_mut_ptr()) } < 0 {
            return failed("pipe");
        }
        let mut guarded = vec![false; PAGES];
        guarded[1] = known;
        Ok(Guards { memory, guarded, known, pipe, rng: Random::new(setup.salt) })
    }

    /// The first page is always there to be looked at.
    fn some(&mut self) -> Range<usize> {
        let some = self.rng.range(PAGES, 16);
        some.start.max(1)..some.end.max(1)
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
        let some = self.some();
        match self.rng.below(4) {
            0 if self.known => {
                advise(self.memory.place(some.start), some.len(), MADV_GUARD_INSTALL)?;
                self.memory.zeroed(some.clone());
                self.guarded[some].fill(true);
            }
            1 if self.known => {
                advise(self.memory.place(some.start), some.len(), MADV_GUARD_REMOVE)?;
                some.clone().for_each(|page| self.memory.write_unseen(page));
                self.guarded[some].fill(false);
            }
            _ => {
                for page in some {
                    self.check(page)?;
                    if !self.guarded[page] {
                        self.memory.write(page)?;
                    }
                }
            }
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
