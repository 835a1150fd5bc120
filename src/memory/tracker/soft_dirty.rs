//! Tracker `soft-dirty`: the kernel's bit in each page table entry, cleared by a `4` in /proc/PID/clear_refs (linux
//! Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! Reading the bits and clearing them are two steps, and a write between them would be lost. So the tasks' cgroup is frozen
//! for the two (15-20 ms per GiB), as CRIU does. New mappings carry the bit until it is cleared for the first time, so mmap,
//! mremap, brk and exec need nothing of their own; a task that was not seen before is named whole. Shared memory has no such
//! bit per object: it is compared with what was sent, as tracker `hash` does.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::hash::{candidates, narrow};
use super::scan::Select;
use super::sent::Sent;
use super::shared::Shared;
use super::still::{Held, Still};
use super::task::{Task, gone, started};
use super::{Found, Tracker, TrackerKind};
use crate::criu::ImageKind;
use crate::memory::Space;

/// See the module's head.
#[derive(Debug, Default)]
pub struct SoftDirty {
    /// Start times of the tasks whose bits were cleared by us.
    cleared: HashMap<i32, u64>,
    sent: Sent,
}

impl SoftDirty {
    /// Nothing cleared yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn scan(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>> {
        let mut shared = Shared::default();
        let mut all = Vec::new();
        let mut cleared = HashMap::new();
        for task in tasks {
            let Some(start) = started(task.pid) else { continue };
            let known = self.cleared.get(&task.pid) == Some(&start);
            let select = if known { Select::SoftDirty } else { Select::Populated };
            match candidates(task, select, &mut shared).and_then(|found| {
                if !last {
                    clear(task.pid)?;
                }
                Ok(found)
            }) {
                Ok(found) => all.push(found),
                Err(_) if gone(task.pid) => continue,
                Err(e) => return Err(e),
            }
            cleared.insert(task.pid, start);
        }
        if !last {
            self.cleared = cleared;
        }
        all.extend(shared.finish());
        Ok(all)
    }
}

impl Tracker for SoftDirty {
    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn look(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>> {
        let all = {
            let _still = if last { Vec::new() } else { freeze(tasks)? };
            self.scan(tasks, last)?
        };
        let (private, shared): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|f| f.space.kind == ImageKind::Pid);
        let mut out: Vec<_> = private.into_iter().filter(|f| !f.written.is_empty()).collect();
        out.extend(narrow(&mut self.sent, shared)?);
        Ok(out)
    }

    fn stop(&mut self) -> Result<()> {
        *self = Self::default();
        Ok(())
    }

    fn wants_sent(&self) -> bool {
        true
    }

    fn sent(&mut self, space: Space, vaddr: u64, bytes: &[u8]) {
        if space.kind == ImageKind::Shmem {
            self.sent.put(space, vaddr, bytes);
        }
    }

    fn sent_zero(&mut self, space: Space, vaddr: u64, len: u64) {
        if space.kind == ImageKind::Shmem {
            self.sent.put_zero(space, vaddr, len);
        }
    }
}

fn clear(pid: i32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    let mut file = File::options().write(true).open(&path).with_context(|| format!("opening {path}"))?;
    file.write_all(b"4").with_context(|| format!("writing 4 to {path}"))
}

/// Freezes the cgroups that the tasks are in; one that is frozen already (by the first task of it, too) is left alone.
fn freeze(tasks: &[Task]) -> Result<Vec<Still>> {
    let mut all = Vec::new();
    for task in tasks {
        match Still::hold(task.pid, Duration::from_secs(2)) {
            Ok(Held::Still(still)) => all.push(still),
            Ok(Held::Already) => {}
            Ok(Held::Never(_)) if gone(task.pid) => {}
            Ok(Held::Never(why)) => {
                bail!("task {} cannot be frozen for a look at its memory: {why}", task.pid)
            }
            Err(_) if gone(task.pid) => {}
            Err(e) => return Err(e.context("holding the tasks still for a look at their memory")),
        }
    }
    Ok(all)
}
