//! Tracker `hash`: every page is read at each look and compared with what was sent. Any kernel, any write; about 150 ms per GiB.

use anyhow::Result;

use super::class::{Class, class, shmem_device};
use super::scan::{Pagemap, Select};
use super::sent::Sent;
use super::shared::{Shared, data};
use super::task::{Task, gone, replaced};
use super::{Found, Source, Tracker, TrackerKind};
use crate::criu::ImageKind;
use crate::memory::maps::mappings;
use crate::memory::{RangeSet, Space};

/// See the module's head.
#[derive(Debug, Default)]
pub struct Hash {
    sent: Sent,
}

impl Hash {
    /// Nothing sent yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Tracker for Hash {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Hash
    }

    fn look(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        let mut shared = Shared::default();
        for task in tasks {
            match candidates(task, Select::Populated, &mut shared) {
                Ok(found) => all.push(found),
                Err(_) if gone(task.pid) => {}
                Err(e) if !last && replaced(&e) => {}
                Err(e) => return Err(e),
            }
        }
        all.extend(shared.finish());
        narrow(&mut self.sent, all)
    }

    fn stop(&mut self) -> Result<()> {
        self.sent = Sent::default();
        Ok(())
    }

    fn wants_sent(&self) -> bool {
        true
    }

    fn sent(&mut self, space: Space, vaddr: u64, bytes: &[u8]) {
        self.sent.put(space, vaddr, bytes);
    }

    fn sent_zero(&mut self, space: Space, vaddr: u64, len: u64) {
        self.sent.put_zero(space, vaddr, len);
    }
}

/// What of a task's private memory `select` means; its shared mappings go to `shared`, as unwatched.
pub fn candidates(task: &Task, select: Select, shared: &mut Shared) -> Result<Found> {
    let mut written = RangeSet::new();
    let maps = mappings(task.pid)?;
    let mut pagemap = Pagemap::open(task.pid)?;
    for m in &maps {
        match class(m, shmem_device()) {
            Class::Skip => {}
            Class::Private { .. } => {
                pagemap.scan(m, select, false)?.iter().for_each(|r| written.insert(r));
            }
            Class::Shared { shmid } => shared.unwatched(shmid, task.pid, m),
        }
    }
    let space = Space { kind: ImageKind::Pid, id: task.vpid };
    Ok(Found { space, source: Source::Task(task.pid), written })
}

/// Leaves what differs from what was sent, and of each source only what still exists.
pub fn narrow(sent: &mut Sent, all: Vec<Found>) -> Result<Vec<Found>> {
    let mut out = Vec::new();
    for found in all {
        let source = found.source.clone();
        match sent.narrow(found) {
            Ok(found) if found.written.is_empty() => {}
            Ok(found) => out.push(found),
            Err(e) => match source {
                Source::Task(pid) if gone(pid) => {}
                // The mapping has gone between the two steps: the next look sees whether another is left.
                Source::SharedMap { pid, start, end, .. } if data(pid, &(start..end)).is_err() => {}
                _ => return Err(e),
            },
        }
    }
    Ok(out)
}
