//! The heap of brk(2), growing and shrinking. This process's allocator is told to leave it alone.

use super::book::{Book, Checked, Random, failed};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

pub struct Brk {
    book: Book,
    rng: Random,
}

fn sbrk(bytes: isize) -> Checked<*mut u8> {
    // SAFETY: after `Brk::new` nobody else moves the break, and what is given back is not used again.
    let before = unsafe { libc::sbrk(bytes as libc::intptr_t) };
    if before as isize == -1 { failed("sbrk") } else { Ok(before.cast()) }
}

impl Brk {
    pub fn new(setup: &Setup) -> Checked<Brk> {
        // SAFETY: from here on the allocator takes new memory from mmap only and gives nothing back by brk.
        let told = unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 0) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) == 1
        };
        if !told {
            return Err("mallopt refused".into());
        }
        let end = sbrk(0)?;
        // the rest of the allocator's last page, and a page between it and ours
        let fill = end.align_offset(PAGE) + PAGE;
        sbrk(fill as isize)?;
        let mut brk = Brk { book: Book::new(sbrk(0)?, 0, setup.salt), rng: Random::new(setup.salt) };
        brk.resize(64)?;
        Ok(brk)
    }

    fn resize(&mut self, pages: usize) -> Checked {
        sbrk((pages as isize - self.book.len() as isize) * PAGE as isize)?;
        self.book.resize(pages);
        let end = self.book.at as usize + pages * PAGE;
        if sbrk(0)? as usize != end {
            return Err("somebody else has moved the break".into());
        }
        Ok(())
    }
}

impl Behaviour for Brk {
    fn step(&mut self) -> Checked {
        let pages = self.book.len();
        let (what, some) = (self.rng.below(3), 1 + self.rng.below(32));
        match what {
            0 if pages < 512 => self.resize(pages + some)?,
            1 if pages > 48 => self.resize(pages - some)?,
            _ => {}
        }
        for _ in 0..16 {
            let page = self.rng.below(self.book.len());
            self.book.write(page)?;
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
