//! Sets of address ranges: half-open, disjoint, sorted; neighbours are merged. Pure.

use std::ops::Range;

/// A set of addresses (or offsets), kept as sorted disjoint half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    runs: Vec<Range<u64>>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing in it?
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many addresses are in it (bytes, when it holds addresses).
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|r| r.end - r.start).sum()
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.runs.iter().cloned()
    }

    /// How many separate ranges.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Is this address in it?
    pub fn contains(&self, at: u64) -> bool {
        let i = self.runs.partition_point(|r| r.end <= at);
        self.runs.get(i).is_some_and(|r| r.start <= at)
    }

    /// The range that this address is in. Takes a binary search.
    pub fn run_at(&self, at: u64) -> Option<Range<u64>> {
        let i = self.runs.partition_point(|r| r.end <= at);
        self.runs.get(i).filter(|r| r.start <= at).cloned()
    }

    /// The parts inside `window`, ascending. Takes a binary search, however large the set is.
    pub fn overlapping(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let from = self.runs.partition_point(|r| r.end <= window.start);
        self.runs[from..]
            .iter()
            .take_while(move |r| r.start < window.end && window.start < window.end)
            .map(move |r| r.start.max(window.start)..r.end.min(window.end))
    }

    /// Adds a range. Appending in ascending order is cheap.
    pub fn insert(&mut self, add: Range<u64>) {
        if add.start >= add.end {
            return;
        }
        if self.runs.last().is_none_or(|last| last.end < add.start) {
            self.runs.push(add);
            return;
        }
        let from = self.runs.partition_point(|r| r.end < add.start);
        let to = self.runs.partition_point(|r| r.start <= add.end);
        let joined = match self.runs.get(from..to) {
            Some([first, .., last]) => first.start.min(add.start)..last.end.max(add.end),
            Some([one]) => one.start.min(add.start)..one.end.max(add.end),
            _ => add,
        };
        self.runs.splice(from..to, [joined]);
    }

    /// Takes a range out.
    pub fn remove(&mut self, gone: Range<u64>) {
        if gone.start >= gone.end {
            return;
        }
        let from = self.runs.partition_point(|r| r.end <= gone.start);
        let to = self.runs.partition_point(|r| r.start < gone.end);
        if from >= to {
            return;
        }
        let (first, last) = (self.runs[from].start, self.runs[to - 1].end);
        let left = (first < gone.start).then_some(first..gone.start);
        let right = (last > gone.end).then_some(gone.end..last);
        self.runs.splice(from..to, left.into_iter().chain(right));
    }

    /// Everything that is in one of the two.
    pub fn union(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        let mut out: Vec<Range<u64>> = Vec::with_capacity(self.runs.len().max(other.runs.len()));
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start <= y.start => a.next(),
                (_, Some(_)) => b.next(),
                (Some(_), None) => a.next(),
                (None, None) => return Self { runs: out },
            };
            let Some(next) = next else { continue };
            match out.last_mut() {
                Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
                _ => out.push(next.clone()),
            }
        }
    }

    /// What is in both.
    pub fn intersection(&self, other: &Self) -> Self {
        self.intersect(other.iter())
    }

    /// What is in this one and in ranges that ascend and do not overlap.
    pub fn intersect(&self, others: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut out = Vec::new();
        let mut i = 0;
        for other in others {
            while self.runs.get(i).is_some_and(|run| run.end <= other.start) {
                i += 1;
            }
            while let Some(run) = self.runs.get(i).filter(|run| run.start < other.end) {
                out.push(run.start.max(other.start)..run.end.min(other.end));
                // the rest of it may be in the next one
                if run.end > other.end {
                    break;
                }
                i += 1;
            }
            if i == self.runs.len() {
                break;
            }
        }
        Self { runs: out }
    }

    /// What is in this one and not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        let mut out = Vec::new();
        let mut j = 0;
        for run in &self.runs {
            let mut at = run.start;
            while other.runs.get(j).is_some_and(|o| o.end <= at) {
                j += 1;
            }
            let mut k = j;
            while let Some(o) = other.runs.get(k).filter(|o| o.start < run.end) {
                if o.start > at {
                    out.push(at..o.start);
                }
                at = at.max(o.end);
                k += 1;
            }
            if at < run.end {
                out.push(at..run.end);
            }
        }
        Self { runs: out }
    }

    /// The part of it inside `window`.
    pub fn clip(&self, window: Range<u64>) -> Self {
        Self { runs: self.overlapping(window).collect() }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A set over 64 addresses as a bit mask, to compare with.
    fn mask(s: &RangeSet) -> u64 {
        s.iter().flat_map(|r| r.start..r.end).fold(0, |m, a| m | 1 << a)
    }

    fn well_formed(s: &RangeSet) -> bool {
        s.runs.iter().all(|r| r.start < r.end) && s.runs.windows(2).all(|w| w[0].end < w[1].start)
    }

    #[test]
    fn agrees_with_bit_masks() {
        let mut seed = 7u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let (mut a, mut b) = (RangeSet::new(), RangeSet::new());
        for step in 0..20_000 {
            let set = if random(2) == 0 { &mut a } else { &mut b };
            let start = random(64);
            let range = start..(start + random(12)).min(64);
            let bits = (range.start..range.end).fold(0u64, |m, x| m | 1 << x);
            let before = mask(set);
            let want = if random(2) == 0 {
                set.insert(range);
                before | bits
            } else {
                set.remove(range);
                before & !bits
            };
            assert_eq!(mask(set), want, "step {step}");
            assert_eq!(set.bytes(), u64::from(want.count_ones()));
            for (got, want) in [
                (a.union(&b), mask(&a) | mask(&b)),
                (a.intersection(&b), mask(&a) & mask(&b)),
                (a.difference(&b), mask(&a) & !mask(&b)),
            ] {
                assert!(well_formed(&got), "{got:?}");
                assert_eq!(mask(&got), want, "step {step}: {a:?} {b:?}");
            }
            assert!(well_formed(&a) && well_formed(&b));
            let at = random(64);
            assert_eq!(a.contains(at), mask(&a) >> at & 1 == 1);
            assert_eq!(a.run_at(at), a.iter().find(|r| r.contains(&at)));
            let window = at..(at + random(12)).min(64);
            assert_eq!(a.clip(window.clone()), a.intersection(&RangeSet::from(window)));
        }
    }
}
