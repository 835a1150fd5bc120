//! What of a container's memory is still on the source while it runs on the destination already, and which pages of it go
//! next: those that somebody waits for, then those around them, then the rest. Pure; reading and sending is [`super::postcopy`]'s.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use anyhow::{Result, ensure};

use crate::memory::{RangeSet, Space};

/// Bytes in one answer: more requests than that are answered in several.
const ANSWER: u64 = 256 << 10;
/// Addresses around a page that somebody waited for.
const AROUND: u64 = 64 << 10;
/// The same, after a task that goes on and on.
const AROUND_MOST: u64 = 1 << 20;
/// Tasks (and threads) that are followed at the same time.
const TRAILS: usize = 16;
/// Surroundings that are remembered. What is forgotten comes with the rest.
const REMEMBERED: usize = 64;
/// Requests that wait here; far more than a destination has threads.
const MAX_WANTED: usize = 1 << 20;

/// The pages that are still here, and who waits for which.
#[derive(Debug, Default)]
pub(super) struct Remains {
    left: BTreeMap<Space, RangeSet>,
    wanted: VecDeque<(Space, Range<u64>)>,
    around: VecDeque<(Space, Range<u64>)>,
    trails: Trails,
}

impl Remains {
    /// All of these.
    pub fn new(left: &BTreeMap<Space, RangeSet>) -> Remains {
        let left = left.iter().filter(|(_, s)| !s.is_empty()).map(|(space, set)| (*space, set.clone()));
        Remains { left: left.collect(), ..Remains::default() }
    }

    /// Nothing left?
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.left.values().map(RangeSet::bytes).sum()
    }

    /// The destination needs none of it any more.
    pub fn clear(&mut self) {
        *self = Remains::default();
    }

    /// Somebody waits for these.
    ///
    /// # Errors
    /// Nobody can wait for so much.
    pub fn want(&mut self, space: Space, range: Range<u64>) -> Result<()> {
        ensure!(self.wanted.len() < MAX_WANTED, "the destination asks for more than it can use");
        self.wanted.push_back((space, range));
        Ok(())
    }

    /// Takes out what is waited for, one answer's worth of one space. Pages that are not here any more are on their way.
    pub fn urgent(&mut self) -> Option<(Space, RangeSet)> {
        let (space, mut pages, mut bytes) = (self.wanted.front()?.0, RangeSet::new(), 0);
        while bytes < ANSWER && self.wanted.front().is_some_and(|(s, _)| *s == space) {
            let Some((_, range)) = self.wanted.pop_front() else { break };
            if self.around.len() == REMEMBERED {
                self.around.pop_front();
            }
            self.around.push_back((space, self.trails.follow(space, range.clone())));
            bytes += self.take(space, range, u64::MAX, &mut pages);
        }
        Some((space, pages))
    }

    /// Takes out what goes next when nobody waits: about `most` bytes, of one space.
    pub fn next(&mut self, most: u64) -> Option<(Space, RangeSet)> {
        let (mut pages, mut bytes) = (RangeSet::new(), 0);
        // the latest first: where a task is now
        while let Some((space, range)) = self.around.pop_back() {
            bytes = self.take(space, range.clone(), most, &mut pages);
            if bytes == most {
                self.around.push_back((space, range));
            }
            if bytes > 0 {
                return Some((space, pages));
            }
        }
        let space = *self.left.first_key_value()?.0;
        while bytes < most
            && let Some(run) = self.left.get(&space).and_then(|left| left.iter().next())
        {
            bytes += self.take(space, run, most - bytes, &mut pages);
        }
        Some((space, pages))
    }

    /// These were taken out and could not be sent.
    pub fn give_back(&mut self, space: Space, pages: &RangeSet) {
        let left = self.left.entry(space).or_default();
        pages.iter().for_each(|run| left.insert(run));
    }

    /// Moves what is left of a range to `pages`, `most` bytes of it; returns how many.
    fn take(&mut self, space: Space, range: Range<u64>, most: u64, pages: &mut RangeSet) -> u64 {
        let Some(left) = self.left.get_mut(&space) else { return 0 };
        let (mut bytes, mut runs) = (0, Vec::new());
        for run in left.overlapping(range) {
            let run = run.start..run.end.min(run.start.saturating_add(most - bytes));
            bytes += run.end - run.start;
            runs.push(run);
            if bytes == most {
                break;
            }
        }
        for run in runs {
            left.remove(run.clone());
            pages.insert(run);
        }
        if left.is_empty() {
            self.left.remove(&space);
        }
        bytes
    }
}

/// Where tasks are on their way through memory.
#[derive(Debug, Default)]
struct Trails(VecDeque<(Space, Range<u64>)>);

impl Trails {
    /// Somebody waits for `wanted`: what he may want next. The surroundings; of one who reached the end of what he was given
    /// last time, as many addresses again and more.
    fn follow(&mut self, space: Space, wanted: Range<u64>) -> Range<u64> {
        let goes_on = |(s, given): &(Space, Range<u64>)| {
            *s == space && (given.end..given.end + AROUND).contains(&wanted.start)
        };
        let window = match self.0.iter().position(goes_on).and_then(|i| self.0.remove(i)) {
            Some((_, given)) => {
                let size = ((given.end - given.start) * 2).min(AROUND_MOST);
                wanted.start..wanted.start.saturating_add(size)
            }
            None => wanted.start & !(AROUND - 1)..(wanted.start | (AROUND - 1)).saturating_add(1),
        };
        if self.0.len() == TRAILS {
            self.0.pop_front();
        }
        self.0.push_back((space, window.clone()));
        window
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use crate::criu::ImageKind;

    const A: Space = Space { kind: ImageKind::Pid, id: 7 };
    const B: Space = Space { kind: ImageKind::Pid, id: 8 };
    const P: u64 = 4096;

    fn pages(all: &[Range<u64>]) -> RangeSet {
        all.iter().map(|r| r.start * P..r.end * P).collect()
    }

    fn remains(a: &[Range<u64>], b: &[Range<u64>]) -> Remains {
        Remains::new(&BTreeMap::from([(A, pages(a)), (B, pages(b))]))
    }

    #[test]
    fn the_rest_goes_in_steps_from_the_lowest_address() {
        let mut r = remains(&[0..2, 5..50], &[3..4]);
        assert_eq!(r.bytes(), 48 * P);
        assert_eq!(r.next(4 * P), Some((A, pages(&[0..2, 5..7]))));
        assert_eq!(r.next(1000 * P), Some((A, pages(&[7..50]))));
        assert_eq!(r.next(1000 * P), Some((B, pages(&[3..4]))));
        assert!(r.is_empty() && r.next(P).is_none() && r.bytes() == 0);
    }

    #[test]
    fn who_waits_is_answered_first_and_gets_what_is_around_next() {
        let mut r = remains(&[0..1000], &[0..10]);
        r.want(A, 500 * P..501 * P).unwrap();
        r.want(A, 900 * P..901 * P).unwrap();
        r.want(B, 5 * P..6 * P).unwrap();
        assert_eq!(
            r.urgent(),
            Some((A, pages(&[500..501, 900..901]))),
            "both in one answer, and nothing else"
        );
        assert_eq!(r.urgent(), Some((B, pages(&[5..6]))));
        assert_eq!(r.urgent(), None);
        // 16 pages around each, the latest first, and never twice
        assert_eq!(r.next(100 * P), Some((B, pages(&[0..5, 6..10]))));
        assert_eq!(r.next(10 * P), Some((A, pages(&[896..900, 901..907]))));
        assert_eq!(r.next(10 * P), Some((A, pages(&[907..912]))));
        assert_eq!(r.next(100 * P), Some((A, pages(&[496..500, 501..512]))));
        assert_eq!(r.next(10 * P), Some((A, pages(&[0..10]))));
    }

    #[test]
    fn every_page_is_taken_once() {
        let mut seed = 11u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let all: RangeSet = (0..2000).filter(|n| n % 3 != 1).map(|n| n * P..(n + 1) * P).collect();
        let mut r = Remains::new(&BTreeMap::from([(A, all.clone())]));
        let mut got = RangeSet::new();
        while !r.is_empty() {
            if random(2) == 0 {
                let at = random(2100) * P;
                r.want(A, at..at + P).unwrap();
            }
            let urgent = r.urgent();
            assert!(r.wanted.is_empty());
            for (_, some) in urgent.into_iter().chain(r.next(random(40) * P + P)) {
                assert!(some.intersection(&got).is_empty() && some.difference(&all).is_empty());
                got = got.union(&some);
            }
        }
        assert_eq!(got, all);
    }

    #[test]
    fn what_could_not_be_sent_is_still_here() {
        let mut r = remains(&[0..3], &[]);
        let (space, some) = r.next(2 * P).unwrap();
        r.give_back(space, &some);
        assert_eq!((r.bytes(), r.next(9 * P)), (3 * P, Some((A, pages(&[0..3])))));
    }

    #[test]
    fn a_task_that_goes_on_is_given_more_each_time_and_one_that_jumps_is_not() {
        let mut t = Trails::default();
        let page = |n: u64| n * P..(n + 1) * P;
        assert_eq!(t.follow(A, page(100)), 96 * P..112 * P);
        assert_eq!(t.follow(A, page(112)), 112 * P..144 * P);
        // another one in between, and the same address in another memory
        assert_eq!(t.follow(A, page(9000)), 8992 * P..9008 * P);
        assert_eq!(t.follow(B, page(144)), 144 * P..160 * P);
        assert_eq!(t.follow(A, page(147)), 147 * P..211 * P);
        for _ in 0..8 {
            let end = t.0.back().unwrap().1.end;
            t.follow(A, end..end + P);
        }
        let last = t.0.back().unwrap().1.clone();
        assert_eq!(last.end - last.start, AROUND_MOST);
        for n in 0..40 {
            t.follow(A, page(100_000 + n * 500));
        }
        assert_eq!(t.0.len(), TRAILS);
    }
}
