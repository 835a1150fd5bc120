//! Copying memory on the source: asks the tracker what was written, reads it, sends it, and knows of every address whether
//! the destination has its latest content. When to copy and when to stop is [`super::precopy`]'s decision.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::codec::Kind;
use super::link::Link;
use super::shared;
use super::tuning::Tuning;
use crate::criu::ImageKind;
use crate::memory::batch::{Builder, MAX_BATCH};
use crate::memory::compress::{Compressor, Meter};
use crate::memory::rate::Limiter;
use crate::memory::read::{Chunk, Reader};
use crate::memory::tracker::{self, Found, Source, Task, Tracker, TrackerKind};
use crate::memory::{RangeSet, Space, inject};

/// What one pass of copying came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Copied {
    /// Bytes of memory that were not zero.
    pub bytes: u64,
    /// Bytes of pages that were zero.
    pub zero_bytes: u64,
    /// Bytes of frames, after compression.
    pub wire_bytes: u64,
    /// Bytes that were unmapped by the time they were read.
    pub gone_bytes: u64,
}

/// Called with the bytes of memory sent since the last call; an error ends the copying.
pub(super) type GoOn<'a> = dyn Fn(u64) -> Result<()> + 'a;

/// Copies memory of running and of frozen tasks.
pub(super) struct Copier {
    tracker: Box<dyn Tracker>,
    reader: Reader,
    compressor: Compressor,
    meter: Meter,
    limiter: Limiter,
    hurry: bool,
    /// What the destination has of shared memory.
    shared: shared::Sent,
    /// None when nobody asks any more.
    sent: Option<HashMap<Space, RangeSet>>,
    sources: HashMap<Space, Source>,
}

impl Copier {
    /// Nothing is in the tasks before the first [`Copier::look`].
    pub fn new(tuning: &Tuning) -> Result<Copier> {
        let mut tracker = tracker::open(kind()).context("opening the tracker of written pages")?;
        tracker.protect_late();
        let mut compressor = Compressor::new(tuning.compress);
        if let Some(limit) = tuning.bandwidth {
            compressor.limit(limit);
        }
        Ok(Copier {
            tracker,
            reader: Reader::new(),
            meter: compressor.meter(),
            compressor,
            limiter: Limiter::new(tuning.bandwidth.unwrap_or(0)),
            hurry: false,
            shared: shared::Sent::default(),
            sent: Some(HashMap::new()),
            sources: HashMap::new(),
        })
    }

    /// Which tracker is used.
    pub fn tracker(&self) -> TrackerKind {
        self.tracker.kind()
    }

    /// What was written since the last look. With `last` the tasks are frozen. What is found no longer counts as sent.
    pub fn look(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>> {
        let found = self.tracker.look(tasks, last).context("asking which pages were written")?;
        for f in &found {
            if let Some(sent) = self.sent.as_mut().and_then(|s| s.get_mut(&f.space)) {
                *sent = sent.difference(&f.written);
            }
            self.sources.insert(f.space, f.source.clone());
        }
        Ok(found)
    }

    /// Has a look found shared memory?
    pub fn knows_shared(&self) -> bool {
        self.sources.keys().any(|space| space.kind == ImageKind::Shmem)
    }

    /// Reads and sends. A page that is written meanwhile is found by the next look.
    pub fn send(&mut self, found: &[Found], link: &Link, go_on: &GoOn<'_>) -> Result<Copied> {
        let mut copied = Copied::default();
        for f in found {
            self.send_one(f.space, &f.source, &f.written, link, go_on, &mut copied)?;
        }
        Ok(copied)
    }

    /// Sends pages that no look has named; `tasks` are those that stand still, one of which has them if the space is new.
    pub fn send_late(
        &mut self,
        space: Space,
        tasks: &[Task],
        pages: &RangeSet,
        link: &Link,
        go_on: &GoOn<'_>,
    ) -> Result<Copied> {
        let mut copied = Copied::default();
        let source = self.source_of(space, tasks)?;
        self.send_one(space, &source, pages, link, go_on, &mut copied)?;
        Ok(copied)
    }

    /// Of these pages, those whose latest content the destination does not have.
    pub fn unsent(&self, space: Space, pages: &RangeSet) -> RangeSet {
        let sent = self.sent.as_ref().and_then(|s| s.get(&space));
        sent.map_or_else(|| pages.clone(), |sent| pages.difference(sent))
    }

    /// The freeze is over: what was sent is not asked for any more, and whoever sends knows best how to keep to the bandwidth
    /// (see [`Copier::owed`]).
    pub fn past_the_freeze(&mut self) {
        self.sent = None;
        self.hurry = true;
    }

    /// How long to wait after so many bytes, by the bandwidth limit.
    pub fn owed(&mut self, bytes: u64) -> Duration {
        self.limiter.take(bytes, Instant::now())
    }

    /// What the destination has of shared memory; taken once, in the freeze.
    pub fn take_shared(&mut self) -> shared::Sent {
        std::mem::take(&mut self.shared)
    }

    /// Somebody waits for what is sent now: the bandwidth limit does not hold.
    pub fn hurry(&mut self, on: bool) {
        self.hurry = on;
    }

    /// Something else has sent as many bytes: waits as the bandwidth limit asks.
    pub fn pace(&mut self, bytes: u64, go_on: &GoOn<'_>) -> Result<()> {
        if bytes == 0 || self.hurry {
            return Ok(());
        }
        wait(self.limiter.take(bytes, Instant::now()), go_on)
    }

    /// Lifts what the tracker put on the tasks.
    pub fn stop(&mut self) {
        if let Err(e) = self.tracker.stop() {
            log::warn!("lifting the tracker's registration: {e:#}");
        }
    }

    fn source_of(&self, space: Space, tasks: &[Task]) -> Result<Source> {
        if let Some(source) = self.sources.get(&space) {
            return Ok(source.clone());
        }
        let task = tasks.iter().find(|t| space == Space { kind: ImageKind::Pid, id: t.vpid });
        let task =
            task.with_context(|| format!("no task is known that has {:?} {}", space.kind, space.id))?;
        Ok(Source::Task(task.pid))
    }

    fn send_one(
        &mut self,
        space: Space,
        source: &Source,
        pages: &RangeSet,
        link: &Link,
        go_on: &GoOn<'_>,
        copied: &mut Copied,
    ) -> Result<()> {
        let Copier { tracker, shared, reader, compressor, meter, limiter, sent, .. } = self;
        // pages come in ascending order: collected here and added once, else a set of many ranges is moved about for each page
        let mut done = RangeSet::new();
        let is_shared = space.kind == ImageKind::Shmem;
        let (compares, hurry) = (tracker.wants_sent(), self.hurry);
        let mut told = copied.bytes + copied.zero_bytes;
        let mut builder = Builder::new(space, MAX_BATCH);
        let mut ship = |payload: Vec<u8>, builder: &mut Builder, copied: &mut Copied| -> Result<()> {
            let payload = compressor.pack(payload);
            let (at, bytes) = (Instant::now(), payload.len());
            link.frame(Kind::Memory, &[&payload])?;
            meter.sent(bytes, at.elapsed());
            builder.reuse(payload);
            copied.wire_bytes += bytes as u64;
            if !hurry {
                wait(limiter.take(bytes as u64, Instant::now()), go_on)?;
            }
            let done = copied.bytes + copied.zero_bytes - told;
            told += done;
            go_on(done)
        };
        let mut read = |tracker: &mut dyn Tracker, pages: &RangeSet| {
            let mut take = |chunk: Chunk<'_>| {
                match &chunk {
                    Chunk::Data { vaddr, bytes } => {
                        copied.bytes += bytes.len() as u64;
                        done.insert(*vaddr..*vaddr + bytes.len() as u64);
                        if is_shared {
                            shared.note(space, *vaddr, bytes);
                        }
                        if compares {
                            tracker.sent(space, *vaddr, bytes);
                        }
                    }
                    Chunk::Zero { vaddr, len } => {
                        copied.zero_bytes += len;
                        done.insert(*vaddr..*vaddr + len);
                        if is_shared {
                            shared.note_zero(space, *vaddr, *len);
                        }
                        if compares {
                            tracker.sent_zero(space, *vaddr, *len);
                        }
                    }
                    Chunk::Gone { len, .. } => copied.gone_bytes += len,
                }
                match builder.push(chunk) {
                    Some(payload) => ship(payload, &mut builder, copied),
                    None => Ok(()),
                }
            };
            reader.read(source, pages, &mut take).map(drop)
        };
        tracker::in_portions(&mut **tracker, source, pages, &mut read)?;
        if let Some(payload) = builder.finish() {
            ship(payload, &mut builder, copied)?;
        }
        // an error above ends the migration: then nobody asks
        if let Some(sent) = sent {
            let sent = sent.entry(space).or_default();
            *sent = if sent.is_empty() { done } else { sent.union(&done) };
        }
        Ok(())
    }

    /// Bytes of memory per second that reach the peer, as far as it is known.
    pub fn rate(&self) -> Option<f64> {
        self.meter.rate()
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        inject::helper::rest();
    }
}

/// The best tracker that works here, or the one that `TRANSSHIP_TRACKER` in the shim's environment (containerd's) names.
fn kind() -> TrackerKind {
    let all = [TrackerKind::UffdWp, TrackerKind::SoftDirty, TrackerKind::Hash];
    let wanted = std::env::var("TRANSSHIP_TRACKER").ok();
    wanted.and_then(|w| all.into_iter().find(|k| k.to_string() == w)).unwrap_or_else(tracker::detect)
}

/// Waits in small steps, so that an abort is noticed.
fn wait(mut left: Duration, go_on: &GoOn<'_>) -> Result<()> {
    const STEP: Duration = Duration::from_millis(100);
    while !left.is_zero() {
        let now = left.min(STEP);
        std::thread::sleep(now);
        left -= now;
        go_on(0)?;
    }
    Ok(())
}
