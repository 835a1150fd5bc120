//! One container as the shim keeps it: what it was created from, its first process, its execs, and the flag that a migration
//! raises. What is done with it is in `lifecycle` (create, start, exit, delete), `exec`, `control` (signals, pause, limits) and
//! `checkpoint`.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use containerd_shim_protos::{protobuf::MessageFull, types::mount::Mount};
use tokio::{runtime::Handle, sync::watch};

use crate::{
    errors::{TaskError, TaskResult},
    events::Publisher,
    exec::Exec,
    options::RuncOptions,
    process::Process,
    reaper::Reaper,
    runc::Runc,
    state::State,
    stats::Cgroup,
};

/// What the container's first process comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `runc create`.
    Fresh,
    /// A checkpoint's images: start restores them.
    Checkpoint {
        /// Folder of the images.
        image: PathBuf,
        /// Images of a previous pre-dump, or empty.
        parent: String,
    },
    /// A migration: [`Container::adopt_restored`] brings it to life.
    Incoming {
        /// The agent's announcement.
        marker: PathBuf,
    },
}

/// What all containers of the process share.
#[derive(Clone)]
pub struct Shared {
    /// containerd's namespace.
    pub namespace: String,
    /// Waits for children.
    pub reaper: Reaper,
    /// Sends events to containerd.
    pub events: Arc<Publisher>,
    /// The shim's runtime, for callers from other threads.
    pub runtime: Handle,
    /// Which containers' images are restored whatever they say: [`crate::vet::UNVETTED`].
    pub unvetted: PathBuf,
}

impl Shared {
    /// Publishes one event, in the order of the calls.
    pub fn publish(&self, topic: &str, event: impl MessageFull) {
        self.events.publish(topic, event);
    }
}

#[derive(Default)]
struct Execs {
    by_id: HashMap<String, Arc<Exec>>,
    reserved: HashSet<String>,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Mounts of the root filesystem as the request listed them (overlay's upperdir is in an option of one of them).
    pub mounts: Vec<Mount>,
    /// The runtime options of the request.
    pub options: RuncOptions,
    /// The driver of its runc.
    pub runc: Runc,
    /// What its first process comes from.
    pub origin: Origin,
    /// Its first process.
    pub init: Arc<Process>,
    /// What it shares with the others.
    pub shared: Shared,
    execs: Mutex<Execs>,
    /// Execs that run or are being started; init's exit is announced only when there are none.
    pub(crate) running_execs: watch::Sender<usize>,
    /// Init has been collected: no exec can start any more, though the exit may not be announced yet.
    pub(crate) init_gone: AtomicBool,
    /// Whether Start has been called: an adopted container runs before it, and its exit must not be announced earlier.
    pub(crate) started: watch::Sender<bool>,
    /// Its cgroup, found when it had its first process: it is there, and counts, after that process has ended.
    cgroup: Mutex<Option<Cgroup>>,
    moving: AtomicBool,
}

impl Container {
    /// Puts a container together; nothing is done yet.
    #[allow(clippy::too_many_arguments, reason = "a plain constructor with one caller")]
    pub(crate) fn new(
        id: &str,
        bundle: &Path,
        mounts: Vec<Mount>,
        options: RuncOptions,
        origin: Origin,
        init: Arc<Process>,
        shared: Shared,
    ) -> Arc<Self> {
        let runc = Runc::new(&options, bundle, &shared.namespace, shared.reaper.clone());
        Arc::new(Self {
            id: id.to_string(),
            bundle: bundle.to_path_buf(),
            mounts,
            options,
            runc,
            origin,
            init,
            shared,
            execs: Mutex::default(),
            running_execs: watch::Sender::new(0),
            init_gone: AtomicBool::new(false),
            started: watch::Sender::new(false),
            cgroup: Mutex::default(),
            moving: AtomicBool::new(false),
        })
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// Where CRIU works when nobody says otherwise.
    pub fn criu_work_dir(&self) -> PathBuf {
        if self.options.criu_work_path.is_empty() {
            self.bundle.join("work")
        } else {
            PathBuf::from(&self.options.criu_work_path)
        }
    }

    /// Finds the cgroup that `pid` is in: the container's.
    pub(crate) fn find_cgroup(&self, pid: u32) {
        match Cgroup::of_pid(pid) {
            Ok(found) => *self.cgroup.lock().unwrap_or_else(PoisonError::into_inner) = Some(found),
            Err(e) => log::error!("the cgroup of {}: {e:#}", self.id),
        }
    }

    /// Its cgroup; none before it has had a process.
    pub fn cgroup(&self) -> Option<Cgroup> {
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The process that a request names: init for an empty `exec_id`.
    pub fn process(&self, exec_id: &str) -> TaskResult<Arc<Process>> {
        if exec_id.is_empty() { Ok(self.init.clone()) } else { Ok(self.exec(exec_id)?.process.clone()) }
    }

    /// The exec that a request names.
    pub fn exec(&self, exec_id: &str) -> TaskResult<Arc<Exec>> {
        let found = self.execs().by_id.get(exec_id).cloned();
        found.ok_or_else(|| TaskError::not_found(format!("process does not exist {exec_id}")))
    }

    /// All execs that have not been deleted.
    pub fn all_execs(&self) -> Vec<Arc<Exec>> {
        self.execs().by_id.values().cloned().collect()
    }

    /// The execs whose process is alive: CRIU cannot dump them, a migration has to end or refuse them.
    pub fn live_execs(&self) -> Vec<Arc<Exec>> {
        self.all_execs().into_iter().filter(|e| e.process.state() == State::Running).collect()
    }

    /// Takes an exec id, so that a second request for it is refused from now on.
    pub(crate) fn reserve_exec(&self, exec_id: &str) -> TaskResult<()> {
        let mut execs = self.execs();
        if execs.by_id.contains_key(exec_id) || !execs.reserved.insert(exec_id.to_string()) {
            return Err(TaskError::already_exists(format!("id {exec_id}")));
        }
        Ok(())
    }

    /// Gives a reserved exec id its exec, or back when there is none.
    pub(crate) fn settle_exec(&self, exec_id: &str, exec: Option<Arc<Exec>>) {
        let mut execs = self.execs();
        execs.reserved.remove(exec_id);
        if let Some(exec) = exec {
            execs.by_id.insert(exec_id.to_string(), exec);
        }
    }

    pub(crate) fn forget_exec(&self, exec_id: &str) {
        self.execs().by_id.remove(exec_id);
    }

    /// Whether a migration owns the container.
    pub fn is_moving(&self) -> bool {
        self.moving.load(Ordering::Acquire)
    }

    /// Refuses what a migration would lose or be broken by. A container that has ended meanwhile is an ordinary one again.
    pub(crate) fn refuse_while_moving(&self) -> TaskResult<()> {
        if self.is_moving() && self.init.state() != State::Stopped {
            return Err(TaskError::failed_precondition("container is being moved"));
        }
        Ok(())
    }

    /// A migration takes the container: waits for the operation that is in progress, checks that it runs (or is paused), and
    /// from then on kill, exec, delete, pause, resume, update and checkpoint answer FailedPrecondition "container is being moved"
    /// until the guard is dropped. A kill is thus never lost: the client sees it refused and can repeat it. If init ends by itself
    /// meanwhile, the usual path announces it; look at [`Process::exited`].
    pub async fn begin_move(self: &Arc<Self>) -> TaskResult<MoveGuard> {
        let _op = self.init.op.lock().await;
        match self.init.state() {
            State::Running | State::Paused => {}
            other => {
                return Err(TaskError::failed_precondition(format!("container is not running ({other:?})")));
            }
        }
        if self.moving.swap(true, Ordering::AcqRel) {
            return Err(TaskError::failed_precondition("container is being moved"));
        }
        Ok(MoveGuard(self.clone()))
    }
}

/// While it lives the container belongs to a migration, see [`Container::begin_move`].
pub struct MoveGuard(Arc<Container>);

impl Drop for MoveGuard {
    fn drop(&mut self) {
        self.0.moving.store(false, Ordering::Release);
    }
}
