//! Which addresses of a task still wait for which pages: from where the memory is now to where it was when the images were written.
//! The two differ after mremap. Pure.
//!
//! A restored task waits while the first of these is made. What was not moved is a plain set of pages therefore ([`RangeSet`]), which is
//! there already: it is all of it then, and nearly all later.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::memory::{RangeSet, Space};

/// Neighbouring pages of a task that wait for neighbouring pages of its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where they are in the task now.
    pub start: u64,
    /// One past their last byte.
    pub end: u64,
    /// The address of the first in the space.
    pub image: u64,
}

impl Piece {
    /// The addresses in the space.
    pub fn images(&self) -> Range<u64> {
        self.image..self.image + (self.end - self.start)
    }

    /// The part inside `window`; the caller knows that they overlap.
    fn clip(&self, window: &Range<u64>) -> Self {
        let start = self.start.max(window.start);
        Self { start, end: self.end.min(window.end), image: self.image + (start - self.start) }
    }
}

/// The waiting pages of one task.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    /// What waits where it was: the address in the task is that in the space.
    still: RangeSet,
    /// What was moved, by where it is now: start -> (end, address in the space). Disjoint, and nothing of it is in `still`.
    moved: BTreeMap<u64, (u64, u64)>,
    bytes: u64,
}

impl Pieces {
    /// Pages that wait where they were.
    pub fn new(set: RangeSet) -> Self {
        Self { bytes: set.bytes(), still: set, moved: BTreeMap::new() }
    }

    /// Nothing waits?
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// How many bytes wait.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a piece; whatever waited at these addresses is forgotten.
    pub fn insert(&mut self, piece: Piece) {
        if piece.start >= piece.end {
            return;
        }
        self.remove(piece.start..piece.end);
        self.bytes += piece.end - piece.start;
        if piece.start == piece.image {
            self.still.insert(piece.images());
        } else {
            self.moved.insert(piece.start, (piece.end, piece.image));
        }
    }

    fn still(run: Range<u64>) -> Piece {
        Piece { start: run.start, end: run.end, image: run.start }
    }

    fn moved((start, &(end, image)): (&u64, &(u64, u64))) -> Piece {
        Piece { start: *start, end, image }
    }

    /// The piece that was moved to where an address is.
    fn moved_at(&self, address: u64) -> Option<Piece> {
        self.moved.range(..=address).next_back().map(Self::moved).filter(|p| p.end > address)
    }

    /// The piece that an address is in.
    pub fn at(&self, address: u64) -> Option<Piece> {
        self.moved_at(address).or_else(|| self.still.run_at(address).map(Self::still))
    }

    /// All that waits in a range of the task's addresses, ascending.
    fn ascending(&self, window: Range<u64>) -> impl Iterator<Item = Piece> {
        let first = self.moved_at(window.start).map_or(window.start, |p| p.start);
        // a range must not end before it begins
        let moved = self.moved.range(first..window.end.max(first));
        let mut still = self.still.overlapping(window.clone()).map(Self::still).peekable();
        let mut moved = moved.map(Self::moved).map(move |p| p.clip(&window)).peekable();
        std::iter::from_fn(move || match (still.peek(), moved.peek()) {
            (Some(s), Some(m)) if m.start < s.start => moved.next(),
            (None, _) => moved.next(),
            _ => still.next(),
        })
    }

    /// The rest of the piece at `address`, or else the first piece above it.
    pub fn next(&self, address: u64) -> Option<Piece> {
        self.ascending(address..u64::MAX).next()
    }

    /// Pieces from `address` on that are read at once: in the space they ascend as they do in the task, from the first to the end
    /// of the last no more than `most` bytes. Gaps between them are read for nothing, which is cheaper than a call for each.
    pub fn group(&self, address: u64, most: u64) -> Vec<Piece> {
        let mut all = self.ascending(address..u64::MAX).peekable();
        let Some(first) = all.peek() else { return Vec::new() };
        let (from, mut at) = (first.image, first.image);
        let mut group = Vec::new();
        for mut p in all {
            if p.image < at || p.image - from >= most {
                break;
            }
            let room = most - (p.image - from);
            p.end = p.end.min(p.start.saturating_add(room));
            at = p.images().end;
            group.push(p);
        }
        group
    }

    /// The parts of pieces in a range of the task's addresses.
    pub fn within(&self, window: Range<u64>) -> Vec<Piece> {
        self.ascending(window).collect()
    }

    /// Takes out what waits in a range of the task's addresses.
    pub fn take(&mut self, window: Range<u64>) -> Vec<Piece> {
        let taken = self.within(window.clone());
        self.remove(window);
        taken
    }

    /// Forgets what waits in a range of the task's addresses.
    pub fn remove(&mut self, window: Range<u64>) {
        self.bytes -= self.still.remove(window.clone());
        while let Some(whole) = self.moved_within(&window) {
            let gone = whole.clip(&window);
            self.moved.remove(&whole.start);
            if whole.start < gone.start {
                self.moved.insert(whole.start, (gone.start, whole.image));
            }
            if gone.end < whole.end {
                self.moved.insert(gone.end, (whole.end, gone.images().end));
            }
            self.bytes -= gone.end - gone.start;
        }
    }

    /// One that was moved to where this is.
    fn moved_within(&self, window: &Range<u64>) -> Option<Piece> {
        let last = self.moved.range(..window.end).next_back().map(Self::moved)?;
        (last.end > window.start && window.start < window.end).then_some(last)
    }

    /// Those that were moved, as what waits for these addresses of the space.
    fn moved_images(&self, images: &Range<u64>) -> impl Iterator<Item = Piece> {
        self.moved.iter().map(Self::moved).filter_map(move |p| {
            let at = p.images();
            let (start, end) = (at.start.max(images.start), at.end.min(images.end));
            let to = |image| p.start + (image - at.start);
            (start < end).then(|| Piece { start: to(start), end: to(end), image: start })
        })
    }

    /// Which of these addresses of the space are waited for.
    pub fn images_within(&self, images: Range<u64>) -> RangeSet {
        let moved = self.moved_images(&images).map(|p| p.images());
        self.still.overlapping(images.clone()).chain(moved).collect()
    }

    /// Takes out what waits for a range of the space's addresses.
    pub fn take_images(&mut self, images: Range<u64>) -> Vec<Piece> {
        let moved: Vec<Piece> = self.moved_images(&images).collect();
        let mut taken: Vec<Piece> = self.still.overlapping(images.clone()).map(Self::still).collect();
        self.bytes -= self.still.remove(images);
        moved.iter().for_each(|p| self.remove(p.start..p.end));
        taken.extend(moved);
        taken
    }

    /// The memory was moved (mremap): what waited at `from` waits at `to`.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.take(from..from.saturating_add(len));
        self.remove(to..to.saturating_add(len));
        for p in moved {
            let start = p.start - from + to;
            self.insert(Piece { start, end: start + (p.end - p.start), image: p.image });
        }
    }

    /// The addresses in the space that are waited for.
    pub fn images(&self) -> RangeSet {
        self.images_within(0..u64::MAX)
    }
}

/// Places that were filled and whose pages are to be given back, joined into large pieces: each costs a call.
#[derive(Debug, Default)]
pub struct Spent {
    all: Vec<(Space, Range<u64>)>,
    bytes: u64,
}

impl Spent {
    /// Pages between two places that are this near go with them, if nobody waits for them.
    const NEAR: u64 = 2 << 20;
    /// It is time once there are so many separate ranges.
    const RANGES: usize = 64;
    /// It is time once there are so many bytes: a fault waits while they are given back.
    const BYTES: u64 = 2 << 20;

    /// These are in their place.
    pub fn add(&mut self, space: Space, images: Range<u64>) {
        self.bytes += images.end - images.start;
        match self.all.last_mut() {
            Some((s, last))
                if *s == space && last.end <= images.start && images.start - last.end <= Self::NEAR =>
            {
                last.end = images.end;
            }
            _ => self.all.push((space, images)),
        }
    }

    /// Enough for a round of giving back?
    pub fn enough(&self) -> bool {
        self.all.len() >= Self::RANGES || self.bytes >= Self::BYTES
    }

    /// All of them.
    pub fn take(&mut self) -> Vec<(Space, Range<u64>)> {
        self.bytes = 0;
        std::mem::take(&mut self.all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = 4096;

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * P..range.end * P
    }

    /// The map as one image address for each page of a small space.
    fn model(p: &Pieces) -> Vec<Option<u64>> {
        (0..64).map(|a| p.at(a * P).map(|q| (q.image + (a * P - q.start)) / P)).collect()
    }

    #[test]
    fn what_is_spent_is_joined_with_what_is_near() {
        use crate::criu::ImageKind;
        let space = |id| Space { kind: ImageKind::Pid, id };
        let mut spent = Spent::default();
        spent.add(space(1), 0..4096);
        spent.add(space(1), 8192..12288);
        spent.add(space(1), (4 << 20)..(4 << 20) + 4096);
        spent.add(space(1), 16384..20480);
        spent.add(space(2), 20480..24576);
        assert!(!spent.enough());
        let all: Vec<_> = spent.take().into_iter().map(|(s, r)| (s.id, r)).collect();
        assert_eq!(
            all,
            [(1, 0..12288), (1, (4 << 20)..(4 << 20) + 4096), (1, 16384..20480), (2, 20480..24576)]
        );
        spent.add(space(1), 0..Spent::BYTES);
        assert!(spent.enough() && spent.take().len() == 1 && !spent.enough());
    }

    #[test]
    fn groups_are_read_at_once() {
        let mut pieces = Pieces::new([3..20, 30..34, 40..64, 100..110].into_iter().map(pages).collect());
        let spans = |p: &Pieces, at, most| -> Vec<_> {
            p.group(at * P, most * P).iter().map(|p| (p.start / P, p.end / P, p.image / P)).collect()
        };
        assert_eq!(spans(&pieces, 0, 40), [(3, 20, 3), (30, 34, 30), (40, 43, 40)]);
        assert_eq!(spans(&pieces, 43, 40), [(43, 64, 43)]);
        assert_eq!(spans(&pieces, 64, 4), [(100, 104, 100)]);
        assert!(spans(&pieces, 110, 40).is_empty());
        // what was moved lies elsewhere in the space, here before its neighbour
        pieces.remap(3 * P, 34 * P, 3 * P);
        assert_eq!(spans(&pieces, 30, 40), [(30, 34, 30)]);
        assert_eq!(spans(&pieces, 34, 60), [(34, 37, 3), (40, 63, 40)]);
    }

    #[test]
    fn agrees_with_a_table() {
        let mut seed = 3u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let mut pieces = Pieces::default();
        let mut want: Vec<Option<u64>> = vec![None; 64];
        for step in 0..30_000 {
            if step % 500 == 0 {
                pieces = Pieces::new([3..20, 30..64].into_iter().map(pages).collect());
                want =
                    (0..64).map(|a| (3..20).contains(&a).then_some(a).or((a >= 30).then_some(a))).collect();
            }
            let start = random(64);
            let end = (start + random(9)).min(64);
            match random(5) {
                0 => {
                    pieces.remove(pages(start..end));
                    want[start as usize..end as usize].fill(None);
                }
                1 => {
                    let got: Vec<u64> =
                        pieces.take(pages(start..end)).iter().flat_map(|p| p.start / P..p.end / P).collect();
                    let had: Vec<u64> = (start..end).filter(|a| want[*a as usize].is_some()).collect();
                    assert_eq!(got, had, "step {step}");
                    want[start as usize..end as usize].fill(None);
                }
                2 => {
                    let to = random(64 - (end - start));
                    let moved: Vec<Option<u64>> = want[start as usize..end as usize].to_vec();
                    want[start as usize..end as usize].fill(None);
                    want[to as usize..][..moved.len()].copy_from_slice(&moved);
                    pieces.remap(start * P, to * P, (end - start) * P);
                }
                3 => {
                    let taken = pieces.take_images(pages(start..end));
                    for a in want.iter_mut().filter(|a| a.is_some_and(|i| (start..end).contains(&i))) {
                        *a = None;
                    }
                    assert!(taken.iter().all(|p| p.image >= start * P && p.images().end <= end * P));
                }
                _ => {
                    let above = (start..64).find(|a| want[*a as usize].is_some());
                    assert_eq!(pieces.next(start * P).map(|p| p.start / P), above, "step {step}");
                }
            }
            assert_eq!(model(&pieces), want, "step {step}");
            assert_eq!(pieces.bytes(), want.iter().flatten().count() as u64 * P);
            assert_eq!(pieces.images().bytes(), pieces.bytes());
            let window = pages(start..end);
            assert_eq!(pieces.images_within(window.clone()), pieces.images().clip(window), "step {step}");
            assert_eq!(pieces.is_empty(), pieces.bytes() == 0);
        }
    }
}
