//! Mappings that come, go and change places.

use std::collections::VecDeque;

use libc::{
    MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE,
};

use super::book::{Book, Checked, RW, Random, failed, map, unmap};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

/// mmap, write, check, munmap; a few live at any time.
pub struct Mmap {
    live: VecDeque<Book>,
    rng: Random,
    next: u64,
}

impl Mmap {
    pub fn new(setup: &Setup) -> Checked<Mmap> {
        Ok(Mmap { live: VecDeque::new(), rng: Random::new(setup.salt), next: setup.salt })
    }
}

impl Behaviour for Mmap {
    fn step(&mut self) -> Checked {
        self.next += 1;
        let mut book = Book::private(1 + self.rng.below(96), self.next)?;
        for page in 0..book.len() {
            // some are never touched
            if self.rng.below(4) > 0 {
                book.write(page)?;
            }
        }
        self.live.push_back(book);
        if self.live.len() > 8
            && let Some(mut oldest) = self.live.pop_front()
        {
            oldest.check_all()?;
            unmap(oldest.at, oldest.len())?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        self.live.iter_mut().map(Book::check_all).sum()
    }

    fn sample(&mut self) -> *mut u8 {
        self.live[0].at
    }
}

/// The same address again and again, with other content and another size: by munmap and mmap, or by mmap over it.
pub struct Replace {
    /// Address space that is kept, so that nobody else's mapping comes here.
    home: *mut u8,
    book: Book,
    rng: Random,
    next: u64,
}

const MOST: usize = 128;

impl Replace {
    pub fn new(setup: &Setup) -> Checked<Replace> {
        let home = map(std::ptr::null_mut(), MOST, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, -1)?;
        let book = Book::new(map(home, MOST, RW, MAP_PRIVATE | MAP_FIXED, -1)?, MOST, setup.salt);
        Ok(Replace { home, book, rng: Random::new(setup.salt), next: setup.salt })
    }
}

impl Behaviour for Replace {
    fn step(&mut self) -> Checked {
        self.book.check_all()?;
        let (pages, gap) = (16 + self.rng.below(MOST - 32), self.rng.below(16));
        if self.rng.below(2) == 0 {
            // really unmapped for a moment; this process has one thread, so nobody takes the place
            unmap(self.home, MOST)?;
            map(self.home, MOST, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, -1)?;
        }
        // SAFETY: within the kept address space: gap + pages is less than MOST.
        let at = unsafe { self.home.add(gap * PAGE) };
        self.next += 1;
        self.book = Book::new(map(at, pages, RW, MAP_PRIVATE | MAP_FIXED, -1)?, pages, self.next);
        for page in 0..pages {
            if self.rng.below(3) > 0 {
                self.book.write(page)?;
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

/// mremap: grows, shrinks, moves, and leaves the old place mapped and empty.
pub struct Mremap {
    live: Vec<Book>,
    rng: Random,
}

fn remap(book: &Book, pages: usize, flags: i32, to: *mut u8) -> Checked<*mut u8> {
    // SAFETY: the book's own mapping; with MREMAP_FIXED over a place that was mapped for it.
    let got = unsafe { libc::mremap(book.at.cast(), book.len() * PAGE, pages * PAGE, flags, to) };
    if got == libc::MAP_FAILED { failed(&format!("mremap {flags}")) } else { Ok(got.cast()) }
}

impl Mremap {
    pub fn new(setup: &Setup) -> Checked<Mremap> {
        let mut live = Vec::new();
        for i in 0..6 {
            let mut book = Book::private(32 + 8 * i, setup.salt + i as u64)?;
            (0..book.len()).try_for_each(|page| book.write(page))?;
            live.push(book);
        }
        Ok(Mremap { live, rng: Random::new(setup.salt) })
    }
}

impl Behaviour for Mremap {
    fn step(&mut self) -> Checked {
        let chosen = self.rng.below(self.live.len());
        let book = &mut self.live[chosen];
        let pages = book.len();
        match self.rng.below(4) {
            0 if pages < 256 => {
                let more = pages + 1 + self.rng.below(48);
                book.at = remap(book, more, MREMAP_MAYMOVE, std::ptr::null_mut())?;
                book.resize(more);
            }
            1 if pages > 16 => {
                let fewer = pages - 1 - self.rng.below(8);
                book.at = remap(book, fewer, 0, std::ptr::null_mut())?;
                book.resize(fewer);
            }
            2 => {
                let place = map(std::ptr::null_mut(), pages, PROT_NONE, MAP_PRIVATE, -1)?;
                book.at = remap(book, pages, MREMAP_MAYMOVE | MREMAP_FIXED, place)?;
            }
            _ => {
                let old = book.at;
                book.at = remap(book, pages, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, std::ptr::null_mut())?;
                Book::new(old, pages, 0).check_all().map_err(|e| format!("left behind: {e}"))?;
                unmap(old, pages)?;
            }
        }
        for _ in 0..8 {
            let page = self.rng.below(book.len());
            book.write(page)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        self.live.iter_mut().map(Book::check_all).sum()
    }

    fn sample(&mut self) -> *mut u8 {
        self.live[0].at
    }
}
