//! 64 GiB of reserved address space with a few islands of memory that come and go in it.

use libc::{MADV_DONTNEED, MAP_NORESERVE, MAP_PRIVATE, PROT_NONE};

use super::book::{Book, Checked, RW, Random, advise, map, protect};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

/// Pages of the reservation.
const SEA: usize = (64 << 30) / PAGE;
/// Where an island may begin: one to a slot.
const SLOT: usize = SEA / 4096;

pub struct Sparse {
    sea: *mut u8,
    islands: Vec<(usize, Book)>,
    rng: Random,
    next: u64,
}

impl Sparse {
    pub fn new(setup: &Setup) -> Checked<Sparse> {
        let sea = map(std::ptr::null_mut(), SEA, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, -1)?;
        Ok(Sparse { sea, islands: Vec::new(), rng: Random::new(setup.salt), next: setup.salt })
    }
}

impl Behaviour for Sparse {
    fn step(&mut self) -> Checked {
        let slot = self.rng.below(SEA / SLOT);
        if self.islands.len() < 24 && self.islands.iter().all(|(taken, _)| *taken != slot) {
            // SAFETY: the slot lies within the reservation, and an island within its slot.
            let at = unsafe { self.sea.add((slot * SLOT + self.rng.below(64)) * PAGE) };
            self.next += 1;
            let book = Book::new(at, 1 + self.rng.below(24), self.next);
            protect(at, book.len(), RW)?;
            self.islands.push((slot, book));
        } else {
            let (_, mut book) = self.islands.swap_remove(self.rng.below(self.islands.len()));
            book.check_all()?;
            advise(book.at, book.len(), MADV_DONTNEED)?;
            protect(book.at, book.len(), PROT_NONE)?;
        }
        for (_, book) in &mut self.islands {
            let page = self.rng.below(book.len());
            book.write(page)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        self.islands.iter_mut().map(|(_, book)| book.check_all()).sum()
    }

    fn sample(&mut self) -> *mut u8 {
        self.islands[0].1.at
    }
}
