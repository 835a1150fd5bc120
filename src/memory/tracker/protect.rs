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
use std::time::Duration;

use anyhow::{Context, Result};

use super::class::{Class, class, shmem_device};
use super::scan::{Area, Pagemap, Select};
use super::shared::Shared;
use super::still::{Held, Still};
use super::task::{Task, gone, replaced, share_memory, started};
use super::uffd::Uffd;
use super::{Found, Source, Tracker, TrackerKind};
use crate::criu::ImageKind;
use crate::memory::maps::{Mapping, mappings};
use crate::memory::{RangeSet, Space, inject};

/// A task that cannot be held still within this time (a vfork in it) is asked again at the next look.
const STILL_WITHIN: Duration = Duration::from_millis(500);

/// See the module's head.
#[derive(Debug, Default)]
pub struct UffdWp {
    watched: HashMap<i32, Watched>,
    shared: Shared,
    /// See [`super::late`].
    late: bool,
}

/// One task.
#[derive(Debug, Default)]
struct Watched {
    started: u64,
    uffd: Option<Uffd>,
    /// Shared mappings that cannot be written, ever (SHM_RDONLY): the kernel does not register them.
    read_only: BTreeSet<(u64, u64)>,
    /// Anonymous mappings that the last look registered and left unprotected.
    unprotected: RangeSet,
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
            // what nobody has read since is found, and protected, like everything that was written
            watched.unprotected = RangeSet::new();
            let (late, shared) = (self.late && !last, &mut self.shared);
            let mut look = Look { task, last, late, watched, shared, refused: last };
            match look.all() {
                Ok(written) if written.is_empty() => {}
                Ok(written) => all.push(Found {
                    space: Space { kind: ImageKind::Pid, id: task.vpid },
                    source: Source::Task(task.pid),
                    written,
                }),
                Err(_) if gone(task.pid) => {}
                Err(e) if !last && replaced(&e) => drop(self.watched.remove(&task.pid)),
                Err(e) => {
                    return Err(e).with_context(|| format!("looking at the memory of task {}", task.pid));
                }
            }
        }
        all.extend(self.shared.finish());
        Ok(all)
    }

    fn protect_late(&mut self) {
        self.late = true;
    }

    fn is_late(&self, source: &Source) -> bool {
        let Source::Task(pid) = source else { return false };
        self.watched.get(pid).is_some_and(|w| !w.unprotected.is_empty())
    }

    fn protect(&mut self, source: &Source, window: Range<u64>) -> Result<RangeSet> {
        let mut written = RangeSet::new();
        let Source::Task(pid) = *source else { return Ok(written) };
        let Some(watched) = self.watched.get_mut(&pid) else { return Ok(written) };
        let due = watched.unprotected.clip(window);
        for part in due.iter() {
            watched.unprotected.remove(part.clone());
            match protected(pid, part.clone()) {
                Ok(found) => found.iter().for_each(|r| written.insert(r)),
                // the next look names everything that there is then
                Err(e) if gone(pid) || replaced(&e) => break,
                Err(e) => {
                    let what = format!("protecting {:x}-{:x} of task {pid}", part.start, part.end);
                    return Err(e).context(what);
                }
            }
        }
        Ok(written)
    }

    fn stop(&mut self) -> Result<()> {
        self.watched.clear();
        self.shared = Shared::default();
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

/// One look at one task.
struct Look<'a> {
    task: &'a Task,
    last: bool,
    late: bool,
    watched: &'a mut Watched,
    shared: &'a mut Shared,
    /// Nothing can be registered: what is not watched is named whole, at each look.
    refused: bool,
}

impl Look<'_> {
    fn all(&mut self) -> Result<RangeSet> {
        let pid = self.task.pid;
        if !self.refused && self.watched.uffd.is_none() {
            match inject::userfaultfd(pid).and_then(|fd| Ok(Uffd::handshake(fd)?)) {
                Ok(uffd) => self.watched.uffd = Some(uffd),
                Err(e) => {
                    log::warn!("memory of task {pid} is sent whole in each round: {e:#}");
                    self.refused = true;
                }
            }
        }
        let maps = mappings(pid)?;
        let mut pagemap = Pagemap::open(pid)?;
        let avoid = shadow_stacks(pid)?;
        let mut written = RangeSet::new();
        let mut done = BTreeSet::new();
        for m in &maps {
            let found = match class(m, shmem_device()) {
                Class::Skip => Ok(Some(RangeSet::new())),
                Class::Private { .. } if avoid.contains(&m.range.start) => {
                    pagemap.scan(m, Select::Populated, false).map(Some)
                }
                Class::Private { file } => self.private(m, file, &mut pagemap),
                Class::Shared { shmid } => self.shared(m, shmid, &mut pagemap),
            };
            if let Some(found) = found.with_context(|| describe(m))? {
                found.iter().for_each(|r| written.insert(r));
                done.insert((m.range.start, m.range.end));
            }
        }
        if done.len() < maps.len() {
            self.adopt(&done)?.iter().for_each(|r| written.insert(r));
        }
        Ok(written)
    }

    /// None: it must be registered first.
    fn private(&mut self, m: &Mapping, file: bool, pagemap: &mut Pagemap) -> io::Result<Option<RangeSet>> {
        let select = if file { Select::WrittenOrSwapped } else { Select::Written };
        match pagemap.scan(m, select, !self.last) {
            Err(e) if unwatched(&e) => {}
            other => return other.map(Some),
        }
        if self.refused || (file && !m.write) {
            let all = pagemap.scan(m, Select::Populated, false)?;
            return Ok((self.refused || all.is_empty()).then_some(all));
        }
        Ok(None)
    }

    /// As [`Self::private`]; what was written goes to the object.
    fn shared(&mut self, m: &Mapping, shmid: u64, pagemap: &mut Pagemap) -> io::Result<Option<RangeSet>> {
        let pid = self.task.pid;
        match pagemap.scan(m, Select::SharedWritten, !self.last) {
            Ok(written) => self.shared.watched(shmid, pid, m, &written),
            Err(e) if !unwatched(&e) => return Err(e),
            _ if !m.write && self.watched.read_only.contains(&(m.range.start, m.range.end)) => {
                self.shared.watched(shmid, pid, m, &RangeSet::new());
            }
            _ if self.refused => self.shared.unwatched(shmid, pid, m),
            _ => return Ok(None),
        }
        Ok(Some(RangeSet::new()))
    }

    /// Registers the mappings that are not in `done`, and names them whole.
    ///
    /// The task is held still for it (well under a millisecond): a mapping that grows between our reading of the list and the
    /// registration would be split in two by it, and mremap of a mapping in two parts fails (EFAULT). Protecting comes after.
    fn adopt(&mut self, done: &BTreeSet<(u64, u64)>) -> Result<RangeSet> {
        let pid = self.task.pid;
        let mut pagemap = Pagemap::open(pid)?;
        let mut new = Vec::new();
        {
            let held = match Still::hold(pid, STILL_WITHIN) {
                Ok(held) => Some(held),
                Err(e) => {
                    log::debug!("memory of task {pid} is sent whole in this round: {e:#}");
                    None
                }
            };
            if let Some(Held::Never(why)) = &held {
                log::debug!("memory of task {pid} is registered while it runs: {why}");
            }
            for m in mappings(pid)? {
                let kind = class(&m, shmem_device());
                if kind == Class::Skip || done.contains(&(m.range.start, m.range.end)) {
                    continue;
                }
                if kind == (Class::Private { file: true })
                    && !m.write
                    && pagemap.scan(&m, Select::Populated, false)?.is_empty()
                {
                    continue;
                }
                let registered = held.is_some() && self.register(&m);
                new.push((m, kind, registered));
            }
        }
        let mut written = RangeSet::new();
        let (mut right, mut wrong) = (0, 0);
        for (m, kind, registered) in &new {
            let uffd = self.watched.uffd.as_ref().filter(|_| *registered);
            // protecting it may wait until it is read
            let late = self.late && Area::from(m).is_anonymous();
            let ours = match (kind, uffd) {
                (Class::Shared { shmid }, uffd) => {
                    self.shared.unwatched(*shmid, pid, m);
                    // Markers in every place: from here on a place without an entry was written and reclaimed.
                    uffd.map(|u| u.protect(m.range.clone()).is_ok())
                }
                (_, Some(uffd)) => match adopted(&mut pagemap, uffd, m, !late) {
                    Ok(all) => {
                        if late {
                            self.watched.unprotected.insert(m.range.clone());
                        }
                        all.iter().for_each(|r| written.insert(r));
                        Some(true)
                    }
                    Err(e) if unwatched(&e) || e.raw_os_error() == Some(libc::ENOENT) => Some(false),
                    Err(e) => return Err(e).with_context(|| describe(m)),
                },
                (_, None) => None,
            };
            match ours {
                Some(true) => right += 1,
                Some(false) => wrong += 1,
                None => {}
            }
            if ours != Some(true) && matches!(kind, Class::Private { .. }) {
                let all = pagemap.scan(m, Select::Populated, false)?;
                all.iter().for_each(|r| written.insert(r));
            }
        }
        // All that we registered was not in this memory: the task has executed another program, and the descriptor is of the memory
        // before (which somebody else may still use). The next look begins anew.
        if right == 0 && wrong > 0 || self.watched.uffd.as_ref().is_some_and(|u| !u.alive()) {
            log::debug!("task {pid} has executed another program");
            self.watched.uffd = None;
            self.watched.read_only.clear();
        }
        Ok(written)
    }

    /// False: that is not possible (gone, MAP_DROPPABLE, tracked by somebody else, or never written).
    fn register(&mut self, m: &Mapping) -> bool {
        let Some(uffd) = &self.watched.uffd else { return false };
        let result = uffd.register(m.range.clone());
        if result.as_ref().is_err_and(unwatched) && m.shared && !m.write {
            // It may not be written, ever: nothing can come through it.
            self.watched.read_only.insert((m.range.start, m.range.end));
        }
        result.is_ok()
    }
}

/// Names what is populated, and protects it if `now`.
fn adopted(pagemap: &mut Pagemap, uffd: &Uffd, m: &Mapping, now: bool) -> io::Result<RangeSet> {
    let (all, stale) = pagemap.adopt(m, now)?;
    stale.iter().try_for_each(|r| uffd.protect(r))?;
    Ok(all)
}

/// Protects what was written in a part of a mapping that was registered as anonymous memory, and names it. What is there now may be
/// something else: the kernel says so, perhaps after it has protected a part; then all of it is named.
fn protected(pid: i32, part: Range<u64>) -> Result<RangeSet> {
    let mut pagemap = Pagemap::open(pid)?;
    Ok(match pagemap.scan(Area::anonymous(part.clone()), Select::Written, true) {
        Err(e) if unwatched(&e) => pagemap.scan(part, Select::Populated, false)?,
        other => other?,
    })
}

fn describe(m: &Mapping) -> String {
    format!("mapping {:x}-{:x} {}", m.range.start, m.range.end, m.name)
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
