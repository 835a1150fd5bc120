//! Going through a set: chunk after chunk, and range after range. What a set is made of is said in [`super`].

use std::collections::btree_map::Range as Entries;
use std::iter::Peekable;
use std::ops::Range;

use super::{Bits, CHUNK, PAGE, RangeSet};

/// What of a chunk is in a set.
#[derive(Clone, Copy)]
pub(super) enum Cells<'a> {
    None,
    All,
    Some(&'a Bits),
}

impl Cells<'_> {
    pub(super) fn word(self, i: usize) -> u64 {
        match self {
            Cells::None => 0,
            Cells::All => !0,
            Cells::Some(bits) => bits[i],
        }
    }

    pub(super) fn has(self, page: u64) -> bool {
        self.word((page / 64) as usize) >> (page % 64) & 1 == 1
    }
}

/// The first page from this one on that is in it, or with `wanted` all ones the first that is not; [`CHUNK`] without.
fn next_page(bits: &Bits, from: u64, wanted: u64) -> u64 {
    let mut from = from;
    while from < CHUNK {
        let word = (bits[(from / 64) as usize] ^ wanted) >> (from % 64);
        if word != 0 {
            return from + u64::from(word.trailing_zeros());
        }
        from = (from / 64 + 1) * 64;
    }
    CHUNK
}

/// The last page up to this one that is in it, or with `wanted` all ones the last that is not.
pub(super) fn last_page(bits: &Bits, to: u64, wanted: u64) -> Option<u64> {
    let mut below = !0 >> (63 - to % 64);
    (0..=to / 64).rev().find_map(|i| {
        let word = (bits[i as usize] ^ wanted) & std::mem::replace(&mut below, !0);
        (word != 0).then(|| i * 64 + 63 - u64::from(word.leading_zeros()))
    })
}

/// What a set has, chunk after chunk.
pub(super) struct Walk<'a> {
    full: Peekable<Entries<'a, u64, u64>>,
    part: Peekable<Entries<'a, u64, Bits>>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(set: &'a RangeSet, chunk: u64) -> Self {
        let from = set.full_run(chunk).map_or(chunk, |run| run.start);
        Walk { full: set.full.range(from..).peekable(), part: set.part.range(chunk..).peekable() }
    }

    /// What there is of this chunk, and up to which one it is the same. Chunks are asked for in ascending order.
    pub(super) fn at(&mut self, chunk: u64) -> (Cells<'a>, u64) {
        while self.full.next_if(|(_, to)| **to <= chunk).is_some() {}
        while self.part.next_if(|(at, _)| **at < chunk).is_some() {}
        match (self.full.peek(), self.part.peek()) {
            (Some((from, to)), _) if **from <= chunk => (Cells::All, **to),
            (_, Some((at, bits))) if **at == chunk => (Cells::Some(bits), chunk + 1),
            (full, part) => {
                let next = |at: Option<u64>| at.unwrap_or(u64::MAX);
                (Cells::None, next(full.map(|f| *f.0)).min(next(part.map(|p| *p.0))))
            }
        }
    }
}

/// The ranges of a set within a window: see [`RangeSet::iter`].
pub struct Runs<'a> {
    walk: Walk<'a>,
    /// What there is at `at`, up to the chunk `until`.
    cells: Cells<'a>,
    until: u64,
    /// The next page, and the first that is of no interest.
    at: u64,
    end: u64,
}

impl<'a> Runs<'a> {
    /// The pages from `at` to before `end`.
    pub(super) fn new(set: &'a RangeSet, at: u64, end: u64) -> Self {
        Runs { walk: Walk::new(set, at / CHUNK), cells: Cells::None, until: 0, at, end }
    }

    /// Goes on to the first page that is in the set, or with `wanted` all ones to the first that is not.
    fn skip(&mut self, wanted: u64) {
        while self.at < self.end {
            let chunk = self.at / CHUNK;
            if chunk >= self.until {
                (self.cells, self.until) = self.walk.at(chunk);
            }
            let next = match self.cells {
                Cells::Some(bits) => next_page(bits, self.at % CHUNK, wanted),
                uniform if uniform.word(0) != wanted => return,
                _ => {
                    self.at = self.until.saturating_mul(CHUNK);
                    continue;
                }
            };
            self.at = chunk * CHUNK + next;
            if next < CHUNK {
                return;
            }
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        self.skip(0);
        let start = self.at;
        if start >= self.end {
            return None;
        }
        self.skip(!0);
        Some(start * PAGE..self.at.min(self.end) * PAGE)
    }
}
