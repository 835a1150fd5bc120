//! A file mapped privately: pages that were written are this process's own, the others are still the file's.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::{MADV_DONTNEED, MAP_PRIVATE};

use super::book::{Book, Checked, RW, Random, advise, map};
use super::content::{self, PAGE};
use super::worker::{Behaviour, Setup};

const PAGES: usize = 192;

pub struct PrivateFile {
    file: File,
    book: Book,
    salt: u64,
    rng: Random,
}

impl PrivateFile {
    pub fn new(setup: &Setup) -> Checked<PrivateFile> {
        let path = format!("{}/mutate-private-{}", setup.dir, setup.number);
        let fail = |e: std::io::Error| format!("{path}: {e}");
        let mut bytes = vec![0; PAGES * PAGE];
        for (page, bytes) in bytes.chunks_mut(PAGE).enumerate() {
            content::fill(bytes, setup.salt, page as u64, 1);
        }
        File::create(&path).and_then(|mut file| file.write_all(&bytes)).map_err(fail)?;
        let file = File::open(&path).map_err(fail)?;
        let at = map(std::ptr::null_mut(), PAGES, RW, MAP_PRIVATE, file.as_raw_fd())?;
        let mut book = Book::new(at, PAGES, setup.salt);
        (0..PAGES).for_each(|page| book.set(page, 1));
        Ok(PrivateFile { file, book, salt: setup.salt, rng: Random::new(setup.salt) })
    }
}

impl Behaviour for PrivateFile {
    fn step(&mut self) -> Checked {
        let some = self.rng.range(PAGES, 12);
        self.book.check_some(some.clone())?;
        if self.rng.below(3) == 0 {
            // back to the file
            advise(self.book.place(some.start), some.len(), MADV_DONTNEED)?;
            for page in some {
                self.book.set(page, 1);
            }
        } else {
            for page in some {
                self.book.write(page)?;
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        let mut page = [0; PAGE];
        for number in 0..PAGES {
            self.file.read_exact_at(&mut page, (number * PAGE) as u64).map_err(|e| e.to_string())?;
            content::check(&page, self.salt, number as u64, 1).map_err(|e| format!("in the file: {e}"))?;
        }
        self.book.check_all()
    }

    fn sample(&mut self) -> *mut u8 {
        let _ = self.book.write(0);
        self.book.at
    }
}
