//! Behind the tasks' backs: pages placed that nobody has asked for yet, and what is complete given back.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Engine;
use crate::memory::daemon::consumer::{Consumer, Stop};
use crate::memory::{RangeSet, Space};

/// So long after the tasks were let go the fill waits, unless they are served earlier,
const FIRST_MOMENTS: Duration = Duration::from_millis(30);
/// which they are when nobody has asked for anything for so long.
const QUIET: Duration = Duration::from_millis(1);

impl Engine {
    pub(super) fn may_fill(&self) -> bool {
        self.restored.is_some() && !self.lost && self.begins().is_some_and(|at| at <= Instant::now())
    }

    /// When the fill begins, as far as is known. The tasks' first moments belong to their faults, of which each would wait for a batch;
    /// and to CRIU, which has to let them go.
    pub(super) fn begins(&self) -> Option<Instant> {
        let Some(running) = self.running else { return self.restored.map(|t| t + self.cfg.fill_delay) };
        let first_moments = running + FIRST_MOMENTS;
        let heard = self.heard.filter(|heard| *heard > running);
        Some(heard.map_or(first_moments, |heard| first_moments.min(heard + QUIET)))
    }

    /// One batch. Restored tasks before children that they forked, which as a rule execute something else soon.
    pub(super) fn fill(&mut self) -> Result<()> {
        let now = Instant::now();
        self.fill_began.get_or_insert(now);
        let n = self.consumers.len();
        let ready = |c: &Consumer| !c.gone && !c.resting(now) && !c.local.is_empty();
        let order = (0..n).map(|k| (self.turn + k) % n);
        let (first, then): (Vec<usize>, Vec<usize>) =
            order.filter(|i| ready(&self.consumers[*i])).partition(|i| !self.consumers[*i].child);
        let Some(i) = first.into_iter().chain(then).next() else { return Ok(()) };
        self.turn = i + 1;
        let (mut budget, mut end) = (self.cfg.batch, Stop::All);
        'batch: while budget > 0 {
            let c = &mut self.consumers[i];
            let mut group = c.local.group(c.cursor, budget);
            if group.is_empty() {
                group = c.local.group(0, budget);
            }
            let (Some(first), Some(last)) = (group.first(), group.last()) else { break };
            let from = first.image;
            let bytes = &mut self.buf[..(last.images().end - from) as usize];
            self.store.read_span(c.space, from, bytes)?;
            for piece in group {
                let at = (piece.image - from) as usize;
                let len = piece.end - piece.start;
                let (placed, stop) = c.place(piece.start, &bytes[at..at + len as usize], self.page)?;
                self.stats.filled_bytes += placed;
                budget = budget.saturating_sub(len);
                c.cursor = piece.end;
                self.to_free.add(c.space, piece.images());
                if stop != Stop::All {
                    end = stop;
                    break 'batch;
                }
            }
        }
        if let Stop::NotMapped(at) = end {
            self.consumers[i].cursor = at + self.page;
            // Its mapping may have gone in this moment: then an event is on its way, and nothing can be placed until it is read.
            self.faults_of(i)?;
            self.unplaced(i, at)?;
        }
        self.free()
    }

    /// A page that has no place: certain once a second attempt, after all events, is told the same.
    fn unplaced(&mut self, i: usize, at: u64) -> Result<()> {
        let page = self.page;
        let c = &mut self.consumers[i];
        let Some(piece) = c.local.at(at) else { return Ok(()) };
        let image = piece.image + (at - piece.start);
        let bytes = &mut self.buf[..page as usize];
        self.store.read_at(c.space, image, bytes)?;
        if let (_, Stop::NotMapped(_)) = c.place(at, bytes, page)? {
            c.local.remove(at..at + page);
            // A child lacks what its parent had marked MADV_DONTFORK; for a restored task there is no such reason.
            if !c.child {
                self.stats.unplaced_bytes += page;
            }
        }
        Ok(())
    }

    /// Gives back what nobody waits for any more. With several consumers of a space that is known when all but one have gone.
    pub(super) fn free(&mut self) -> Result<()> {
        if !self.to_free.enough() {
            return Ok(());
        }
        for (space, range) in self.to_free.take() {
            let mut users = self.consumers.iter().filter(|c| c.space == space);
            let (Some(user), None) = (users.next(), users.next()) else { continue };
            let waits = user.local.images_within(range.clone());
            for r in RangeSet::from(range).difference(&waits).iter() {
                self.stats.given_back_bytes += self.store.free(space, r)?;
            }
        }
        Ok(())
    }

    pub(super) fn part_with_the_complete(&mut self) -> Result<()> {
        let (leaving, staying): (Vec<Consumer>, Vec<Consumer>) =
            std::mem::take(&mut self.consumers).into_iter().partition(|c| c.gone || c.complete());
        self.consumers = staying;
        let mut spaces: Vec<Space> = leaving.iter().map(|c| c.space).collect();
        for c in leaving {
            if let (Some(id), Some(keeper)) = (c.kept, &self.cfg.keeper) {
                let _ = keeper.drop_one(id);
            }
            c.close();
        }
        spaces.dedup();
        for space in spaces {
            let mut users = self.consumers.iter().filter(|c| c.space == space);
            match (users.next(), users.next()) {
                (None, _) => self.store.drop_space(space),
                (Some(last), None) => {
                    let unneeded = self.store.data(space).difference(&last.local.images());
                    for r in unneeded.iter() {
                        self.store.free(space, r)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
