//! A container's life: create, start, the exit of its first process, delete. And the arrival of a migration, which takes the place
//! of create's and start's work.
//!
//! Order of what containerd is told: TaskCreate, TaskStart, then exits; init's exit after those of the execs. An exit that
//! happens before Start has returned waits for the process' `op` lock, which Start holds until it has announced the start.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use containerd_shim_protos::{
    events::task::{TaskDelete, TaskExit, TaskOOM, TaskStart},
    shim::shim::CreateTaskRequest,
    topics,
};

use crate::{
    bundle,
    container::{Container, Origin, Shared},
    errors::{TaskError, TaskResult, words},
    io::{ProcessIo, StdioConfig},
    mounts, oom, options,
    process::{Ended, Process, timestamp},
    reaper::{Exit, ExitWatch, Mark},
    runc::{self, CreateArgs},
    runc_error::RuncError,
    state::{Op, State},
};

/// So long after its process' end a container's OOM kill is still announced.
const OOM_GRACE: Duration = Duration::from_secs(1);

/// A client's error for a failed runc run: runc's own reason behind `what`.
pub(crate) fn explain(e: anyhow::Error, what: &str) -> TaskError {
    match e.downcast_ref::<RuncError>() {
        Some(runc) => TaskError::unknown(runc.explain(what)),
        None => TaskError::unknown(format!("{what}: {}", words(&e))),
    }
}

/// A created container, and the watch on its init (none while there is no process).
pub struct Created {
    /// The container.
    pub container: Arc<Container>,
    /// To be passed to [`Container::follow`] once the creation has been announced.
    pub watch: Option<ExitWatch>,
}

/// Carries out a Create request. `marker` is the agent's announcement of an incoming migration, when there is one. On an error
/// nothing is left mounted.
pub async fn create(
    request: &CreateTaskRequest,
    marker: Option<PathBuf>,
    shared: Shared,
) -> TaskResult<Created> {
    let runtime = options::runtime_options(request.options.as_ref())?;
    let bundle_dir = Path::new(&request.bundle);
    options::save(bundle_dir, &runtime)?;
    let state_root = runc::root(&runtime, &shared.namespace);
    bundle::prepare_criu_config(bundle_dir, runc::binary(&runtime), &state_root)?;

    let (origin, state) = match marker {
        Some(marker) => (Origin::Incoming { marker }, State::Incoming),
        None if request.checkpoint.is_empty() => (Origin::Fresh, State::Created),
        None => {
            let image = PathBuf::from(&request.checkpoint);
            (
                Origin::Checkpoint { image, parent: request.parent_checkpoint.clone() },
                State::CreatedCheckpoint,
            )
        }
    };
    let stdio = StdioConfig {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let init = Process::new(&request.id, false, stdio, state);
    let container =
        Container::new(&request.id, bundle_dir, request.rootfs.clone(), runtime, origin, init, shared);
    // An incoming container's root is filled by the migration first, and mounted by it.
    if state != State::Incoming {
        container.mount_rootfs().await?;
    }
    if state != State::Created {
        return Ok(Created { container, watch: None });
    }
    let mark = container.shared.reaper.mark();
    match container.runc_create().await {
        Ok(pid) => {
            container.init.set_pid(pid);
            let watch = container.shared.reaper.watch(pid as i32, mark);
            Ok(Created { container, watch: Some(watch) })
        }
        Err(e) => {
            if let Some(io) = container.init.io() {
                io.close().await;
            }
            container.unmount_rootfs().await.unwrap_or_else(|e| log::warn!("after a failed create: {e:#}"));
            Err(e)
        }
    }
}

impl Container {
    /// Mounts the root filesystem as the request describes it. Create does it, except for an incoming migration.
    pub async fn mount_rootfs(&self) -> Result<()> {
        mounts::mount_all(&self.mounts, &self.rootfs()).await
    }

    /// Undoes [`Container::mount_rootfs`]; nothing mounted is fine.
    pub async fn unmount_rootfs(&self) -> Result<()> {
        mounts::unmount_all(&self.rootfs()).await
    }

    async fn runc_create(&self) -> TaskResult<u32> {
        let stdio = self.open_stdio(&self.init).await.context("failed to create init process I/O")?;
        let args = CreateArgs {
            console_socket: stdio.console.as_ref().map(|c| c.path().to_path_buf()),
            no_pivot: self.options.no_pivot_root,
            no_new_keyring: self.options.no_new_keyring,
        };
        let run = self.runc.create(&self.id, &args, stdio.child).await;
        run.map_err(|e| explain(e, "OCI runtime create failed"))?;
        self.begin_stdio(&self.init, stdio.console).await?;
        Ok(runc::read_pid(&self.runc.pid_file()).context("failed to retrieve OCI runtime container pid")?)
    }

    /// Starts the first process (or restores it, from a checkpoint) and announces it. For a container that a migration has brought
    /// to life this is the announcement only.
    pub async fn start(self: &Arc<Self>) -> TaskResult<u32> {
        let _op = self.init.op.lock().await;
        if !self.arrived_unannounced() {
            self.init.check(Op::Start)?;
            if self.init.state() == State::CreatedCheckpoint {
                let watch = self.restore_checkpoint().await?;
                self.follow(watch);
            } else {
                let run = self.runc.start(&self.id).await;
                run.map_err(|e| explain(e, "OCI runtime start failed"))?;
            }
            self.init.set_state(State::Running);
        }
        self.announce_start();
        Ok(self.init.pid())
    }

    fn announce_start(&self) {
        let event = TaskStart { container_id: self.id.clone(), pid: self.init.pid(), ..Default::default() };
        self.shared.publish(topics::TASK_START_EVENT_TOPIC, event);
        self.started.send_replace(true);
    }

    /// A migration has brought it to life, and containerd has not called Start yet.
    fn arrived_unannounced(&self) -> bool {
        let incoming = matches!(self.origin, Origin::Incoming { .. });
        incoming && self.init.pid() != 0 && !*self.started.borrow()
    }

    /// Somebody ends an arrived container for which Start was never called (the agent died in between): its exit, which is held
    /// back until the start is announced, must get out.
    pub(crate) fn announce_before_kill(&self) {
        if self.arrived_unannounced() {
            self.announce_start();
        }
    }

    /// The arrival of a migration: our own `runc restore` ([`crate::runc::Runc::restore`]) has made `pid`, whose stdio is `io`. The
    /// container is Running from here on, its exit and its OOM kills are watched; the exit is announced only after containerd
    /// has called Start. `since` is [`crate::reaper::Reaper::mark`] taken before the restore. The tasks may still be held
    /// at the gate. Callable from any thread.
    pub fn adopt_restored(self: &Arc<Self>, pid: u32, io: Arc<ProcessIo>, since: Mark) -> TaskResult<()> {
        if self.init.state() != State::Incoming {
            let state = self.init.state();
            return Err(TaskError::failed_precondition(format!("not an incoming container ({state:?})")));
        }
        self.init.set_pid(pid);
        self.init.set_io(io);
        self.init.set_state(State::Running);
        self.follow(self.shared.reaper.watch(pid as i32, since));
        Ok(())
    }

    /// Watches init's exit and the container's OOM kills.
    pub fn follow(self: &Arc<Self>, watch: ExitWatch) {
        self.find_cgroup(self.init.pid());
        let container = self.clone();
        self.shared.runtime.spawn(async move {
            let mut watching_oom = tokio::spawn(container.clone().watch_oom());
            if let Ok(exit) = watch.exit().await {
                container.init_exited(exit).await;
            }
            // The word of a kill may come after the end that it has brought. The watch ends with the cgroup.
            if tokio::time::timeout(OOM_GRACE, &mut watching_oom).await.is_err() {
                watching_oom.abort();
            }
        });
    }

    async fn watch_oom(self: Arc<Self>) {
        let Some(cgroup) = self.cgroup() else { return };
        let mut kills = match oom::watch(&cgroup) {
            Ok(kills) => kills,
            Err(e) => return log::warn!("no OOM events for {}: {e:#}", self.id),
        };
        while kills.next().await.is_some() {
            let event = TaskOOM { container_id: self.id.clone(), ..Default::default() };
            self.shared.publish(topics::TASK_OOM_EVENT_TOPIC, event);
        }
    }

    async fn init_exited(self: Arc<Self>, exit: Exit) {
        // A restored process that a migration gave up before it ran: nobody has heard of it.
        if self.init.pid() != exit.pid as u32 {
            return;
        }
        self.init_gone.store(true, Ordering::Release);
        if bundle::must_kill_all(&self.bundle)
            && let Err(e) = self.runc.kill(&self.id, libc::SIGKILL as u32, true).await
        {
            log::error!("failed to kill init's children of {}: {e:#}", self.id);
        }
        if matches!(self.origin, Origin::Incoming { .. }) {
            let _ = self.started.subscribe().wait_for(|started| *started).await;
        }
        let _ = self.running_execs.subscribe().wait_for(|n| *n == 0).await;
        let _op = self.init.op.lock().await;
        if self.init.state() == State::Paused
            && let Err(e) = self.runc.resume(&self.id).await
        {
            // A frozen cgroup could not be removed.
            log::error!("resuming exited container {} from paused state: {e:#}", self.id);
        }
        self.init.set_exited(&exit);
        let event = TaskExit {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid: exit.pid as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(Some(exit.at))).into(),
            ..Default::default()
        };
        self.shared.publish(topics::TASK_EXIT_EVENT_TOPIC, event);
    }

    /// Deletes the container: runc's state, the stdio, the root's mounts. `forget` is called when that is done, before the deletion is
    /// announced. The answer is what was announced: the end of one that had been created only comes behind its deletion.
    pub async fn delete(self: &Arc<Self>, forget: impl FnOnce()) -> TaskResult<Ended> {
        let _op = self.init.op.lock().await;
        self.init.check(Op::Delete)?;
        self.refuse_while_moving()?;
        let never_arrived = self.init.state() == State::Incoming;
        self.init.finish_io().await;
        let mut failure = None;
        if let Err(e) = self.runc.delete(&self.id, never_arrived).await {
            // Gone already: a checkpoint that ends the container deletes it, and a never started restore has none.
            let gone = e.downcast_ref::<RuncError>().is_some_and(|e| e.mentions("does not exist"));
            if !gone {
                failure = Some(explain(e, "failed to delete task"));
            }
        }
        if let Err(e) = self.unmount_rootfs().await {
            log::warn!("failed to cleanup rootfs mount: {e:#}");
            failure.get_or_insert(TaskError::unknown(format!("failed rootfs umount: {e:#}")));
        }
        if let Some(e) = failure {
            return Err(e);
        }
        if let Origin::Incoming { marker } = &self.origin {
            let _ = std::fs::remove_file(marker);
        }
        self.init.set_state(State::Deleted);
        // Lets go of a held-back exit of a container that is deleted before it was started.
        self.started.send_replace(true);
        forget();
        let ended = self.init.ended();
        let event = TaskDelete {
            container_id: self.id.clone(),
            pid: ended.pid,
            exit_status: ended.status,
            exited_at: Some(ended.at.clone()).into(),
            ..Default::default()
        };
        self.shared.publish(topics::TASK_DELETE_EVENT_TOPIC, event);
        Ok(ended)
    }
}
