//! The page daemon of an arriving container: started before the freeze, serving from the restore on, filling once the tasks
//! run. The daemon itself is [`crate::memory::daemon`]; here it is tied to a migration: the connection to the source, the word
//! that everything is in its place, and what happens when it cannot be.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};

use super::codec::Kind;
use super::destination::Killer;
use super::link::Link;
use super::protocol::{Failure, Filled};
use super::report::{Faults, millis};
use crate::criu::plan::Plan;
use crate::memory::daemon::{Daemon, DaemonConfig, DaemonCtl, DaemonEvent, Remote};
use crate::memory::keeper::Keeper;
use crate::memory::read::Chunk;
use crate::memory::sets::encode_want;
use crate::memory::store::Store;
use crate::memory::{RangeSet, Space, batch};

/// The name of the socket in CRIU's work directory (criu/uffd.c).
const SOCKET: &str = "lazy-pages.socket";

/// A daemon that listens.
pub(super) struct Started {
    daemon: Daemon,
}

impl Started {
    /// Listens in CRIU's work directory; `program` is the executable that keeps descriptors if this process dies.
    pub fn new(work_dir: &Path, program: &Path) -> Result<Started> {
        let keeper = Keeper::start(program, crate::memory::keeper::ARG).context("starting the page daemon's keeper")?;
        let config = DaemonConfig { keeper: Some(keeper), ..DaemonConfig::new(work_dir.join(SOCKET)) };
        Ok(Started { daemon: Daemon::listen(config).context("starting the page daemon")? })
    }

    /// Serves faults from here on.
    pub fn serve(self, store: Store, plan: &Plan, link: Arc<Link>) -> Result<Serving> {
        let ctl = DaemonCtl::new()?;
        let shared = Arc::new(Shared::default());
        let remote: Option<Box<dyn Remote>> = match plan.remote.is_empty() {
            true => None,
            false => Some(Box::new(Peer { link: link.clone(), shared: shared.clone(), scratch: Vec::new(), done: false })),
        };
        let (lazy, away) = (plan.lazy.clone(), plan.remote.clone());
        let thread = {
            let (ctl, shared, link) = (ctl.clone(), shared.clone(), link.clone());
            std::thread::Builder::new().name("page-daemon".into()).spawn(move || {
                let own = ctl.clone();
                let mut hear = |event: DaemonEvent| heard(event, &shared, &own, &link);
                let stats = self.daemon.run(store, lazy, away, remote, ctl, &mut hear)?;
                if !stats.complete {
                    bail!("{}", shared.state().broken.take().unwrap_or_else(|| "it was told to stop".into()));
                }
                let begun = shared.state().running;
                let filled = Filled {
                    faults: Faults {
                        local: stats.faults_local,
                        remote: stats.faults_remote,
                        zero: stats.faults_zero,
                    },
                    store_peak_bytes: stats.store_peak_bytes,
                    fill_bytes: stats.filled_bytes,
                    fill_ms: begun.map_or(0.0, |at| millis(at.elapsed())),
                };
                // for the source's report; the container is whole in any case
                let mut wire = link.wire();
                let said = super::wire::FrameSink::json(&mut *wire, Kind::MemoryDone, &filled);
                said.and_then(|()| wire.close()).unwrap_or_else(|e| log::debug!("telling the source: {e:#}"));
                Ok(())
            })
        };
        let thread = thread.context("starting the page daemon's thread")?;
        Ok(Serving { ctl, shared, thread: Some(thread) })
    }
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    /// Frames of pages that another thread has read from the connection.
    inbox: VecDeque<Vec<u8>>,
    running: Option<Instant>,
    killer: Option<Killer>,
    /// Why the memory cannot be completed.
    broken: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn heard(event: DaemonEvent, shared: &Shared, ctl: &DaemonCtl, link: &Link) {
    let why = match event {
        DaemonEvent::Progress { .. } => {
            // a long fill is no silence
            link.wire().alive().ok();
            return;
        }
        DaemonEvent::Connected | DaemonEvent::Restored => return,
        DaemonEvent::Lost { missing, why } => {
            let bytes: u64 = missing.iter().map(|(_, pages)| pages.bytes()).sum();
            format!("{} KiB of its memory are lost: {why}", bytes >> 10)
        }
        DaemonEvent::Failed { why } => why,
    };
    log::error!("the page daemon: {why}");
    let killer = {
        let mut state = shared.state();
        state.broken = Some(why);
        state.killer.take()
    };
    // tasks that wait for a page that will not come wait for ever; before the commit the gate ends them
    if let Some(killer) = killer {
        end(killer, ctl);
    }
}

fn end(killer: Killer, ctl: &DaemonCtl) {
    match killer() {
        Ok(()) => ctl.abort(),
        Err(e) => log::error!("killing a container whose memory is lost: {e:#}"),
    }
}

/// A daemon that serves a restore.
pub(super) struct Serving {
    ctl: DaemonCtl,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Serving {
    /// The tasks run.
    pub fn running(&self) {
        self.shared.state().running = Some(Instant::now());
        self.ctl.running();
    }

    /// Pages that came while somebody else read from the connection.
    pub fn deliver(&self, payload: &[u8]) {
        self.shared.state().inbox.push_back(payload.to_vec());
    }

    /// Goes on in the background; `killer` ends the container if its memory cannot be completed.
    pub fn fill(mut self, killer: Killer) -> Filling {
        let broken = {
            let mut state = self.shared.state();
            if state.broken.is_none() {
                state.killer = Some(killer);
                None
            } else {
                Some(killer)
            }
        };
        if let Some(killer) = broken {
            end(killer, &self.ctl);
        }
        Filling { thread: self.thread.take() }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // an error before the commit: the tasks are killed behind the gate; the daemon holds on until they are
        if self.thread.is_some() {
            self.ctl.abort();
        }
    }
}

/// A container's memory on its way to its place, while the container runs.
pub struct Filling {
    thread: Option<JoinHandle<Result<()>>>,
}

impl Filling {
    /// Whether it has ended, well or not.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the memory could not be completed; the container was killed.
    pub fn wait(mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the page daemon panicked"))?.context("completing the container's memory")
    }
}

/// The pages that are still on the source.
struct Peer {
    link: Arc<Link>,
    shared: Arc<Shared>,
    scratch: Vec<u8>,
    done: bool,
}

impl Peer {
    fn put(
        &mut self,
        payload: &[u8],
        put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>,
    ) -> Result<()> {
        let batch = batch::decode(payload, &mut self.scratch)?;
        let space = batch.space();
        batch.chunks().try_for_each(|chunk| put(space, chunk))
    }
}

impl Remote for Peer {
    fn fd(&self) -> RawFd {
        self.link.wire().fd()
    }

    fn ask(&mut self, space: Space, range: Range<u64>) -> Result<()> {
        let mut wire = self.link.wire();
        super::wire::FrameSink::frame(&mut *wire, Kind::MemoryWant, &[&encode_want(space, &range)])?;
        wire.flush()
    }

    fn take(&mut self, put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<bool> {
        loop {
            let early = self.shared.state().inbox.pop_front();
            if let Some(payload) = early {
                self.put(&payload, put)?;
                continue;
            }
            if self.done {
                return Ok(true);
            }
            let link = self.link.clone();
            let mut wire = link.wire();
            match wire.try_recv()? {
                None => return Ok(false),
                Some(Kind::Memory) => self.put(wire.payload(), put)?,
                Some(Kind::MemoryDone) => self.done = true,
                Some(Kind::Failed) => return Err(wire.message::<Failure>()?.into()),
                Some(kind) => bail!("the source sent {kind:?} during the post-copy"),
            }
        }
    }
}

