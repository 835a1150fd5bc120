//! A CRIU that waits for a dump: what can be done before the tasks stand still. The dump is [`super::dump`]'s.
//!
//! With [`MemoryMode::Parent`] CRIU does not touch memory: it is told that there are parent images which have every clean page, and that
//! no page is dirty. With [`Worker::conceal`] it finds no page in shared memory either, with [`Worker::unseen`] none in large private memory.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};

use super::conceal::Questions;
use super::kdat::MountPoint;
use super::page_server::PageServer;
use super::stand_in::StandIn;
use super::swrk::{Run, Spawn, Swrk};
use super::version::Criu;

/// What becomes of a container's memory in a dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// Everything that is not zero comes as [`PageEvent::Pages`](super::PageEvent::Pages).
    #[default]
    Full,
    /// Nothing is read: pages come as [`PageEvent::Hole`](super::PageEvent::Hole) with `PE_PARENT`. Those of mappings without
    /// PROT_READ, of asynchronous I/O, of huge pages (hugetlb) and of shared memory come with their bytes all the same.
    Parent,
}

/// With what a dump's CRIU is started, which may be long before the dump.
#[derive(Default)]
pub struct Worker<'a> {
    /// What becomes of memory. [`MemoryMode::Parent`] only where [`Criu::memory_modes`] says so.
    pub memory: MemoryMode,
    /// Run CRIU inside this network namespace. Only for a restore that is started inside its counterpart as well.
    pub netns: Option<BorrowedFd<'a>>,
    /// Directory to put first in CRIU's PATH.
    pub path_first: Option<&'a Path>,
    /// Have CRIU leave shared memory to [`super::dump::DumpRequest::on_shared`], where the kernel helps with that; else it comes with its
    /// bytes as in any mode.
    pub conceal: bool,
    /// Tasks whose private memory CRIU is not to see, with the program that stands in for them ([`super::stand_in`]). What it then says
    /// of the private pages of [`PreparedDump::unseen`] is not true.
    pub unseen: Option<(&'a Path, &'a [i32])>,
}

/// A CRIU that waits to be told what to dump. Dropping it ends it.
pub struct PreparedDump {
    pub(super) criu: Criu,
    pub(super) worker: Swrk,
    pub(super) pages: PageServer,
    /// The number of the page socket in the worker.
    pub(super) pages_fd: i32,
    pub(super) memory: Memory,
    pub(super) questions: Option<Questions>,
    pub(super) unseen: Vec<i32>,
    /// Who is seen instead.
    pub(super) stand_in: Option<StandIn>,
}

/// What a worker of [`MemoryMode::Parent`] stands on.
pub(super) enum Memory {
    Full,
    /// The kernel has soft-dirty bits: they are cleared before the dump, which may have been done.
    SoftDirty {
        cleared: bool,
    },
    /// CRIU takes a copy of its cache for the truth: the copy, and what it is mounted on.
    Kdat(tempfile::NamedTempFile, #[allow(dead_code, reason = "lives as long as the mount")] MountPoint),
}

impl Criu {
    /// Starts CRIU for one dump, ahead of it: what costs time and does not need the tasks to stand still.
    pub fn prepare_dump(&self, how: &Worker<'_>) -> Result<PreparedDump> {
        let (mut pages, theirs) = PageServer::pair()?;
        pages.parent = how.memory == MemoryMode::Parent;
        let memory = match how.memory {
            MemoryMode::Full => Memory::Full,
            MemoryMode::Parent => {
                let kdat = self.kdat()?;
                if kdat.soft_dirty {
                    Memory::SoftDirty { cleared: false }
                } else {
                    let mut copy =
                        tempfile::NamedTempFile::new().context("making a file for CRIU's kerndat")?;
                    copy.write_all(&kdat.with_soft_dirty()).context("writing CRIU's kerndat")?;
                    Memory::Kdat(copy, MountPoint::new(&kdat)?)
                }
            }
        };
        let stand_in = how.unseen.and_then(|(quick, pids)| {
            let started = StandIn::start(quick, pids);
            started.inspect_err(|e| ::log::info!("CRIU looks at all memory: {e:#}")).ok()
        });
        let proc = stand_in.as_ref().map(StandIn::mounts).unwrap_or_default();
        let (ours, asked) = UnixStream::pair().context("making a socket pair for CRIU's questions")?;
        let spawn = |conceal: bool| {
            let spawn = Spawn {
                keep: vec![theirs.as_fd()],
                netns: how.netns,
                path_first: how.path_first,
                run: match &memory {
                    Memory::Kdat(copy, _) => Run::Kdat(copy.path()),
                    _ => Run::Shared,
                },
                proc: &proc,
                questions: conceal.then_some(asked.as_fd()),
                ..Spawn::default()
            };
            Swrk::spawn(&self.path, &spawn)
        };
        let concealed =
            how.conceal.then(|| -> Result<_> { Ok((spawn(true)?, Questions::take(ours.as_fd())?)) });
        let concealed = concealed
            .and_then(|c| c.inspect_err(|e| ::log::info!("CRIU hands over all shared memory: {e:#}")).ok());
        let (worker, questions) = match concealed {
            Some((worker, questions)) => (worker, Some(questions)),
            None => (spawn(false)?, None),
        };
        let pages_fd = theirs.as_raw_fd();
        let stands_for = |stand_in: &StandIn| stand_in.stands_for(worker.pid().as_raw());
        let unseen = match stand_in.as_ref().map(stands_for).transpose() {
            Ok(unseen) => unseen.unwrap_or_default(),
            Err(e) => {
                ::log::info!("CRIU looks at all memory: {e:#}");
                return self.prepare_dump(&Worker { unseen: None, ..*how });
            }
        };
        Ok(PreparedDump { criu: self.clone(), worker, pages, pages_fd, memory, questions, unseen, stand_in })
    }
}

impl PreparedDump {
    /// CRIU's pid.
    pub fn pid(&self) -> i32 {
        self.worker.pid().as_raw()
    }

    /// The tasks whose private memory CRIU does not see.
    pub fn unseen(&self) -> &[i32] {
        &self.unseen
    }

    /// Which CRIU this is.
    pub fn version(&self) -> super::version::Version {
        self.criu.version
    }

    /// Where CRIU goes by soft-dirty bits: clears those of these tasks, which takes some 20 ms for each GiB and so is better done while
    /// they still run. What they write from now on comes with its bytes, everything else as holes. No pids: somebody else has
    /// cleared them. Without this call the dump does it.
    pub fn forget_writes(&mut self, pids: impl IntoIterator<Item = i32>) -> Result<()> {
        if let Memory::SoftDirty { cleared } = &mut self.memory {
            clear_soft_dirty(pids.into_iter().filter(|pid| !self.unseen.contains(pid)))?;
            *cleared = true;
        }
        Ok(())
    }
}

/// Is the worker's cache still the copy? Another build of CRIU removes a cache that is not its own, and every mount on it with it.
pub(super) fn is_mounted(copy: &tempfile::NamedTempFile, worker: i32) -> bool {
    use std::os::unix::fs::MetadataExt;
    let inode = |m: std::io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
    let seen = inode(std::fs::metadata(format!("/proc/{worker}/root{}", super::kdat::PATH)));
    seen.is_some() && seen == inode(copy.as_file().metadata())
}

/// Clears soft-dirty bits, so that nothing counts as written. A task that has ended has none.
pub(super) fn clear_soft_dirty(pids: impl IntoIterator<Item = i32>) -> Result<()> {
    for pid in pids {
        match std::fs::write(format!("/proc/{pid}/clear_refs"), "4") {
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                return Err(e).with_context(|| format!("clearing the soft-dirty bits of {pid}"));
            }
            _ => {}
        }
    }
    Ok(())
}
