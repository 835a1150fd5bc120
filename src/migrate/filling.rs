//! The page daemon of an arriving container: started before the freeze, serving from the restore on, filling once the tasks
//! run. The daemon itself is [`crate::memory::daemon`]; here it is tied to a migration: the connection to the source, the word
//! that everything is in its place, and what happens when it cannot be.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};

use super::codec::Kind;
use super::destination::Killer;
use super::link::Link;
use super::protocol::{Failure, Filled};
use super::report::{Faults, millis};
use crate::criu::plan::Plan;
use crate::memory::daemon::{
    Came, Daemon, DaemonConfig, DaemonCtl, DaemonEvent, Keeper, LazySets, Remote, SOCKET,
};
use crate::memory::read::Chunk;
use crate::memory::sets::encode_want;
use crate::memory::store::Store;
use crate::memory::{Space, batch};

/// The argument with which this executable becomes the keeper of a page daemon's descriptors.
pub const KEEPER: &str = "page-daemon-keeper";

/// A daemon that listens.
pub(super) struct Started {
    daemon: Daemon,
}

impl Started {
    /// Listens in CRIU's work directory; `program` is the executable that keeps descriptors if this process dies.
    pub fn new(work_dir: &Path, program: &Path) -> Result<Started> {
        let keeper = Keeper::start(program, KEEPER).context("starting the page daemon's keeper")?;
        let config = DaemonConfig { keeper: Some(keeper), ..DaemonConfig::new(work_dir.join(SOCKET)) };
        Ok(Started { daemon: Daemon::listen(config).context("starting the page daemon")? })
    }

    /// Serves faults from here on.
    pub fn serve(self, store: Store, plan: &Plan, link: Arc<Link>) -> Result<Serving> {
        let ctl = DaemonCtl::new()?;
        let shared = Arc::new(Shared::default());
        shared.state().remote = plan.remote.iter().map(|(_, pages)| pages.bytes()).sum();
        let remote: Option<Box<dyn Remote>> = match plan.remote.is_empty() {
            true => None,
            false => Some(Box::new(Peer {
                link: link.clone(),
                shared: shared.clone(),
                scratch: Vec::new(),
                done: false,
            })),
        };
        let sets = LazySets { lazy: plan.lazy.clone(), remote: plan.remote.clone() };
        let thread = {
            let (ctl, shared, link) = (ctl.clone(), shared.clone(), link.clone());
            std::thread::Builder::new().name("page-daemon".into()).spawn(move || {
                let own = ctl.clone();
                let mut hear = |event: DaemonEvent| heard(event, &shared, &own, &link);
                let stats = self.daemon.run(store, &sets, remote, ctl, &mut hear)?;
                if !stats.complete {
                    bail!(
                        "{}",
                        shared.state().broken.as_ref().map_or("it was told to stop", |(_, why)| why.as_str())
                    );
                }
                let mut state = shared.state();
                let begun = state.running;
                let filled_at = Instant::now();
                while !state.told {
                    state = shared.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                drop(state);
                let filled = Filled {
                    faults: Faults {
                        local: stats.faults_local,
                        remote: stats.faults_remote,
                        zero: stats.faults_zero,
                        local_us: (stats.fault_median_us, stats.fault_p99_us),
                        remote_us: (stats.remote_median_us, stats.remote_p99_us),
                    },
                    store_peak_bytes: stats.store_peak_bytes,
                    fill_bytes: stats.filled_bytes,
                    fill_ms: begun.map_or(0.0, |at| millis(filled_at.saturating_duration_since(at))),
                };
                // for the source's report; the container is whole in any case
                let mut wire = link.wire();
                let said = super::wire::FrameSink::json(&mut *wire, Kind::MemoryDone, &filled);
                // the source may still be sending what nobody needs any more: it closes
                match said.and_then(|()| wire.flush()) {
                    Ok(()) => while wire.recv().is_ok() {},
                    Err(e) => log::debug!("telling the source: {e:#}"),
                }
                Ok(())
            })
        };
        let thread = thread.context("starting the page daemon's thread")?;
        Ok(Serving { ctl, shared, thread: Some(thread) })
    }
}

#[derive(Default)]
struct Shared(Mutex<State>, Condvar);

#[derive(Default)]
struct State {
    /// Frames of pages that another thread has read from the connection.
    inbox: VecDeque<Vec<u8>>,
    running: Option<Instant>,
    killer: Option<Killer>,
    /// The source knows that the tasks run: only then may it hear that they are whole.
    told: bool,
    /// Bytes that are still on the source.
    remote: u64,
    /// Why the memory cannot be completed, and how much of it.
    broken: Option<(u64, String)>,
}

/// Where a container's memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// All of it on this node.
    Here,
    /// So many bytes are still on the source.
    Away(u64),
    /// So many bytes are lost; the container was killed.
    Lost(u64),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn heard(event: DaemonEvent, shared: &Shared, ctl: &DaemonCtl, link: &Link) {
    let why = match event {
        DaemonEvent::Progress { remote, .. } => {
            shared.state().remote = remote;
            // a long fill is no silence
            link.wire().alive().ok();
            return;
        }
        DaemonEvent::Connected | DaemonEvent::Restored => return,
        DaemonEvent::Lost { missing, why } => {
            let bytes: u64 = missing.iter().map(|(_, pages)| pages.bytes()).sum();
            (bytes, format!("{} KiB of the container's memory are lost: {why}", bytes >> 10))
        }
        DaemonEvent::Failed { why } => (shared.state().remote, why),
    };
    log::error!("the page daemon: {}", why.1);
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
            state.told = true;
            self.shared.1.notify_all();
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
        Filling { thread: self.thread.take(), shared: self.shared.clone() }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // an error before the commit: the tasks are killed behind the gate; the daemon holds on until they are
        if self.thread.is_some() {
            self.ctl.abort();
            self.shared.state().told = true;
            self.shared.1.notify_all();
        }
    }
}

/// A container's memory on its way to its place, while the container runs.
pub struct Filling {
    thread: Option<JoinHandle<Result<()>>>,
    shared: Arc<Shared>,
}

impl Filling {
    /// Whether it has ended, well or not.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Where the memory is now.
    pub fn whereabouts(&self) -> Whereabouts {
        let state = self.shared.state();
        match (&state.broken, self.is_finished()) {
            (Some((bytes, _)), _) => Whereabouts::Lost(*bytes),
            (None, false) if state.remote > 0 => Whereabouts::Away(state.remote),
            _ => Whereabouts::Here,
        }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the memory could not be completed; the container was killed.
    pub fn wait(mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread
            .join()
            .map_err(|_| anyhow!("the page daemon panicked"))?
            .context("completing the container's memory")
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
    fn put(&mut self, payload: &[u8], put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<()> {
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

    fn take(&mut self, put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<Came> {
        let early = self.shared.state().inbox.pop_front();
        if let Some(payload) = early {
            self.put(&payload, put)?;
            return Ok(Came::Something);
        }
        if self.done {
            return Ok(Came::Everything);
        }
        let link = self.link.clone();
        let mut wire = link.wire();
        match wire.try_recv()? {
            None => return Ok(Came::Nothing),
            Some(Kind::Memory) => self.put(wire.payload(), put)?,
            Some(Kind::MemoryDone) => self.done = true,
            Some(Kind::Failed) => return Err(wire.message::<Failure>()?.into()),
            Some(kind) => bail!("the source sent {kind:?} during the post-copy"),
        }
        Ok(Came::Something)
    }
}
