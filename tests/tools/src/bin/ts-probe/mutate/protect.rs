//! Memory whose protection changes: read-only and back to be written, none at all and back.

use libc::{PROT_NONE, PROT_READ};

use super::book::{Book, Checked, RW, Random, protect};
use super::worker::{Behaviour, Setup};

const CHUNKS: usize = 24;
/// Pages of a chunk.
const CHUNK: usize = 8;

pub struct Protect {
    book: Book,
    now: [i32; CHUNKS],
    rng: Random,
}

impl Protect {
    pub fn new(setup: &Setup) -> Checked<Protect> {
        let mut book = Book::private(CHUNKS * CHUNK, setup.salt)?;
        (0..book.len()).try_for_each(|page| book.write(page))?;
        Ok(Protect { book, now: [RW; CHUNKS], rng: Random::new(setup.salt) })
    }

    fn turn(&mut self, chunk: usize, prot: i32) -> Checked {
        protect(self.book.place(chunk * CHUNK), CHUNK, prot)?;
        self.now[chunk] = prot;
        Ok(())
    }
}

impl Behaviour for Protect {
    fn step(&mut self) -> Checked {
        let chunk = self.rng.below(CHUNKS);
        let pages = chunk * CHUNK..(chunk + 1) * CHUNK;
        match self.now[chunk] {
            RW => {
                self.book.check_some(pages)?;
                let next = [PROT_READ, PROT_NONE][self.rng.below(2)];
                self.turn(chunk, next)
            }
            PROT_READ => {
                self.book.check_some(pages.clone())?;
                self.turn(chunk, RW)?;
                pages.into_iter().try_for_each(|page| self.book.write(page))?;
                let next = [PROT_READ, RW][self.rng.below(2)];
                self.turn(chunk, next)
            }
            _ => {
                let next = [PROT_READ, RW][self.rng.below(2)];
                self.turn(chunk, next)?;
                self.book.check_some(pages).map(drop)
            }
        }
    }

    fn verify(&mut self) -> Checked<usize> {
        for chunk in 0..CHUNKS {
            let before = self.now[chunk];
            if before == PROT_NONE {
                self.turn(chunk, PROT_READ)?;
            }
            self.book.check_some(chunk * CHUNK..(chunk + 1) * CHUNK)?;
            self.turn(chunk, before)?;
        }
        Ok(CHUNKS * CHUNK)
    }

    fn sample(&mut self) -> *mut u8 {
        let _ = self.turn(0, RW);
        self.book.at
    }
}
