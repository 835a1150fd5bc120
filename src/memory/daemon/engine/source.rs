//! The source: asked for what somebody waits for, listened to, and lost.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, bail};

use super::{Engine, Events};
use crate::memory::daemon::consumer::Stop;
use crate::memory::daemon::{Came, DaemonEvent};
use crate::memory::read::Chunk;
use crate::memory::{RangeSet, Space};

/// While pages come in from the source, faults are looked for this often.
const FAULTS_AT_LEAST: Duration = Duration::from_micros(200);

impl Engine {
    pub(super) fn listen_to_source(&mut self, events: Events<'_>) -> Result<()> {
        self.ask(events);
        self.more = false;
        let Some(mut remote) = self.remote.take() else { return Ok(()) };
        let mut ours = None;
        let taken = remote.take(&mut |space, chunk| {
            let arrived = self.arrived(space, chunk);
            // An error of the source must not be mixed up with one of ours.
            arrived.map_err(|e| {
                let said = anyhow!("{e:#}");
                ours = Some(e);
                said
            })
        });
        if let Some(e) = ours {
            return Err(e);
        }
        match taken {
            Ok(came @ (Came::Nothing | Came::Something)) => {
                self.more = came == Came::Something;
                self.remote = Some(remote);
            }
            Ok(Came::Everything)
                if self.consumers.iter().all(|c| c.remote.is_empty())
                    && self.planned.values().all(|p| p.1.is_empty()) => {}
            Ok(Came::Everything) => {
                self.lose(&anyhow!("the source says that everything has come, but pages are missing"), events)
            }
            Err(e) => self.lose(&e, events),
        }
        self.ask(events);
        Ok(())
    }

    pub(super) fn ask(&mut self, events: Events<'_>) {
        let Some(remote) = &mut self.remote else { return };
        // What came in the meantime is not asked for.
        let open = |(space, range): (Space, Range<u64>)| {
            let still: Vec<Range<u64>> =
                self.asked.get(&space).into_iter().flat_map(|a| a.overlapping(range.clone())).collect();
            still.into_iter().map(move |r| (space, r))
        };
        let asked: Result<()> =
            self.to_ask.drain(..).flat_map(open).try_for_each(|(space, range)| remote.ask(space, range));
        if let Err(e) = asked {
            self.lose(&e, events);
        }
    }

    fn lose(&mut self, why: &Error, events: Events<'_>) {
        self.remote = None;
        self.to_ask.clear();
        let mut missing: BTreeMap<Space, RangeSet> = BTreeMap::new();
        let planned = self.planned.iter().map(|(space, p)| (*space, p.1.images()));
        for (space, set) in self.consumers.iter().map(|c| (c.space, c.remote.images())).chain(planned) {
            let known = missing.entry(space).or_default();
            *known = known.union(&set);
        }
        missing.retain(|_, set| !set.is_empty());
        if !missing.is_empty() {
            self.lost = true;
            events(DaemonEvent::Lost { missing: missing.into_iter().collect(), why: format!("{why:#}") });
        }
    }

    /// Pages from the source: straight into the tasks; those whose task cannot take them now wait in the store.
    fn arrived(&mut self, space: Space, chunk: Chunk<'_>) -> Result<()> {
        let (range, bytes) = match chunk {
            Chunk::Data { vaddr, bytes } => (vaddr..vaddr + bytes.len() as u64, Some(bytes)),
            Chunk::Zero { vaddr, len } => (vaddr..vaddr + len, None),
            Chunk::Gone { vaddr, len } => bail!("the source has lost {len} bytes at {vaddr:#x} of {space:?}"),
        };
        if let Some(asked) = self.asked.get_mut(&space) {
            asked.remove(range.clone());
        }
        self.stats.remote_bytes += bytes.map_or(0, |b| b.len() as u64);
        let mut left = RangeSet::new();
        if let Some((local, remote)) = self.planned.get_mut(&space) {
            for piece in remote.take_images(range.clone()) {
                if bytes.is_some() {
                    local.insert(piece);
                    left.insert(piece.images());
                }
            }
        }
        let now = Instant::now();
        for c in self.consumers.iter_mut().filter(|c| c.space == space) {
            for piece in c.remote.take_images(range.clone()) {
                if let Some(bytes) = bytes {
                    let from = (piece.image - range.start) as usize;
                    c.local.insert(piece);
                    if !c.gone && !c.resting(now) {
                        let (_, stop) = c.place(
                            piece.start,
                            &bytes[from..from + (piece.end - piece.start) as usize],
                            self.page,
                        )?;
                        if stop == Stop::Exited {
                            continue;
                        }
                    }
                    for rest in c.local.within(piece.start..piece.end) {
                        left.insert(rest.images());
                    }
                }
                let waited: Vec<u64> = c.waiting.range(piece.start..piece.end).map(|(at, _)| *at).collect();
                for at in waited {
                    self.remote_times.add(c.waiting[&at].elapsed());
                }
                // Whoever was not woken by the copy is answered in the next round: zeros, or a page that could not be placed now.
                c.look_again(piece.start..piece.end);
                if bytes.is_some() {
                    let local = &c.local;
                    c.retry.retain(|at| local.at(*at).is_some() || !(piece.start..piece.end).contains(at));
                }
            }
        }
        if let Some(bytes) = bytes {
            for r in left.iter() {
                let from = (r.start - range.start) as usize;
                self.store.put(space, r.start, &bytes[from..from + (r.end - r.start) as usize])?;
            }
            self.stats.store_peak_bytes = self.stats.store_peak_bytes.max(self.store.bytes());
        }
        // what is in the store of it, but for what was put there now, is older
        self.to_free.add(space, range);
        self.free()?;
        if self.looked_at_faults.elapsed() > FAULTS_AT_LEAST {
            self.faults()?;
        }
        Ok(())
    }
}
