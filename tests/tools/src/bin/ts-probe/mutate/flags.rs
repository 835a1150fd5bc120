//! What was advised about memory and stays with it (madvise: DONTFORK, DONTDUMP, HUGEPAGE, ...), as /proc/self/smaps says it. There is enough
//! memory that CRIU is told of its mappings by transship, not by the kernel.

use std::ops::Range;

use super::book::{Book, Checked, Random, advise};
use super::worker::{Behaviour, Setup};

const PAGES: usize = 24 << 8;
/// Pages of which the same is advised.
const BLOCK: usize = 64;
/// So many steps between two looks.
const LOOK: usize = 16;

/// Advice of which the last counts, and smaps' word for it.
type Choice = &'static [(i32, &'static str)];

const CHOICES: [Choice; 6] = [
    &[(libc::MADV_NORMAL, ""), (libc::MADV_SEQUENTIAL, "sr"), (libc::MADV_RANDOM, "rr")],
    &[(libc::MADV_DOFORK, ""), (libc::MADV_DONTFORK, "dc")],
    &[(libc::MADV_DODUMP, ""), (libc::MADV_DONTDUMP, "dd")],
    &[(libc::MADV_KEEPONFORK, ""), (libc::MADV_WIPEONFORK, "wf")],
    &[(libc::MADV_NOHUGEPAGE, "nh"), (libc::MADV_HUGEPAGE, "hg")],
    &[(libc::MADV_UNMERGEABLE, ""), (libc::MADV_MERGEABLE, "mg")],
];

pub struct Flags {
    memory: Book,
    /// Of each block, the word of each choice.
    words: Vec<[&'static str; CHOICES.len()]>,
    steps: usize,
    rng: Random,
}

impl Flags {
    pub fn new(setup: &Setup) -> Checked<Flags> {
        let mut memory = Book::private(PAGES, setup.salt)?;
        (0..PAGES).try_for_each(|page| memory.write(page))?;
        let words = vec![[""; CHOICES.len()]; PAGES / BLOCK];
        let mut flags = Flags { memory, words, steps: 0, rng: Random::new(setup.salt) };
        for _ in 0..PAGES / BLOCK {
            flags.advise();
        }
        Ok(flags)
    }

    /// Something else of one block. A kernel that does not know it leaves the block as it is.
    fn advise(&mut self) {
        let (block, n) = (self.rng.below(PAGES / BLOCK), self.rng.below(CHOICES.len()));
        let (advice, word) = CHOICES[n][self.rng.below(CHOICES[n].len())];
        if advise(self.memory.place(block * BLOCK), BLOCK, advice).is_ok() {
            self.words[block][n] = word;
        }
    }

    /// A move between two reads of the file tears it: what is wrong is wrong the second time, too.
    fn look(&self) -> Checked {
        self.look_once().or_else(|_| self.look_once())
    }

    fn look_once(&self) -> Checked {
        let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(|e| format!("smaps: {e}"))?;
        let mut said: Vec<(Range<usize>, &str)> = Vec::new();
        let mut at = 0..0;
        for line in smaps.lines() {
            let hex = |text: &str| usize::from_str_radix(text, 16).ok();
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                said.push((at.clone(), flags));
            } else if let Some((start, end)) = line.split_once(' ').and_then(|(word, _)| word.split_once('-'))
                && let (Some(start), Some(end)) = (hex(start), hex(end))
            {
                at = start..end;
            }
        }
        for (block, words) in self.words.iter().enumerate() {
            let place = self.memory.place(block * BLOCK) as usize;
            let mapping = said.iter().find(|(range, _)| range.contains(&place));
            let (_, flags) = mapping.ok_or_else(|| format!("block {block} is in no mapping"))?;
            for word in CHOICES.iter().flat_map(|choice| choice.iter()).map(|(_, word)| *word) {
                let (want, is) = (words.contains(&word), flags.split_whitespace().any(|flag| flag == word));
                if !word.is_empty() && want != is {
                    return Err(format!("block {block} is to have {words:?} and has{flags}"));
                }
            }
        }
        Ok(())
    }
}

impl Behaviour for Flags {
    fn step(&mut self) -> Checked {
        self.steps += 1;
        self.advise();
        let page = self.rng.below(PAGES);
        self.memory.check(page)?;
        self.memory.write(page)?;
        if self.steps.is_multiple_of(LOOK) { self.look() } else { Ok(()) }
    }

    fn verify(&mut self) -> Checked<usize> {
        self.look()?;
        (0..PAGES).try_for_each(|page| self.memory.check(page))?;
        Ok(PAGES)
    }

    fn sample(&mut self) -> *mut u8 {
        self.memory.at
    }
}
