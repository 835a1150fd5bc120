//! Memory that is given back while it stays mapped: DONTNEED, FREE and, of shared memory, REMOVE.

use libc::{MADV_DONTNEED, MADV_FREE, MADV_REMOVE};

use super::book::{Book, Checked, Random, advise};
use super::worker::{Behaviour, Setup};

const PAGES: usize = 192;

pub struct Advice {
    private: Book,
    shared: Book,
    /// Pages given to MADV_FREE and not written since: the kernel may take them whenever it likes.
    free: Vec<bool>,
    rng: Random,
}

impl Advice {
    pub fn new(setup: &Setup) -> Checked<Advice> {
        let mut private = Book::private(PAGES, setup.salt)?;
        let mut shared = Book::shared(PAGES, setup.salt + 1)?;
        for page in 0..PAGES {
            private.write(page)?;
            shared.write(page)?;
        }
        Ok(Advice { private, shared, free: vec![false; PAGES], rng: Random::new(setup.salt) })
    }

    /// A page that the kernel may have taken holds all of what it held, or nothing.
    fn settle(&mut self, page: usize) -> Checked {
        if self.free[page] && self.private.page(page).iter().all(|b| *b == 0) {
            self.private.set(page, 0);
            self.free[page] = false;
        }
        self.private.check(page)
    }
}

impl Behaviour for Advice {
    fn step(&mut self) -> Checked {
        let some = self.rng.range(PAGES, 16);
        let count = some.len();
        match self.rng.below(5) {
            0 => {
                advise(self.private.place(some.start), count, MADV_DONTNEED)?;
                self.private.zeroed(some.clone());
                self.free[some].fill(false);
            }
            1 => {
                advise(self.private.place(some.start), count, MADV_FREE)?;
                self.free[some].fill(true);
            }
            2 => {
                advise(self.shared.place(some.start), count, MADV_REMOVE)?;
                self.shared.zeroed(some);
            }
            _ => {
                for page in some {
                    // it may be taken between the check and the write, which writes all of it anyway
                    self.settle(page)?;
                    self.private.write_unseen(page);
                    self.free[page] = false;
                    self.shared.write(page)?;
                }
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        (0..PAGES).try_for_each(|page| self.settle(page))?;
        Ok(PAGES + self.shared.check_all()?)
    }

    fn sample(&mut self) -> *mut u8 {
        self.shared.at
    }
}
