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
