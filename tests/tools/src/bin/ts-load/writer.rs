//! One process that writes its memory page by page.

use crate::drive::Work;
use crate::pages::{Pages, Verdict};

pub struct Writer {
    pages: Pages,
    random: bool,
    state: u64,
}

impl Writer {
    pub fn new(bytes: usize, random: bool, shared: bool) -> Result<Self, String> {
        let pages = if shared { Pages::shared(bytes)? } else { Pages::new(bytes)? };
        Ok(Self { pages, random, state: 0x1234_5678_9ABC_DEF1 })
    }
}

impl Work for Writer {
    #[inline]
    fn step(&mut self) -> Result<(), String> {
        let count = self.pages.count() as u64;
        let index = if self.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            ((u128::from(self.state) * u128::from(count)) >> 64) as u64
        } else {
            self.state = (self.state + 1) % count;
            self.state
        };
        self.pages.write(index as usize);
        Ok(())
    }

    fn verify(&mut self) -> Result<Verdict, String> {
        Ok(self.pages.verify())
    }
}
