//! Transparent huge pages: made, split by giving parts of them back, put together again.

use libc::{MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_PRIVATE};

use super::book::{Book, Checked, RW, Random, advise, map};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

/// Pages of a huge one (x86_64, and aarch64 with pages of 4 KiB).
const HUGE: usize = 512;
const HUGES: usize = 4;
/// linux/mman.h since 6.1; a kernel without it refuses.
const MADV_COLLAPSE: i32 = 25;

pub struct Huge {
    book: Book,
    rng: Random,
}

impl Huge {
    pub fn new(setup: &Setup) -> Checked<Huge> {
        let at = map(std::ptr::null_mut(), (HUGES + 1) * HUGE, RW, MAP_PRIVATE, -1)?;
        // SAFETY: one huge page more than is used was mapped, so the aligned place and all behind it is within.
        let at = unsafe { at.add(at.align_offset(HUGE * PAGE)) };
        advise(at, HUGES * HUGE, MADV_HUGEPAGE)?;
        let mut book = Book::new(at, HUGES * HUGE, setup.salt);
        (0..book.len()).try_for_each(|page| book.write(page))?;
        Ok(Huge { book, rng: Random::new(setup.salt) })
    }
}

impl Behaviour for Huge {
    fn step(&mut self) -> Checked {
        match self.rng.below(12) {
            0 => {
                let some = self.rng.range(self.book.len(), HUGE);
                advise(self.book.place(some.start), some.len(), MADV_DONTNEED)?;
                self.book.zeroed(some);
            }
            1 => {
                let advice = [MADV_HUGEPAGE, MADV_NOHUGEPAGE][self.rng.below(2)];
                advise(self.book.place(self.rng.below(HUGES) * HUGE), HUGE, advice)?;
            }
            2 => {
                // may fail for want of memory, and does where it was told not to
                let _ = advise(self.book.place(self.rng.below(HUGES) * HUGE), HUGE, MADV_COLLAPSE);
            }
            _ => {
                for _ in 0..24 {
                    let page = self.rng.below(self.book.len());
                    self.book.write(page)?;
                }
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        self.book.check_all()
    }

    fn sample(&mut self) -> *mut u8 {
        self.book.at
    }
}
