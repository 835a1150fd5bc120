//! A shim's calls through containerd's Tasks service: what every client of containerd sees.

use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CheckpointTaskRequest, CloseIoRequest, CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest,
    ExecProcessRequest, GetRequest, KillRequest, ListPidsRequest, MetricsRequest, PauseTaskRequest,
    ResizePtyRequest, ResumeTaskRequest, StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Status};
use containerd_client::types::{Descriptor, Mount};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use prost_types::Any;

use crate::calls::{Answer, Call, Checkpoint, Failure, Field, Outcome, time};
use crate::{spec, stats};

/// containerd's Tasks in one namespace.
#[derive(Clone)]
pub struct Daemon {
    channel: Channel,
    namespace: &'static str,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure { code: format!("{:?}", status.code()), message: status.message().to_owned() }
    }
}

impl Daemon {
    /// Over a connection that exists.
    pub fn new(channel: Channel, namespace: &'static str) -> Daemon {
        Daemon { channel, namespace }
    }

    /// The namespace.
    pub fn namespace(&self) -> &'static str {
        self.namespace
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone()).max_decoding_message_size(16 << 20)
    }

    /// A request in this namespace.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().expect("a header"));
        request
    }

    /// Makes a task; its pid.
    pub async fn create(&self, request: CreateTaskRequest) -> Result<u32, Failure> {
        Ok(self.tasks().create(self.request(request)).await?.into_inner().pid)
    }

    /// Makes a call for the container `id`.
    pub async fn call(&self, id: &str, call: Call) -> Outcome {
        let (mut tasks, container_id) = (self.tasks(), id.to_owned());
        let exec_id = |exec: &str| exec.to_owned();
        match call {
            Call::State(exec) => {
                let request = GetRequest { container_id, exec_id: exec_id(exec) };
                let answer = tasks.get(self.request(request)).await?.into_inner();
                let p = answer.process.unwrap_or_default();
                Ok(vec![
                    Field::Word("id", p.id),
                    Field::Pid("pid", p.pid),
                    Field::Word("status", status(p.status)),
                    Field::Word("stdin", p.stdin),
                    Field::Word("stdout", p.stdout),
                    Field::Word("stderr", p.stderr),
                    Field::Word("terminal", p.terminal.to_string()),
                    Field::Word("exit", p.exit_status.to_string()),
                    Field::Word("at", time(p.exited_at.map(|t| t.seconds))),
                ])
            }
            Call::Start(exec) => {
                let request = StartRequest { container_id, exec_id: exec_id(exec) };
                let answer = tasks.start(self.request(request)).await?.into_inner();
                Ok(vec![Field::Pid("pid", answer.pid)])
            }
            Call::Delete(exec) => {
                let answer = if exec.is_empty() {
                    tasks.delete(self.request(DeleteTaskRequest { container_id })).await?
                } else {
                    let request = DeleteProcessRequest { container_id, exec_id: exec_id(exec) };
                    tasks.delete_process(self.request(request)).await?
                };
                let answer = answer.into_inner();
                Ok(vec![
                    Field::Word("id", answer.id),
                    Field::Pid("pid", answer.pid),
                    Field::Word("exit", answer.exit_status.to_string()),
                    Field::Word("at", time(answer.exited_at.map(|t| t.seconds))),
                ])
            }
            Call::Kill(exec, signal) => {
                let request = KillRequest { container_id, exec_id: exec_id(exec), signal, all: false };
                tasks.kill(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::KillAll(signal) => {
                let request = KillRequest { container_id, exec_id: String::new(), signal, all: true };
                tasks.kill(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::Exec(new) => {
                let request = ExecProcessRequest {
                    container_id,
                    stdin: new.stdio.stdin,
                    stdout: new.stdio.stdout,
                    stderr: new.stdio.stderr,
                    terminal: new.stdio.terminal,
                    spec: Some(Any { type_url: spec::PROCESS.into(), value: new.spec.into_bytes() }),
                    exec_id: new.id.to_owned(),
                };
                tasks.exec(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::Resize(exec, width, height) => {
                let request = ResizePtyRequest { container_id, exec_id: exec_id(exec), width, height };
                tasks.resize_pty(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::CloseIo(exec) => {
                let request = CloseIoRequest { container_id, exec_id: exec_id(exec), stdin: true };
                tasks.close_io(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::Pause => {
                tasks.pause(self.request(PauseTaskRequest { container_id })).await?;
                Ok(Answer::new())
            }
            Call::Resume => {
                tasks.resume(self.request(ResumeTaskRequest { container_id })).await?;
                Ok(Answer::new())
            }
            Call::Checkpoint(c) => {
                let kinds = self.checkpoint(id, &c, None).await?.into_iter().map(|d| d.media_type);
                let mut kinds: Vec<String> = kinds.collect();
                kinds.sort();
                Ok(vec![Field::Word("content", kinds.join(" "))])
            }
            Call::Update(json) => {
                let resources = Some(Any { type_url: spec::RESOURCES.into(), value: json.into_bytes() });
                let request = UpdateTaskRequest { container_id, resources, ..Default::default() };
                tasks.update(self.request(request)).await?;
                Ok(Answer::new())
            }
            Call::Wait(exec) => {
                let request = WaitRequest { container_id, exec_id: exec_id(exec) };
                let answer = tasks.wait(self.request(request)).await?.into_inner();
                Ok(vec![
                    Field::Word("exit", answer.exit_status.to_string()),
                    Field::Word("at", time(answer.exited_at.map(|t| t.seconds))),
                ])
            }
            Call::Stats => {
                let request = MetricsRequest { filters: vec![format!("id=={id}")] };
                let answer = tasks.metrics(self.request(request)).await?.into_inner();
                let data = answer.metrics.into_iter().filter_map(|m| m.data);
                let shown = data.map(|d| stats::shown(&d.type_url, &d.value)).collect::<Vec<_>>();
                Ok(vec![Field::Exact("metrics", shown.join(" and "))])
            }
            Call::Pids => {
                let answer = tasks.list_pids(self.request(ListPidsRequest { container_id })).await?;
                let processes = answer.into_inner().processes.into_iter();
                let info = |a: Option<Any>| a.map(|a| spec::exec_of(&a.type_url, &a.value));
                let pids = processes.map(|p| (p.pid, info(p.info).unwrap_or_default())).collect();
                Ok(vec![Field::Pids(pids)])
            }
            Call::Connect | Call::Shutdown(_) => Err(Failure::broken("containerd does not offer this")),
        }
    }

    /// Dumps a container; what containerd has stored of it, which a lease keeps.
    pub async fn checkpoint(
        &self,
        id: &str,
        c: &Checkpoint,
        lease: Option<&str>,
    ) -> Result<Vec<Descriptor>, Failure> {
        let (image_path, work_path) = (c.path.clone(), c.work.clone());
        let options = CheckpointOptions { exit: c.exit, image_path, work_path, ..Default::default() };
        let any = match c.odd_options {
            Some(kind) => Any { type_url: kind.into(), value: Vec::new() },
            None => Any {
                type_url: spec::CHECKPOINT_OPTIONS.into(),
                value: options.write_to_bytes().expect("plain fields"),
            },
        };
        let request =
            CheckpointTaskRequest { container_id: id.to_owned(), options: Some(any), ..Default::default() };
        let mut request = self.request(request);
        if let Some(lease) = lease.and_then(|l| l.parse().ok()) {
            request.metadata_mut().insert("containerd-lease", lease);
        }
        Ok(self.tasks().checkpoint(request).await?.into_inner().descriptors)
    }
}

/// A task to be made on these mounts.
pub fn create_request(
    id: &str,
    rootfs: Vec<Mount>,
    stdio: &crate::calls::Stdio,
    options: Option<Any>,
) -> CreateTaskRequest {
    CreateTaskRequest {
        container_id: id.to_owned(),
        rootfs,
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        options,
        ..Default::default()
    }
}

/// A status by its number, the same in both API's.
pub fn status(number: i32) -> String {
    let names = ["unknown", "created", "running", "stopped", "paused", "pausing"];
    names.get(number as usize).copied().unwrap_or("a number").to_owned()
}
