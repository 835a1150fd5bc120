//! The Task API: each call finds its container and hands over. Served under both names that containerd uses, see `server`.
//!
//! ttrpc drops a call's future when its connection is lost (containerd restarts) or its time is up. Half a `create` must not be
//! what remains, so every call that changes something runs as a task of its own, which goes on to its end.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    events::task::{TaskCreate, TaskIO},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::Task,
    topics,
    ttrpc::{self, r#async::TtrpcContext},
    types::task::{ProcessInfo, Status},
};
use tokio::sync::watch;

use crate::{
    container::{Container, Shared},
    errors::{TaskError, TaskResult},
    hooks::Hooks,
    lifecycle,
    process::{Ended, Process},
    state::State,
};

/// The service. Clones share everything.
#[derive(Clone)]
pub struct Service {
    containers: Arc<Mutex<HashMap<String, Arc<Container>>>>,
    /// Ids of the Creates that are in progress.
    creating: Arc<Mutex<HashSet<String>>>,
    shared: Shared,
    hooks: Arc<dyn Hooks>,
    shutdown: Arc<watch::Sender<bool>>,
}

type Reply<T> = ttrpc::Result<T>;

/// Holds an id while its container is being created.
struct Creating {
    ids: Arc<Mutex<HashSet<String>>>,
    id: String,
}

impl Creating {
    fn begin(ids: &Arc<Mutex<HashSet<String>>>, id: &str) -> Option<Self> {
        let new = ids.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
        new.then(|| Self { ids: ids.clone(), id: id.to_owned() })
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// Runs `work` to its end, whatever becomes of the caller.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = TaskResult<T>> + Send + 'static,
) -> TaskResult<T> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|e| Err(TaskError::unknown(format!("the call has ended early: {e}"))))
}

impl Service {
    /// A service without containers.
    pub fn new(shared: Shared, hooks: Arc<dyn Hooks>) -> Self {
        Self {
            containers: Arc::default(),
            creating: Arc::default(),
            shared,
            hooks,
            shutdown: Arc::new(watch::Sender::new(false)),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of that id.
    pub fn container(&self, id: &str) -> TaskResult<Arc<Container>> {
        self.table().get(id).cloned().ok_or_else(|| TaskError::not_found("container not created"))
    }

    /// Asks the process to end, as the Shutdown call does.
    pub fn request_shutdown(&self) {
        self.shutdown.send_replace(true);
    }

    /// Resolves when the process is asked to end.
    pub async fn wait_shutdown(&self) {
        let _ = self.shutdown.subscribe().wait_for(|down| *down).await;
    }

    async fn create_container(self, request: api::CreateTaskRequest) -> TaskResult<u32> {
        let taken = || TaskError::already_exists(format!("container {}", request.id));
        // Two at once would run two runcs on one bundle.
        let _creating = Creating::begin(&self.creating, &request.id).ok_or_else(taken)?;
        if self.table().contains_key(&request.id) {
            return Err(taken());
        }
        let marker = transship::control::incoming_marker(&self.shared.namespace, &request.id);
        let marker = marker.exists().then_some(marker);
        let created = lifecycle::create(&request, marker, self.shared.clone()).await?;
        let container = created.container;
        let pid = container.init.pid();
        self.table().insert(request.id.clone(), container.clone());
        self.hooks.created(&container);
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        };
        self.shared.publish(topics::TASK_CREATE_EVENT_TOPIC, event);
        if let Some(watch) = created.watch {
            container.follow(watch);
        }
        Ok(pid)
    }

    async fn delete_process(self, request: api::DeleteRequest) -> TaskResult<Ended> {
        let container = self.container(&request.id)?;
        if !request.exec_id.is_empty() {
            container.refuse_while_moving()?;
            return container.delete_exec(&request.exec_id).await;
        }
        if container.init.state() == State::Incoming {
            self.hooks.abandon(&container).await;
        }
        let forget = || drop(self.table().remove(&request.id));
        let ended = container.delete(forget).await?;
        self.hooks.deleted(&container);
        Ok(ended)
    }
}

/// The status as the API names it. The processes of a paused container are all paused.
fn status(container: &Container, process: &Process) -> Status {
    let state = match container.init.state() {
        State::Paused => State::Paused,
        _ => process.state(),
    };
    match state {
        State::Created | State::CreatedCheckpoint | State::Incoming => Status::CREATED,
        State::Running => Status::RUNNING,
        State::Paused => Status::PAUSED,
        State::Stopped | State::Deleted => Status::STOPPED,
    }
}

fn empty() -> api::Empty {
    api::Empty::new()
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, r: api::StateRequest) -> Reply<api::StateResponse> {
        let container = self.container(&r.id)?;
        let process = container.process(&r.exec_id)?;
        Ok(api::StateResponse {
            id: process.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: process.pid(),
            status: status(&container, &process).into(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: process.exit_status(),
            exited_at: MessageField::some(process.exited_at()),
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, r: api::CreateTaskRequest) -> Reply<api::CreateTaskResponse> {
        let pid = to_the_end(self.clone().create_container(r)).await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> Reply<api::StartResponse> {
        let container = self.container(&r.id)?;
        let work = async move {
            if r.exec_id.is_empty() {
                container.start().await
            } else {
                container.start_exec(&r.exec_id).await
            }
        };
        let pid = to_the_end(work).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, r: api::DeleteRequest) -> Reply<api::DeleteResponse> {
        let ended = to_the_end(self.clone().delete_process(r)).await?;
        Ok(api::DeleteResponse {
            pid: ended.pid,
            exit_status: ended.status,
            exited_at: MessageField::some(ended.at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: api::PidsRequest) -> Reply<api::PidsResponse> {
        let container = self.container(&r.id)?;
        if container.init.state() == State::Incoming {
            // This process works for it until it has its own. A containerd that was restarted takes a shim without pids for one that its
            // predecessor lost, and removes it (containerd: core/runtime/v2/shim_load.go).
            let processes = vec![ProcessInfo { pid: std::process::id(), ..Default::default() }];
            return Ok(api::PidsResponse { processes, ..Default::default() });
        }
        let pids = container.runc.pids(&r.id).await.map_err(TaskError::from)?;
        let execs = container.all_execs();
        let processes = pids.into_iter().map(|pid| {
            let exec = execs.iter().find(|e| e.process.pid() == pid);
            let info = exec.map(|e| {
                let details = ProcessDetails { exec_id: e.process.id.clone(), ..Default::default() };
                Any {
                    type_url: "containerd.runc.v1.ProcessDetails".into(),
                    value: details.write_to_bytes().unwrap_or_default(),
                    ..Default::default()
                }
            });
            ProcessInfo { pid, info: info.into(), ..Default::default() }
        });
        Ok(api::PidsResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> Reply<api::Empty> {
        let container = self.container(&r.id)?;
        to_the_end(async move { container.pause().await }).await?;
        Ok(empty())
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> Reply<api::Empty> {
        let container = self.container(&r.id)?;
        to_the_end(async move { container.resume().await }).await?;
        Ok(empty())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: api::CheckpointTaskRequest) -> Reply<api::Empty> {
        let container = self.container(&r.id)?;
        to_the_end(async move { container.checkpoint(&r.path, r.options.as_ref()).await }).await?;
        Ok(empty())
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> Reply<api::Empty> {
        let container = self.container(&r.id)?;
        to_the_end(async move { container.kill(&r.exec_id, r.signal, r.all).await }).await?;
        Ok(empty())
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> Reply<api::Empty> {
        self.container(&r.id)?.add_exec(&r)?;
        Ok(empty())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: api::ResizePtyRequest) -> Reply<api::Empty> {
        self.container(&r.id)?.process(&r.exec_id)?.resize(r.width, r.height)?;
        Ok(empty())
    }

    async fn close_io(&self, _: &TtrpcContext, r: api::CloseIORequest) -> Reply<api::Empty> {
        self.container(&r.id)?.process(&r.exec_id)?.close_stdin().await;
        Ok(empty())
    }

    async fn update(&self, _: &TtrpcContext, r: api::UpdateTaskRequest) -> Reply<api::Empty> {
        let container = self.container(&r.id)?;
        let resources = r.resources.into_option().unwrap_or_default().value;
        to_the_end(async move { container.update(&resources).await }).await?;
        Ok(empty())
    }

    async fn wait(&self, _: &TtrpcContext, r: api::WaitRequest) -> Reply<api::WaitResponse> {
        // Only the process is held on to: a waiter must not keep a deleted container's memory.
        let process = self.container(&r.id)?.process(&r.exec_id)?;
        let exited = process.wait().await;
        Ok(api::WaitResponse {
            exit_status: exited.status,
            exited_at: MessageField::some(process.exited_at()),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: api::StatsRequest) -> Reply<api::StatsResponse> {
        let cgroup = self.container(&r.id)?.cgroup();
        let cgroup = cgroup.ok_or_else(|| TaskError::not_found("cgroup does not exist"))?;
        let any = cgroup.metrics().map_err(TaskError::from)?;
        Ok(api::StatsResponse { stats: MessageField::some(any), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, r: api::ConnectRequest) -> Reply<api::ConnectResponse> {
        let task_pid = self.container(&r.id).map_or(0, |c| c.init.pid());
        Ok(api::ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Reply<api::Empty> {
        // A pod's shim goes on while it has containers, or is about to.
        let idle = self.creating.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if idle && self.table().is_empty() {
            self.request_shutdown();
        }
        Ok(empty())
    }
}
