//! A set of address ranges that is changed in its middle, time and again: each change takes a search, however many ranges there
//! are. [`RangeSet`] is smaller and faster to combine as a whole, but moves everything behind the place that changes, which
//! with half a million single pages is milliseconds. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use super::RangeSet;

/// Sorted disjoint half-open ranges; neighbours are merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scattered {
    /// start -> end.
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Scattered {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing in it?
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many addresses are in it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|(start, end)| *start..*end)
    }

    /// The range that this address is in.
    pub fn run_at(&self, at: u64) -> Option<Range<u64>> {
        self.runs.range(..=at).next_back().map(|(start, end)| *start..*end).filter(|r| r.end > at)
    }

    /// The parts inside `window`, ascending.
    pub fn overlapping(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let from = self.run_at(window.start).map_or(window.start, |r| r.start);
        // a window that ends before it starts has nothing in it
        let to = window.end.max(from);
        self.runs
            .range(from..to)
            .map(move |(start, end)| (*start).max(window.start)..(*end).min(window.end))
            .filter(|r| r.start < r.end)
    }

    /// Adds a range.
    pub fn insert(&mut self, add: Range<u64>) {
        if add.start >= add.end {
            return;
        }
        let Range { mut start, mut end } = add;
        // whoever touches it or lies in it becomes a part of it
        while let Some((&s, &e)) = self.runs.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            (start, end) = (start.min(s), end.max(e));
            self.runs.remove(&s);
            self.bytes -= e - s;
        }
        self.runs.insert(start, end);
        self.bytes += end - start;
    }

    /// Takes a range out; how many addresses of it were there.
    pub fn remove(&mut self, gone: Range<u64>) -> u64 {
        if gone.start >= gone.end {
            return 0;
        }
        let mut removed = 0;
        while let Some((&s, &e)) = self.runs.range(..gone.end).next_back().filter(|(_, e)| **e > gone.start) {
            self.runs.remove(&s);
            let (start, end) = (s.max(gone.start), e.min(gone.end));
            if s < start {
                self.runs.insert(s, start);
            }
            if end < e {
                self.runs.insert(end, e);
            }
            removed += end - start;
        }
        self.bytes -= removed;
        removed
    }

    /// The same as a set that is good for everything else.
    pub fn to_set(&self) -> RangeSet {
        self.iter().collect()
    }
}

impl From<&RangeSet> for Scattered {
    fn from(set: &RangeSet) -> Self {
        Self { runs: set.iter().map(|r| (r.start, r.end)).collect(), bytes: set.bytes() }
    }
}

impl FromIterator<Range<u64>> for Scattered {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(all: I) -> Self {
        let mut set = Self::new();
        all.into_iter().for_each(|r| set.insert(r));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_other_kind_of_set() {
        let mut seed = 5u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let (mut this, mut that) = (Scattered::new(), RangeSet::new());
        for step in 0..30_000 {
            let start = random(200);
            let range = start..start + random(12);
            if random(2) == 0 {
                this.insert(range.clone());
                that.insert(range);
            } else {
                let had = that.clip(range.clone()).bytes();
                assert_eq!(this.remove(range.clone()), had, "step {step}");
                that.remove(range);
            }
            assert_eq!(this.to_set(), that, "step {step}");
            assert_eq!((this.bytes(), this.is_empty()), (that.bytes(), that.is_empty()));
            assert_eq!(Scattered::from(&that), this);
            let at = random(220);
            assert_eq!(this.run_at(at), that.run_at(at), "step {step}");
            let window = at..at + random(30);
            let (a, b): (Vec<_>, Vec<_>) =
                (this.overlapping(window.clone()).collect(), that.overlapping(window).collect());
            assert_eq!(a, b, "step {step}");
        }
    }
}
