//! What a live migration does with memory, in one process: CRIU's list of pages, their content read from the frozen tasks, images
//! and a page daemon.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};

use crate::cgroup::Freezer;
use crate::criu::plan::Plan;
use crate::criu::{ImageKind, PageEvent};
use crate::memory::Space;
use crate::memory::daemon::{Daemon, DaemonConfig, DaemonCtl, DaemonStats, LazySets, SOCKET};
use crate::memory::store::Store;

const PAGE: usize = 4096;

/// The holes of a dump, as CRIU reports them.
#[derive(Default)]
pub struct Holes {
    at: Option<Space>,
    pub ranges: Vec<(Space, u64, u64)>,
}

impl Holes {
    pub fn event(&mut self, event: &PageEvent<'_>) {
        match *event {
            PageEvent::Open { kind, id } => self.at = Some(Space { kind, id }),
            PageEvent::Hole { vaddr, pages, .. } => {
                self.ranges.extend(self.at.map(|s| (s, vaddr, pages * PAGE as u64)))
            }
            _ => {}
        }
    }

    /// Reads all of them from the frozen tasks.
    pub fn read(&self, freezer: &Freezer) -> Result<Store> {
        let mut store = Store::new(8 << 30)?;
        let mut tasks = HashMap::new();
        for pid in freezer.pids()? {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let inner = status.lines().find_map(|l| l.strip_prefix("NSpid:")).context("NSpid")?;
            let inner: u64 = inner.split_whitespace().next_back().context("NSpid")?.parse()?;
            tasks.insert(inner, File::open(format!("/proc/{pid}/mem"))?);
        }
        let mut buf = vec![0; 1 << 20];
        for (space, vaddr, len) in &self.ranges {
            ensure!(space.kind == ImageKind::Pid, "{space:?} {vaddr:#x}");
            let memory = tasks.get(&space.id).with_context(|| format!("no task {space:?}"))?;
            let mut done = 0;
            while done < *len {
                let n = (len - done).min(buf.len() as u64) as usize;
                memory
                    .read_exact_at(&mut buf[..n], vaddr + done)
                    .with_context(|| format!("{:#x}", vaddr + done))?;
                for (i, page) in buf[..n].chunks(PAGE).enumerate() {
                    let at = vaddr + done + (i * PAGE) as u64;
                    match page.iter().any(|b| *b != 0) {
                        true => store.put(*space, at, page)?,
                        false => store.zero(*space, at, PAGE as u64)?,
                    }
                }
                done += n as u64;
            }
        }
        Ok(store)
    }
}

/// The page daemon of one restore.
pub struct Pages {
    ctl: DaemonCtl,
    thread: JoinHandle<Result<DaemonStats>>,
}

impl Pages {
    pub fn serve(work: &Path, store: Store, plan: &Plan) -> Result<Self> {
        let daemon = Daemon::listen(DaemonConfig::new(work.join(SOCKET)))?;
        let sets = LazySets { lazy: plan.lazy.clone(), remote: plan.remote.clone() };
        let ctl = DaemonCtl::new()?;
        let theirs = ctl.clone();
        let thread = std::thread::spawn(move || daemon.run(store, &sets, None, theirs, &mut |_| {}));
        Ok(Self { ctl, thread })
    }

    pub fn running(&self) {
        self.ctl.running();
    }

    pub fn abort(self) {
        self.ctl.abort();
        let _ = self.thread.join();
    }

    pub fn finish(self) -> Result<DaemonStats> {
        let stats = self.thread.join().expect("no panic")?;
        ensure!(stats.complete, "not all pages are in place");
        Ok(stats)
    }
}
