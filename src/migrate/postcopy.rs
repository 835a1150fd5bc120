//! Post-copy on the source: the tasks run on the destination, their last pages are still here. What a task waits for goes
//! first, the rest follows in the background. The frozen copy is kept until the destination has everything.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;

use super::capture::Context;
use super::codec::Kind;
use super::copier::Copier;
use super::live::Left;
use super::protocol::{Failure, Filled};
use super::report::{PostCopy, Sample, millis};
use crate::control::Event;
use crate::criu::ImageKind;
use crate::memory::sets::decode_want;
use crate::memory::tracker::Task;
use crate::memory::{RangeSet, Space};

/// Bytes of one background step: what a fault's answer may have to wait for.
const STEP: u64 = 256 << 10;

/// Between two samples of its course.
const SAMPLE: Duration = Duration::from_millis(20);

/// What the post-copy came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Served {
    /// How it went on, for the picture.
    pub course: PostCopy,
    /// Bytes of memory.
    pub bytes: u64,
    /// Requests of the destination.
    pub wanted: u64,
    /// Milliseconds until everything was sent.
    pub ms: f64,
}

/// Sends everything in `left`. On an error `left` is what the destination does not have.
pub(super) fn serve(
    cx: &Context<'_>,
    copier: &mut Copier,
    tasks: &[Task],
    left: &mut Left,
) -> Result<(Served, Filled)> {
    let begun = Instant::now();
    let mut served = Served::default();
    let mut wants = VecDeque::new();
    let total: u64 = left.values().map(RangeSet::bytes).sum();
    let mut shown = 0;
    let mut sampled = Instant::now();
    cx.link.wire().low_latency(true);
    while !left.is_empty() || !wants.is_empty() {
        if let Some(filled) = take_wants(cx, &mut wants)? {
            // what is left here was unmapped there, or its tasks have ended
            left.clear();
            served.ms = millis(begun.elapsed());
            return Ok((served, filled));
        }
        served.bytes += match wants.pop_front() {
            Some((space, range)) => {
                served.wanted += 1;
                copier.hurry(true);
                answer(cx, copier, tasks, left, space, range)?
            }
            None => {
                let (space, pages) = next(left);
                copier.hurry(false);
                send_left(cx, copier, tasks, left, space, &pages)?
            }
        };
        if sampled.elapsed() > SAMPLE {
            sampled = Instant::now();
            served.course.sample(Sample {
                at_ms: millis(begun.elapsed()),
                left_bytes: total - served.bytes,
                faults: served.wanted,
            });
        }
        if served.bytes - shown > 8 << 20 {
            shown = served.bytes;
            (cx.events)(Event::PostCopy { bytes: served.bytes, total });
        }
    }
    cx.link.json(Kind::MemoryDone, &serde_json::json!({}))?;
    cx.link.flush()?;
    served.ms = millis(begun.elapsed());
    Ok((served, filled(cx)?))
}

/// Waits for this message. Pages that are still here and that somebody there needs before are sent meanwhile: `want` gets what
/// is asked for.
pub(super) fn expect<M: DeserializeOwned>(
    cx: &Context<'_>,
    due: Kind,
    want: &mut dyn FnMut(Space, Range<u64>) -> Result<()>,
) -> Result<M> {
    loop {
        let asked = {
            let mut wire = cx.link.wire();
            match wire.recv()? {
                kind if kind == due => return wire.message(),
                Kind::MemoryWant => decode_want(wire.payload())?,
                Kind::Failed => return Err(wire.message::<Failure>()?.into()),
                kind => bail!("the peer sent {kind:?} where {due:?} was due"),
            }
        };
        want(asked.0, asked.1)?;
        cx.link.flush()?;
    }
}

/// Sends those of the wanted pages that are still here.
pub(super) fn answer(
    cx: &Context<'_>,
    copier: &mut Copier,
    tasks: &[Task],
    left: &mut Left,
    space: Space,
    range: Range<u64>,
) -> Result<u64> {
    let pages = left.get(&space).map(|l| l.clip(range)).unwrap_or_default();
    send_left(cx, copier, tasks, left, space, &pages)
}

fn send_left(
    cx: &Context<'_>,
    copier: &mut Copier,
    tasks: &[Task],
    left: &mut Left,
    space: Space,
    pages: &RangeSet,
) -> Result<u64> {
    if pages.is_empty() {
        return Ok(0);
    }
    copier.send_late(space, tasks, pages, cx.link, &|_| Ok(()))?;
    cx.link.flush()?;
    if let Some(rest) = left.get_mut(&space) {
        *rest = rest.difference(pages);
        if rest.is_empty() {
            left.remove(&space);
        }
    }
    Ok(pages.bytes())
}

/// Waits until the destination says that every page is in its place. What it asked for before the last pages came it has.
pub(super) fn filled(cx: &Context<'_>) -> Result<Filled> {
    expect(cx, Kind::MemoryDone, &mut |_, _| Ok(()))
}

/// Takes the destination's requests; `Some` if it has all it needs.
fn take_wants(cx: &Context<'_>, wants: &mut VecDeque<(Space, Range<u64>)>) -> Result<Option<Filled>> {
    let mut wire = cx.link.wire();
    while let Some(kind) = wire.try_recv()? {
        match kind {
            Kind::MemoryWant => {
                ensure!(wants.len() < 1 << 20, "the destination asks for more than it can use");
                wants.push_back(decode_want(wire.payload())?);
            }
            Kind::MemoryDone => return wire.message().map(Some),
            Kind::Failed => return Err(wire.message::<Failure>()?.into()),
            kind => bail!("the destination sent {kind:?} during the post-copy"),
        }
    }
    wire.alive().context("a sign of life")?;
    Ok(None)
}

/// The next pages in the background.
fn next(left: &Left) -> (Space, RangeSet) {
    let Some((space, pages)) = left.iter().next() else {
        return (Space { kind: ImageKind::Pid, id: 0 }, RangeSet::new());
    };
    let (mut some, mut bytes) = (RangeSet::new(), 0);
    for run in pages.iter() {
        let end = run.end.min(run.start + (STEP - bytes));
        bytes += end - run.start;
        some.insert(run.start..end);
        if bytes >= STEP {
            break;
        }
    }
    (*space, some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_background_goes_in_steps_from_the_lowest_address() {
        let space = Space { kind: ImageKind::Pid, id: 7 };
        let pages: RangeSet = [0..STEP / 2, STEP..3 * STEP].into_iter().collect();
        let left = Left::from([(space, pages)]);
        let (s, some) = next(&left);
        assert_eq!((s, some.bytes()), (space, STEP));
        assert_eq!(some.iter().collect::<Vec<_>>(), [0..STEP / 2, STEP..STEP + STEP / 2]);
        assert!(next(&Left::new()).1.is_empty());
    }
}
