//! Protecting right before reading, portion by portion. To read all memory takes seconds: a page that the look at its beginning had
//! protected would cost its writer a fault meanwhile, and be found by the next look, and what is read would have that write in it
//! already. So the first look at anonymous memory may leave it unprotected ([`Tracker::protect_late`]), and who reads goes this way.

use anyhow::Result;

use super::{Source, Tracker};
use crate::memory::RangeSet;

/// Bytes of addresses that are protected at once: few enough to be read some milliseconds later, and whole huge pages.
const PORTION: u64 = 4 << 20;

/// Gives `read` what is to be read of `source`, ascending and protected: `pages`, which a look has named, and what else is found to be written
/// where they are.
///
/// # Errors
/// Those of `read`, and of the kernel.
pub fn in_portions(
    tracker: &mut dyn Tracker,
    source: &Source,
    pages: &RangeSet,
    read: &mut dyn FnMut(&mut dyn Tracker, &RangeSet) -> Result<()>,
) -> Result<()> {
    if !tracker.is_late(source) {
        return read(tracker, pages);
    }
    let mut at = 0;
    while let Some(first) = pages.overlapping(at..u64::MAX).next() {
        let begin = first.start & !(PORTION - 1);
        at = begin + PORTION;
        let more = tracker.protect(source, begin..at)?;
        read(tracker, &pages.clip(begin..at).union(&more))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::{Found, Task, TrackerKind};
    use super::*;

    /// Everything was written since the look, in what it is asked about.
    struct AllWritten(bool);

    impl Tracker for AllWritten {
        fn kind(&self) -> TrackerKind {
            TrackerKind::UffdWp
        }

        fn look(&mut self, _: &[Task], _: bool) -> Result<Vec<Found>> {
            Ok(Vec::new())
        }

        fn is_late(&self, _: &Source) -> bool {
            self.0
        }

        fn protect(&mut self, _: &Source, window: Range<u64>) -> Result<RangeSet> {
            Ok(RangeSet::from(window))
        }

        fn stop(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn portions_with_named_pages_are_read_whole_and_in_order() {
        let at = |portions: u64, pages: u64| portions * PORTION + pages * 4096;
        let pages: RangeSet =
            [at(0, 3)..at(0, 4), at(1, 1023)..at(2, 1), at(900, 0)..at(901, 0)].into_iter().collect();
        let portions = |late| {
            let mut all = Vec::new();
            let mut read = |_: &mut dyn Tracker, pages: &RangeSet| {
                all.push(pages.clone());
                Ok(())
            };
            in_portions(&mut AllWritten(late), &Source::Task(1), &pages, &mut read).unwrap();
            all
        };
        assert_eq!(portions(true), [0, 1, 2, 900].map(|n| RangeSet::from(at(n, 0)..at(n + 1, 0))));
        assert_eq!(portions(false), std::slice::from_ref(&pages));
    }
}
