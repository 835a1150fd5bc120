//! Sets of pages by their addresses (or offsets): what the destination has, what was written, what waits. Pure.
//!
//! Memory may be in very many pieces: of a GiB of jemalloc's every fourth page may be empty. Such sets are combined while tasks stand
//! still, and so a set is kept in chunks of 512 pages: of a chunk that is partly in it there is a bit for each page, neighbouring chunks that
//! are wholly in it are one entry. Combining two sets takes a few words for each chunk, a change in the middle takes a search.

mod walk;

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::fmt;
use std::ops::Range;

pub use walk::Runs;
use walk::{Cells, Walk, last_page};

/// Bytes of a page: sets are of these. The systems that we support have no others (see [`super::tracker`]).
const PAGE: u64 = 4096;
const WORDS: usize = 8;
/// Pages of a chunk.
pub const CHUNK: u64 = 64 * WORDS as u64;
const ALL: Bits = [!0; WORDS];

/// A bit for each page of a chunk.
pub type Bits = [u64; WORDS];

/// Neighbouring chunks as they stand in a set, for the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Numbers of chunks: addresses by [`CHUNK`] pages. More than one only if all of their pages are in the set.
    pub at: Range<u64>,
    /// A bit for each page.
    pub bits: Bits,
}

/// A set of pages, given and taken as half-open ranges of addresses that begin and end with a page.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Chunks all of whose pages are in it: the first of neighbours -> the one behind the last. There is always a gap between two.
    full: BTreeMap<u64, u64>,
    /// Chunks of which some pages are in it and some are not.
    part: BTreeMap<u64, Bits>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing in it?
    pub fn is_empty(&self) -> bool {
        self.full.is_empty() && self.part.is_empty()
    }

    /// How many bytes its pages have.
    pub fn bytes(&self) -> u64 {
        let full: u64 = self.full.iter().map(|(from, to)| (to - from) * CHUNK).sum();
        let part: u64 = self.part.values().map(count).sum();
        (full + part) * PAGE
    }

    /// The ranges, ascending; none touches the next.
    pub fn iter(&self) -> Runs<'_> {
        self.overlapping(0..u64::MAX)
    }

    /// How many separate ranges. Counts them.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// How much memory it takes, in entries of some 100 bytes.
    pub fn weight(&self) -> usize {
        self.full.len() + self.part.len()
    }

    /// What it is made of, ascending.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let mut full = self.full.iter().map(|(from, to)| Chunk { at: *from..*to, bits: ALL }).peekable();
        let mut part = self.part.iter().map(|(at, bits)| Chunk { at: *at..*at + 1, bits: *bits }).peekable();
        std::iter::from_fn(move || match (full.peek(), part.peek()) {
            (Some(f), Some(p)) if f.at.start < p.at.start => full.next(),
            (_, None) => full.next(),
            _ => part.next(),
        })
    }

    /// Adds a chunk behind all others. False if that is impossible: nothing was done.
    #[must_use]
    pub fn append(&mut self, Chunk { at, bits }: Chunk) -> bool {
        let full = self.full.last_key_value().map_or(0, |(_, to)| *to);
        let part = self.part.last_key_value().map_or(0, |(at, _)| at + 1);
        let fits = full.max(part) <= at.start && at.start < at.end && at.end <= u64::MAX / (CHUNK * PAGE);
        let one = at.end.wrapping_sub(at.start) == 1;
        match bits {
            ALL if fits => self.fill(at),
            bits if fits && one && bits != [0; WORDS] => drop(self.part.insert(at.start, bits)),
            _ => return false,
        }
        true
    }

    /// Is this address in it?
    pub fn contains(&self, at: u64) -> bool {
        let page = at / PAGE;
        self.cells(page / CHUNK).has(page % CHUNK)
    }

    /// The range that this address is in.
    pub fn run_at(&self, at: u64) -> Option<Range<u64>> {
        let end = self.overlapping(at / PAGE * PAGE..u64::MAX).next().filter(|run| run.contains(&at))?.end;
        let mut first = at / PAGE;
        // to the left as far as it goes
        while let Some(before) = first.checked_sub(1) {
            let chunk = before / CHUNK;
            let from = match self.cells(chunk) {
                Cells::None => break,
                Cells::All => self.full_run(chunk).map_or(chunk, |run| run.start) * CHUNK,
                Cells::Some(bits) => {
                    chunk * CHUNK + last_page(bits, before % CHUNK, !0).map_or(0, |gap| gap + 1)
                }
            };
            if from == first {
                break;
            }
            first = from;
        }
        Some(first * PAGE..end)
    }

    /// The parts inside `window`, ascending.
    pub fn overlapping(&self, window: Range<u64>) -> Runs<'_> {
        let (at, end) = (window.start.div_ceil(PAGE), window.end / PAGE);
        Runs::new(self, at, end)
    }

    /// From the first address inside `window` to the end of the last.
    pub fn span(&self, window: Range<u64>) -> Option<Range<u64>> {
        let first = self.overlapping(window.clone()).next()?.start;
        let mut end = window.end / PAGE;
        loop {
            let chunk = (end - 1) / CHUNK;
            let last = match self.cells(chunk) {
                Cells::All => Some(end),
                Cells::Some(bits) => {
                    last_page(bits, (end - 1) % CHUNK, 0).map(|page| chunk * CHUNK + page + 1)
                }
                Cells::None => None,
            };
            if let Some(last) = last {
                return Some(first..last * PAGE);
            }
            let full = self.full.range(..chunk).next_back().map(|(_, to)| *to);
            let part = self.part.range(..chunk).next_back().map(|(at, _)| at + 1);
            end = full.max(part)? * CHUNK;
        }
    }

    fn cells(&self, chunk: u64) -> Cells<'_> {
        match self.part.get(&chunk) {
            Some(bits) => Cells::Some(bits),
            None if self.full_run(chunk).is_some() => Cells::All,
            None => Cells::None,
        }
    }

    fn full_run(&self, chunk: u64) -> Option<Range<u64>> {
        self.full.range(..=chunk).next_back().map(|(from, to)| *from..*to).filter(|run| run.contains(&chunk))
    }

    /// Adds a range.
    pub fn insert(&mut self, add: Range<u64>) {
        if self.appended(&add) {
            return;
        }
        let Some(pieces) = Pieces::of(&add) else { return };
        for (chunk, bits) in pieces.ends.into_iter().flatten() {
            if self.full_run(chunk).is_some() {
                continue;
            }
            let all = self.part.entry(chunk).or_default();
            *all = zip(all, &bits, |a, b| a | b);
            if *all == ALL {
                self.fill(chunk..chunk + 1);
            }
        }
        self.fill(pieces.whole);
    }

    /// The usual case, very often: one range after the other, most of them in the last chunk. False: nothing was done.
    fn appended(&mut self, add: &Range<u64>) -> bool {
        let (from, to) = (add.start / PAGE, add.end / PAGE);
        let Some(mut last) = self.part.last_entry().filter(|_| from < to) else { return false };
        let (chunk, word) = (*last.key(), (from % CHUNK / 64) as usize);
        let same_word = from / CHUNK == chunk && from / 64 == (to - 1) / 64;
        if same_word {
            let bits = last.get_mut();
            bits[word] |= !0 >> (63 - (to - 1) % 64) & !0 << (from % 64);
            if *bits == ALL {
                self.fill(chunk..chunk + 1);
            }
        }
        same_word
    }

    /// Takes a range out. Returns how many bytes of it were there.
    pub fn remove(&mut self, gone: Range<u64>) -> u64 {
        let Some(pieces) = Pieces::of(&gone) else { return 0 };
        let mut pages = 0;
        for (chunk, bits) in pieces.ends.into_iter().flatten() {
            if self.full_run(chunk).is_some() {
                self.empty(chunk..chunk + 1);
                self.part.insert(chunk, ALL);
            }
            if let btree_map::Entry::Occupied(mut left) = self.part.entry(chunk) {
                pages += count(&zip(left.get(), &bits, |a, b| a & b));
                *left.get_mut() = zip(left.get(), &bits, |a, b| a & !b);
                if *left.get() == [0; WORDS] {
                    left.remove();
                }
            }
        }
        (pages + self.empty(pieces.whole)) * PAGE
    }

    /// Whole chunks are in it now.
    fn fill(&mut self, Range { start, end }: Range<u64>) {
        if start >= end {
            return;
        }
        self.forget_parts(start..end);
        let (mut from, mut to) = (start, end);
        while let Some((&f, &t)) = self.full.range(..=to).next_back().filter(|(_, t)| **t >= from) {
            (from, to) = (from.min(f), to.max(t));
            self.full.remove(&f);
        }
        self.full.insert(from, to);
    }

    /// Whole chunks are out of it now. Returns how many pages they had.
    fn empty(&mut self, Range { start, end }: Range<u64>) -> u64 {
        if start >= end {
            return 0;
        }
        let mut pages = self.forget_parts(start..end);
        while let Some((&f, &t)) = self.full.range(..end).next_back().filter(|(_, t)| **t > start) {
            self.full.remove(&f);
            if f < start {
                self.full.insert(f, start);
            }
            if end < t {
                self.full.insert(end, t);
            }
            pages += (t.min(end) - f.max(start)) * CHUNK;
        }
        pages
    }

    /// Returns how many pages they had.
    fn forget_parts(&mut self, chunks: Range<u64>) -> u64 {
        let mut pages = 0;
        while let Some((&chunk, bits)) = self.part.range(chunks.clone()).next() {
            pages += count(bits);
            self.part.remove(&chunk);
        }
        pages
    }

    /// Everything that is in one of the two.
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a | b)
    }

    /// What is in both.
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & b)
    }

    /// What is in this one and not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    /// Page by page; `of` gives nothing where there is nothing.
    fn combine(&self, other: &Self, of: impl Fn(u64, u64) -> u64) -> Self {
        let (mut mine, mut theirs) = (Walk::new(self, 0), Walk::new(other, 0));
        let (mut full, mut part) = (Vec::<(u64, u64)>::new(), Vec::new());
        let mut chunk = 0;
        while chunk < u64::MAX {
            let ((a, a_until), (b, b_until)) = (mine.at(chunk), theirs.at(chunk));
            let until = a_until.min(b_until);
            let bits = std::array::from_fn(|i| of(a.word(i), b.word(i)));
            match bits {
                ALL => match full.last_mut() {
                    Some((_, to)) if *to == chunk => *to = until,
                    _ => full.push((chunk, until)),
                },
                // of more than one chunk none or all pages are in it
                bits if bits != [0; WORDS] => part.push((chunk, bits)),
                _ => {}
            }
            chunk = until;
        }
        Self { full: full.into_iter().collect(), part: part.into_iter().collect() }
    }

    /// The part of it inside `window`.
    pub fn clip(&self, window: Range<u64>) -> Self {
        self.intersection(&Self::from(window))
    }
}

fn count(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

fn zip(a: &Bits, b: &Bits, of: impl Fn(u64, u64) -> u64) -> Bits {
    std::array::from_fn(|i| of(a[i], b[i]))
}

/// A range as chunks.
struct Pieces {
    /// Its first and its last chunk, where that is not whole.
    ends: [Option<(u64, Bits)>; 2],
    whole: Range<u64>,
}

impl Pieces {
    /// None for an empty one.
    fn of(range: &Range<u64>) -> Option<Self> {
        debug_assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE), "{range:#x?}");
        let (from, to) = (range.start / PAGE, range.end / PAGE);
        if from >= to {
            return None;
        }
        let whole = from.div_ceil(CHUNK)..to / CHUNK;
        let end = |chunk: u64| {
            let within = from.max(chunk * CHUNK)..to.min((chunk + 1) * CHUNK);
            (chunk, mask(within.start % CHUNK, within.end - chunk * CHUNK))
        };
        let first = (!from.is_multiple_of(CHUNK)).then(|| end(from / CHUNK));
        let last = (!to.is_multiple_of(CHUNK) && whole.start <= whole.end).then(|| end(to / CHUNK));
        Some(Self { ends: [first, last], whole })
    }
}

/// The pages from one to before the other.
fn mask(from: u64, to: u64) -> Bits {
    std::array::from_fn(|i| {
        let base = i as u64 * 64;
        let below = |n: u64| match n.saturating_sub(base) {
            n if n >= 64 => !0,
            n => (1u64 << n) - 1,
        };
        below(to) & !below(from)
    })
}

impl From<Range<u64>> for RangeSet {
    fn from(one: Range<u64>) -> Self {
        Self::from_iter([one])
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(all: I) -> Self {
        let mut set = Self::new();
        all.into_iter().for_each(|r| set.insert(r));
        set
    }
}

impl fmt::Debug for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = |r: Range<u64>| format!("{:x}-{:x}", r.start, r.end);
        f.debug_set().entries(self.iter().map(|r| format_args!("{}", run(r)).to_string())).finish()
    }
}

#[cfg(test)]
mod tests;
