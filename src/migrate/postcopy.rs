//! Post-copy on the source: the tasks run on the destination, their last pages are still here. What a task waits for goes
//! first, the rest follows in the background. The frozen copy is kept until the destination has everything.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::de::DeserializeOwned;

use super::capture::Context;
use super::codec::Kind;
use super::copier::Copier;
use super::protocol::{Failure, Filled};
use super::remains::Remains;
use super::report::{PostCopy, Sample, millis};
use crate::control::Event;
use crate::memory::sets::decode_want;
use crate::memory::tracker::Task;
use crate::memory::{RangeSet, Space};

/// How long one background step may take: what a fault's answer may have to wait for.
const STEP: f64 = 0.001;
/// The same in bytes, at least and at most.
const STEP_BYTES: Range<u64> = 64 << 10..1 << 20;

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
    left: &mut Remains,
) -> Result<(Served, Filled)> {
    let begun = Instant::now();
    let mut served = Served::default();
    let total = left.bytes();
    let mut shown = 0;
    let mut sampled = begun;
    // the background stands still until then, by the bandwidth limit; answers do not
    let mut resting = begun;
    cx.link.wire().low_latency(true);
    while !left.is_empty() {
        if let Some(filled) = take_wants(cx, left, &mut served.wanted)? {
            // what is left here was unmapped there, or its tasks have ended
            left.clear();
            served.ms = millis(begun.elapsed());
            return Ok((served, filled));
        }
        while let Some((space, pages)) = left.urgent() {
            served.bytes += send(cx, copier, tasks, left, space, &pages)?.memory;
        }
        let rest = resting.saturating_duration_since(Instant::now());
        if !rest.is_zero() {
            wait_for_wants(cx, rest)?;
        } else if let Some((space, pages)) = left.next(step(copier.rate())) {
            let sent = send(cx, copier, tasks, left, space, &pages)?;
            served.bytes += sent.memory;
            resting = Instant::now() + copier.owed(sent.wire);
        }
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

/// Bytes of one background step over a link that takes so many a second, whole pages.
fn step(link_rate: Option<f64>) -> u64 {
    let bytes = link_rate.map_or(STEP_BYTES.end, |rate| (rate * STEP) as u64);
    bytes.clamp(STEP_BYTES.start, STEP_BYTES.end) & !(STEP_BYTES.start - 1)
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
    left: &mut Remains,
    space: Space,
    range: Range<u64>,
) -> Result<()> {
    left.want(space, range)?;
    while let Some((space, pages)) = left.urgent() {
        send(cx, copier, tasks, left, space, &pages)?;
    }
    Ok(())
}

/// What was sent, in bytes.
#[derive(Default)]
struct Sent {
    memory: u64,
    wire: u64,
}

/// Sends pages that were taken out of `left`.
fn send(
    cx: &Context<'_>,
    copier: &mut Copier,
    tasks: &[Task],
    left: &mut Remains,
    space: Space,
    pages: &RangeSet,
) -> Result<Sent> {
    if pages.is_empty() {
        return Ok(Sent::default());
    }
    let sent = copier.send_late(space, tasks, pages, cx.link, &|_| Ok(()));
    match sent.and_then(|copied| cx.link.flush().map(|()| copied)) {
        Ok(copied) => Ok(Sent { memory: pages.bytes(), wire: copied.wire_bytes }),
        Err(e) => {
            left.give_back(space, pages);
            Err(e)
        }
    }
}

/// Waits until the destination says that every page is in its place. What it asked for before the last pages came it has.
pub(super) fn filled(cx: &Context<'_>) -> Result<Filled> {
    expect(cx, Kind::MemoryDone, &mut |_, _| Ok(()))
}

/// Takes the destination's requests; `Some` if it has all it needs.
fn take_wants(cx: &Context<'_>, left: &mut Remains, wanted: &mut u64) -> Result<Option<Filled>> {
    let mut wire = cx.link.wire();
    while let Some(kind) = wire.try_recv()? {
        match kind {
            Kind::MemoryWant => {
                let (space, range) = decode_want(wire.payload())?;
                left.want(space, range)?;
                *wanted += 1;
            }
            Kind::MemoryDone => return wire.message().map(Some),
            Kind::Failed => return Err(wire.message::<Failure>()?.into()),
            kind => bail!("the destination sent {kind:?} during the post-copy"),
        }
    }
    wire.alive().context("a sign of life")?;
    Ok(None)
}

/// Waits so long, or until the destination has said something.
fn wait_for_wants(cx: &Context<'_>, rest: Duration) -> Result<()> {
    let fd = cx.link.wire().fd();
    ensure!(fd >= 0, "a post-copy to something that is no connection");
    // SAFETY: a descriptor's number, and the connection is open as long as the context lives.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    match ppoll(&mut fds, Some(TimeSpec::from(rest.min(SAMPLE))), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e).context("waiting for the destination"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_about_a_millisecond() {
        assert_eq!(step(None), 1 << 20);
        assert_eq!(step(Some(125e6)), 64 << 10);
        assert_eq!(step(Some(300e6)), 256 << 10);
        assert_eq!((step(Some(10.0)), step(Some(1e12))), (64 << 10, 1 << 20));
    }
}
