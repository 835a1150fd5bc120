//! Sets of pages against the plainest of all: a flag for each page.

use super::*;

/// Pages that are compared: some chunks, and a bit.
const PAGES: u64 = 5 * CHUNK + 70;

fn flags(set: &RangeSet) -> Vec<bool> {
    let mut flags = vec![false; PAGES as usize];
    for run in set.iter() {
        flags[(run.start / PAGE) as usize..(run.end / PAGE) as usize].fill(true);
    }
    flags
}

/// Equal sets are equal inside.
fn well_formed(set: &RangeSet) -> bool {
    let mut runs = set.full.iter().peekable();
    let mut apart = true;
    while let Some((from, to)) = runs.next() {
        apart &= from < to && runs.peek().is_none_or(|(next, _)| to < next);
    }
    apart
        && set.part.iter().all(|(at, bits)| {
            *bits != ALL
                && *bits != [0; WORDS]
                && !set.full.iter().any(|(from, to)| (*from..*to).contains(at))
        })
        && set.iter().zip(set.iter().skip(1)).all(|(a, b)| a.end < b.start)
}

fn runs(flags: &[bool]) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    let mut at = 0;
    for same in flags.chunk_by(|a, b| a == b) {
        let end = at + same.len() as u64;
        if same[0] {
            all.push(at * PAGE..end * PAGE);
        }
        at = end;
    }
    all
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// Short and long ones, and some that begin or end with a chunk.
    fn range(&mut self) -> Range<u64> {
        let edge = |page: u64, snap: u64| if snap == 0 { page / CHUNK * CHUNK } else { page };
        let (page, snap) = (self.below(PAGES), self.below(4));
        let start = edge(page, snap);
        let most = if self.below(3) == 0 { 3 * CHUNK } else { 40 };
        let (page, snap) = ((start + self.below(most)).min(PAGES), self.below(4));
        start..edge(page, snap).max(start)
    }
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

#[test]
fn agrees_with_a_flag_for_each_page() {
    let mut random = Random(7);
    let (mut a, mut b) = (RangeSet::new(), RangeSet::new());
    let (mut flags_a, mut flags_b) = (flags(&a), flags(&b));
    for step in 0..3000 {
        let (set, want) = if random.below(2) == 0 { (&mut a, &mut flags_a) } else { (&mut b, &mut flags_b) };
        let pages = random.range();
        let add = random.below(2) == 0;
        if add {
            set.insert(bytes(&pages))
        } else {
            let were = want[pages.start as usize..pages.end as usize].iter().filter(|was| **was).count();
            assert_eq!(set.remove(bytes(&pages)), were as u64 * PAGE, "step {step}");
        }
        want[pages.start as usize..pages.end as usize].fill(add);
        assert!(well_formed(set), "step {step}: {set:?}");
        assert_eq!(set.iter().collect::<Vec<_>>(), runs(want), "step {step}: {pages:?}");
        assert_eq!(set.bytes(), want.iter().filter(|f| **f).count() as u64 * PAGE);
        assert_eq!((set.len(), set.is_empty()), (runs(want).len(), runs(want).is_empty()));
        assert_eq!(*set, runs(want).into_iter().collect(), "equal however it was made");
        let mut again = RangeSet::new();
        assert!(set.chunks().all(|chunk| again.append(chunk)), "step {step}");
        assert!(again == *set, "step {step}: {set:?}");
        let both = |of: fn(bool, bool) -> bool| {
            flags_a.iter().zip(&flags_b).map(|(a, b)| of(*a, *b)).collect::<Vec<_>>()
        };
        for (got, want) in [
            (a.union(&b), both(|a, b| a || b)),
            (a.intersection(&b), both(|a, b| a && b)),
            (a.difference(&b), both(|a, b| a && !b)),
        ] {
            assert!(well_formed(&got), "step {step}: {got:?}");
            assert!(flags(&got) == want, "step {step}: {a:?} {b:?}");
        }
        let at = random.below(PAGES) * PAGE + random.below(2) * 100;
        assert_eq!(a.contains(at), flags_a[(at / PAGE) as usize]);
        assert_eq!(a.run_at(at), a.iter().find(|r| r.contains(&at)), "step {step}: {at:#x} {a:?}");
        let window = bytes(&random.range());
        let inside = a.clip(window.clone());
        assert!(inside == a.intersection(&RangeSet::from(window.clone())) && well_formed(&inside));
        assert_eq!(a.overlapping(window.clone()).collect::<Vec<_>>(), inside.iter().collect::<Vec<_>>());
        let first_and_last = inside.iter().next().zip(inside.iter().last());
        assert_eq!(a.span(window), first_and_last.map(|(first, last)| first.start..last.end), "step {step}");
    }
}

#[test]
fn very_large_ranges_are_small() {
    let mut set = RangeSet::from(PAGE..1 << 57);
    assert_eq!((set.bytes(), set.len()), ((1 << 57) - PAGE, 1));
    set.remove(1 << 40..(1 << 40) + PAGE);
    assert_eq!(set.iter().collect::<Vec<_>>(), [PAGE..1 << 40, (1 << 40) + PAGE..1 << 57]);
    assert_eq!(set.run_at(1 << 41), Some((1 << 40) + PAGE..1 << 57));
    assert_eq!(set.span(0..1 << 50), Some(PAGE..1 << 50));
    assert!(set.weight() < 6, "{}", set.weight());
    let all = RangeSet::from(0..1 << 57);
    assert_eq!(all.difference(&set).iter().collect::<Vec<_>>(), [0..PAGE, 1 << 40..(1 << 40) + PAGE]);
    let reversed = Range { start: 2 * PAGE, end: PAGE };
    assert_eq!(all.overlapping(reversed.clone()).next(), None);
    assert!(all.clip(reversed).is_empty());
}
