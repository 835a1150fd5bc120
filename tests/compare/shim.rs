//! Calls to a shim itself, over ttrpc to its socket: containerd hides some answers, and does not make some calls at all. One client
//! for both versions of the API: their messages are the same, only the service's name differs.

use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::asynchronous::Client;
use containerd_shim_protos::ttrpc::{self, Request};
use tokio::time::timeout;

use crate::calls::{Answer, Call, Failure, Field, Outcome, time};
use crate::daemon::status;
use crate::{spec, stats};

/// A shim's socket, and the version of the API that it has announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The socket's path in the node.
    pub path: String,
    /// 2 or 3.
    pub version: u64,
}

impl Address {
    /// What a shim answers to `start`: an address, or JSON.
    pub fn parse(answer: &str) -> Address {
        let json: serde_json::Value = serde_json::from_str(answer).unwrap_or_default();
        let address = json["address"].as_str().unwrap_or(answer.trim());
        let path = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        Address { path, version: json["version"].as_u64().unwrap_or(2) }
    }

    /// What containerd has noted in a task's bundle.
    pub fn of_bundle(bundle: &Path) -> std::io::Result<Address> {
        let read = |name: &str| std::fs::read_to_string(bundle.join(name));
        read("bootstrap.json").or_else(|_| read("address")).map(|text| Address::parse(&text))
    }
}

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: Client,
    service: String,
    namespace: &'static str,
}

impl Shim {
    /// Connects; `root` is the node's root as this process reaches it.
    pub async fn connect(root: &Path, address: &Address, namespace: &'static str) -> Result<Shim, Failure> {
        let path = root.join(address.path.trim_start_matches('/'));
        let client = Client::connect(&format!("unix://{}", path.display())).await.map_err(Failure::broken)?;
        Ok(Shim { client, service: format!("containerd.task.v{}.Task", address.version), namespace })
    }

    /// One call with these messages.
    pub async fn ask<A: Message>(&self, method: &str, message: &impl Message) -> Result<A, Failure> {
        let mut request = Request::new();
        request.set_service(self.service.clone());
        request.set_method(method.to_owned());
        request.set_payload(message.write_to_bytes().map_err(Failure::broken)?);
        request.set_timeout_nano(Duration::from_secs(60).as_nanos() as i64);
        let namespace = vec![self.namespace.to_owned()];
        request.metadata =
            ttrpc::context::to_pb([("containerd-namespace-ttrpc".to_owned(), namespace)].into());
        let answer = timeout(Duration::from_secs(60), self.client.request(request)).await;
        match answer.map_err(|_| Failure::broken("no answer within a minute"))? {
            Ok(answer) => A::parse_from_bytes(&answer.payload).map_err(Failure::broken),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(Failure { code: format!("{:?}", status.code()), message: status.message().to_owned() })
            }
            // which of them it is depends on the moment
            Err(ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed) => Err(Failure::broken("closed")),
            Err(e) => Err(Failure::broken(e)),
        }
    }

    async fn nothing(&self, method: &str, message: &impl Message) -> Outcome {
        self.ask::<api::Empty>(method, message).await.map(|_| Answer::new())
    }

    /// Makes a call for the container `id`.
    pub async fn call(&self, id: &str, call: Call) -> Outcome {
        let id = id.to_owned();
        match call {
            Call::State(exec) => {
                let request = api::StateRequest { id, exec_id: exec.into(), ..Default::default() };
                let a: api::StateResponse = self.ask("State", &request).await?;
                Ok(vec![
                    Field::Word("id", a.id),
                    Field::Word("bundle", a.bundle),
                    Field::Pid("pid", a.pid),
                    Field::Word("status", status(a.status.value())),
                    Field::Word("stdin", a.stdin),
                    Field::Word("stdout", a.stdout),
                    Field::Word("stderr", a.stderr),
                    Field::Word("terminal", a.terminal.to_string()),
                    Field::Word("exit", a.exit_status.to_string()),
                    Field::Word("at", time(a.exited_at.as_ref().map(|t| t.seconds))),
                    Field::Word("exec", a.exec_id),
                ])
            }
            Call::Start(exec) => {
                let request = api::StartRequest { id, exec_id: exec.into(), ..Default::default() };
                let a: api::StartResponse = self.ask("Start", &request).await?;
                Ok(vec![Field::Pid("pid", a.pid)])
            }
            Call::Delete(exec) => {
                let request = api::DeleteRequest { id, exec_id: exec.into(), ..Default::default() };
                let a: api::DeleteResponse = self.ask("Delete", &request).await?;
                Ok(vec![
                    Field::Pid("pid", a.pid),
                    Field::Word("exit", a.exit_status.to_string()),
                    Field::Word("at", time(a.exited_at.as_ref().map(|t| t.seconds))),
                ])
            }
            Call::Kill(exec, signal) => {
                let request = api::KillRequest { id, exec_id: exec.into(), signal, ..Default::default() };
                self.nothing("Kill", &request).await
            }
            Call::KillAll(signal) => {
                let request = api::KillRequest { id, signal, all: true, ..Default::default() };
                self.nothing("Kill", &request).await
            }
            Call::Exec(new) => {
                let spec = any(spec::PROCESS, new.spec.into_bytes());
                let request = api::ExecProcessRequest {
                    id,
                    exec_id: new.id.to_owned(),
                    terminal: new.stdio.terminal,
                    stdin: new.stdio.stdin,
                    stdout: new.stdio.stdout,
                    stderr: new.stdio.stderr,
                    spec,
                    ..Default::default()
                };
                self.nothing("Exec", &request).await
            }
            Call::Resize(exec, width, height) => {
                let request =
                    api::ResizePtyRequest { id, exec_id: exec.into(), width, height, ..Default::default() };
                self.nothing("ResizePty", &request).await
            }
            Call::CloseIo(exec) => {
                let request =
                    api::CloseIORequest { id, exec_id: exec.into(), stdin: true, ..Default::default() };
                self.nothing("CloseIO", &request).await
            }
            Call::Pause => self.nothing("Pause", &api::PauseRequest { id, ..Default::default() }).await,
            Call::Resume => self.nothing("Resume", &api::ResumeRequest { id, ..Default::default() }).await,
            Call::Checkpoint(c) => {
                let options = CheckpointOptions { exit: c.exit, work_path: c.work, ..Default::default() };
                let options = match c.odd_options {
                    Some(kind) => any(kind, Vec::new()),
                    None => any(spec::CHECKPOINT_OPTIONS, options.write_to_bytes().map_err(Failure::broken)?),
                };
                let request = api::CheckpointTaskRequest { id, path: c.path, options, ..Default::default() };
                self.nothing("Checkpoint", &request).await
            }
            Call::Update(json) => {
                let resources = any(spec::RESOURCES, json.into_bytes());
                let request = api::UpdateTaskRequest { id, resources, ..Default::default() };
                self.nothing("Update", &request).await
            }
            Call::Wait(exec) => {
                let request = api::WaitRequest { id, exec_id: exec.into(), ..Default::default() };
                let a: api::WaitResponse = self.ask("Wait", &request).await?;
                Ok(vec![
                    Field::Word("exit", a.exit_status.to_string()),
                    Field::Word("at", time(a.exited_at.as_ref().map(|t| t.seconds))),
                ])
            }
            Call::Stats => {
                let request = api::StatsRequest { id, ..Default::default() };
                let a: api::StatsResponse = self.ask("Stats", &request).await?;
                Ok(vec![Field::Exact("stats", stats::shown(&a.stats.type_url, &a.stats.value))])
            }
            Call::Pids => {
                let request = api::PidsRequest { id, ..Default::default() };
                let a: api::PidsResponse = self.ask("Pids", &request).await?;
                let one = |p: api::ProcessInfo| {
                    let exec = p.info.as_ref().map(|a| spec::exec_of(&a.type_url, &a.value));
                    (p.pid, exec.unwrap_or_default())
                };
                Ok(vec![Field::Pids(a.processes.into_iter().map(one).collect())])
            }
            Call::Connect => {
                let request = api::ConnectRequest { id, ..Default::default() };
                let a: api::ConnectResponse = self.ask("Connect", &request).await?;
                Ok(vec![
                    Field::Pid("shim", a.shim_pid),
                    Field::Pid("task", a.task_pid),
                    Field::Word("version", a.version),
                ])
            }
            Call::Shutdown(now) => {
                self.nothing("Shutdown", &api::ShutdownRequest { id, now, ..Default::default() }).await
            }
        }
    }
}

/// A message of a named type.
pub fn any(kind: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any { type_url: kind.into(), value, ..Default::default() })
}
