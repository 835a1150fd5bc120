//! Tracker `uffd-wp`: each task's memory is write-protected through a userfaultfd that was made inside it ([`inject`]); the kernel
//! resolves the faults itself, and PAGEMAP_SCAN says what was written and protects it again in one step.
//!
//! Nothing about a mapping is remembered here. Whether it was watched since the last look is what the kernel says: a range that is
//! not wholly registered gives EPERM, also one that was unmapped and mapped again, or that belongs to another program after an exec.
//! Then it is registered and named whole. Private file mappings that cannot be written are registered only once they hold pages of
//! their own (relocated data), because registered ones lose the kernel's fault-around.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::ops::Range;

use anyhow::{Context, Result};

use super::class::{Class, class, shmem_device};
use super::scan::{Pagemap, Select};
use super::shared::Shared;
use super::task::{Task, share_memory, started};
use super::uffd::Uffd;
use super::{Found, Source, Tracker, TrackerKind};
use crate::criu::ImageKind;
use crate::memory::maps::{Mapping, mappings};
use crate::memory::{RangeSet, Space, inject};

/// How often a mapping that changes under our hands is tried before the descriptor is suspected to be another program's.
const RACES: u32 = 3;

/// See the module's head.
#[derive(Debug, Default)]
pub struct UffdWp {
    watched: HashMap<i32, Watched>,
    shared: Shared,
}

/// One task.
#[derive(Debug, Default)]
struct Watched {
    started: u64,
    uffd: Option<Uffd>,
    /// Shared mappings that cannot be written, ever (SHM_RDONLY): the kernel does not register them.
    read_only: BTreeSet<(u64, u64)>,
}

impl UffdWp {
    /// Nothing tracked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A task that borrows another's memory until it executes something (vfork) gets no tracking of its own.
    fn borrows(&self, task: &Task, before: &[Task]) -> bool {
        let tracked = |pid: i32| self.watched.get(&pid).is_some_and(|w| w.uffd.is_some());
        if tracked(task.pid) {
            return false;
        }
        let others = before.iter().map(|t| t.pid).chain(self.watched.keys().copied().filter(|p| tracked(*p)));
        others.filter(|p| *p != task.pid).any(|p| share_memory(p, task.pid))
    }
}

impl Tracker for UffdWp {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
    }

    fn look(&mut self, tasks: &[Task], last: bool) -> Result<Vec<Found>> {
        // Before anything else: a descriptor of a dead task may still hold memory that another one lives on.
        self.watched.retain(|pid, w| tasks.iter().any(|t| t.pid == *pid) && started(*pid) == Some(w.started));
        let mut all = Vec::new();
        for (i, task) in tasks.iter().enumerate() {
            let Some(start) = started(task.pid) else { continue };
            if !last && self.borrows(task, &tasks[..i]) {
                continue;
            }
            let watched = self
                .watched
                .entry(task.pid)
                .or_insert_with(|| Watched { started: start, ..Default::default() });
            let mut look = Look { task, last, watched, shared: &mut self.shared, refused: last };
            match look.all() {
                Ok(written) if written.is_empty() => {}
                Ok(written) => all.push(Found {
                    space: Space { kind: ImageKind::Pid, id: task.vpid },
                    source: Source::Task(task.pid),
                    written,
                }),
                Err(_) if tasks_gone(task.pid) => {}
                Err(e) => {
                    return Err(e).with_context(|| format!("looking at the memory of task {}", task.pid));
                }
            }
        }
        all.extend(self.shared.finish());
        Ok(all)
    }

    fn stop(&mut self) -> Result<()> {
        *self = Self::default();
        Ok(())
    }
}

impl Drop for UffdWp {
    fn drop(&mut self) {
        let watched = std::mem::take(&mut self.watched);
        if watched.values().any(|w| w.uffd.is_some()) {
            // Lifting the registrations takes 13-28 ms per GiB: nobody waits for it. Without a thread it happens here.
            let _ = std::thread::Builder::new().name("untrack".into()).spawn(move || drop(watched));
        }
    }
}

/// Ended, or a zombie.
fn tasks_gone(pid: i32) -> bool {
    super::tasks(&[pid]).is_empty()
}

/// One look at one task.
struct Look<'a> {
    task: &'a Task,
    last: bool,
    watched: &'a mut Watched,
    shared: &'a mut Shared,
    /// Nothing can be registered: what is not watched is named whole, at each look.
    refused: bool,
}

impl Look<'_> {
    fn all(&mut self) -> Result<RangeSet> {
        let pid = self.task.pid;
        let maps = mappings(pid)?;
        let mut pagemap = Pagemap::open(pid)?;
        let avoid = shadow_stacks(pid)?;
        let mut written = RangeSet::new();
        for m in &maps {
            let found = match class(m, shmem_device()) {
                Class::Skip => continue,
                Class::Private { .. } if avoid.contains(&m.range.start) => {
                    pagemap.scan(m.range.clone(), Select::Populated, false)
                }
                Class::Private { file } => self.private(m, file, &mut pagemap),
                Class::Shared { shmid } => self.shared(m, shmid, &mut pagemap).map(|()| RangeSet::new()),
            };
            let found =
                found.with_context(|| format!("mapping {:x}-{:x} {}", m.range.start, m.range.end, m.name))?;
            found.iter().for_each(|r| written.insert(r));
        }
        Ok(written)
    }

    fn private(&mut self, m: &Mapping, file: bool, pagemap: &mut Pagemap) -> io::Result<RangeSet> {
        let select = if file { Select::WrittenOrSwapped } else { Select::Written };
        match pagemap.scan(m.range.clone(), select, !self.last) {
            Err(e) if unwatched(&e) => {}
            other => return other,
        }
        if self.refused || (file && !m.write) {
            let all = pagemap.scan(m.range.clone(), Select::Populated, false)?;
            if self.refused || all.is_empty() {
                return Ok(all);
            }
        }
        match self.register(m, pagemap, |pagemap, uffd| {
            let (all, stale) = pagemap.adopt(m.range.clone())?;
            stale.iter().try_for_each(|r| uffd.protect(r))?;
            Ok(all)
        })? {
            Some(all) => Ok(all),
            None => pagemap.scan(m.range.clone(), Select::Populated, false),
        }
    }

    fn shared(&mut self, m: &Mapping, shmid: u64, pagemap: &mut Pagemap) -> io::Result<()> {
        let pid = self.task.pid;
        match pagemap.scan(m.range.clone(), Select::SharedWritten, !self.last) {
            Ok(written) => {
                self.shared.watched(shmid, pid, m, &written);
                return Ok(());
            }
            Err(e) if unwatched(&e) => {}
            Err(e) => return Err(e),
        }
        let key = (m.range.start, m.range.end);
        if !m.write && self.watched.read_only.contains(&key) {
            self.shared.watched(shmid, pid, m, &RangeSet::new());
            return Ok(());
        }
        if !self.refused {
            // Markers in every place: from here on a place without an entry was written and reclaimed.
            let done = self.register(m, pagemap, |_, uffd| uffd.protect(m.range.clone()));
            match done {
                Err(e) if !m.write && e.raw_os_error() == Some(libc::EPERM) => {
                    self.watched.read_only.insert(key);
                    self.shared.watched(shmid, pid, m, &RangeSet::new());
                    return Ok(());
                }
                other => drop(other?),
            }
        }
        self.shared.unwatched(shmid, pid, m);
        Ok(())
    }

    /// Puts a mapping under tracking and protects it by `protect`. None: that is not possible.
    fn register<T>(
        &mut self,
        m: &Mapping,
        pagemap: &mut Pagemap,
        mut protect: impl FnMut(&mut Pagemap, &Uffd) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        let mut fresh = false;
        for race in 0..2 * RACES {
            if self.watched.uffd.is_none() {
                if fresh {
                    return Ok(None);
                }
                fresh = true;
                match inject::userfaultfd(self.task.pid).and_then(|fd| Ok(Uffd::handshake(fd)?)) {
                    Ok(uffd) => self.watched.uffd = Some(uffd),
                    Err(e) => {
                        log::warn!("memory of task {} is sent whole in each round: {e:#}", self.task.pid);
                        self.refused = true;
                        return Ok(None);
                    }
                }
            }
            let Some(uffd) = &self.watched.uffd else { continue };
            match uffd.register(m.range.clone()) {
                Ok(()) => match protect(pagemap, uffd) {
                    Ok(done) => return Ok(Some(done)),
                    // The mapping was replaced just now, or the descriptor is of the memory before an exec.
                    Err(e) if unwatched(&e) || e.raw_os_error() == Some(libc::ENOENT) => {
                        if race + 1 == RACES && !fresh {
                            self.forget();
                        }
                    }
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => self.forget(),
                    Err(e) => return Err(e),
                },
                Err(e) if !uffd.alive() => {
                    log::debug!("task {} has executed another program ({e})", self.task.pid);
                    self.forget();
                }
                // It may not be written, ever: the caller knows what that means for shared memory.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) && m.shared => return Err(e),
                // Unmapped meanwhile, or memory that cannot be tracked (MAP_DROPPABLE), or tracked by somebody else.
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    fn forget(&mut self) {
        self.watched.uffd = None;
        self.watched.read_only.clear();
    }
}

/// Not wholly under our tracking.
fn unwatched(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EPERM)
}

/// Where the task's shadow stacks begin: the kernel makes their entries by rules of its own, so they are left alone and named
/// whole. Only tasks with the feature are asked, because smaps is slow.
fn shadow_stacks(pid: i32) -> Result<BTreeSet<u64>> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    if !status.lines().any(|l| l.starts_with("x86_Thread_features:") && l.contains("shstk")) {
        return Ok(BTreeSet::new());
    }
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(shadow_stacks_in(&smaps).map(|r| r.start).collect())
}

fn shadow_stacks_in(smaps: &str) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut range = 0..0;
    smaps.lines().filter_map(move |line| {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().any(|f| f == "ss").then(|| range.clone());
        }
        if let Some((start, end)) = line.split(' ').next().and_then(|r| r.split_once('-')) {
            let hex = |s| u64::from_str_radix(s, 16).unwrap_or_default();
            range = hex(start)..hex(end);
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadow_stacks_by_their_flag() {
        let smaps = "7f00-7f10 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr mr mw me ac ss \n\
                     8f00-8f10 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr mr mw me ac sd \n";
        assert_eq!(shadow_stacks_in(smaps).collect::<Vec<_>>(), vec![0x7f00..0x7f10]);
    }
}
