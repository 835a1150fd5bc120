//! Containers without ctr: made from a template and driven through containerd's API, so that many can be at it at once.

use std::collections::BTreeMap;
use std::future::Future;

use anyhow::{Context, Result, bail};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CheckpointTaskRequest, DeleteProcessRequest, ExecProcessRequest, GetRequest, KillRequest, StartRequest,
    WaitRequest,
};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::Channel;
use prost_types::Any;
use serde_json::{Value, json};
use transship::containerd::record::Record;
use transship::containerd::task::Stdio;
use transship::containerd::{Containerd, Namespace};

use crate::bed::{Bed, Node};
use crate::requirements;

const SNAPSHOTTER: &str = "overlayfs";
const NAMESPACE: &str = "default";

/// containerd of a node, and what containers are made from.
#[derive(Clone)]
pub struct Api {
    ns: Namespace,
    tasks: TasksClient<Channel>,
    template: Record,
    parent: String,
}

/// Runs `work` with a node's containerd; containers are made of the probe's image and run `ts-probe sleep` unless told otherwise. They are
/// copies of a container `tmpl` that goes away if the work succeeds.
pub fn with<T, F: Future<Output = Result<T>>>(
    bed: &Bed,
    node: Node,
    work: impl FnOnce(Api) -> F,
) -> Result<T> {
    let runtime = requirements::runtime();
    let line =
        ["ctr", "c", "create", "--runtime", &runtime, "localhost/probe:1", "tmpl", "ts-probe", "sleep"];
    bed.ok(node, &line)?;
    let socket = bed.path(node, "/run/containerd/containerd.sock")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let ns = Containerd::connect(&socket).await?.namespace(NAMESPACE)?;
        let channel = containerd_client::connect(&socket).await.context("containerd")?;
        let template = ns.container("tmpl").await?.context("the template")?;
        let parent = ns.snapshot(SNAPSHOTTER, "tmpl").await?.context("the template's snapshot")?.parent;
        work(Api { ns, tasks: TasksClient::new(channel), template, parent }).await
    })?;
    bed.ok(node, &["ctr", "c", "rm", "tmpl"])?;
    Ok(done)
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("a header"));
    request
}

impl Api {
    /// The same with another runtime, and with containers that have no limits of their own.
    pub fn unlimited(&self, runtime: &str) -> Api {
        let mut other = self.clone();
        other.template.runtime = runtime.into();
        other.template.spec["process"]["rlimits"] = Value::Null;
        other
    }

    /// Makes a container and its task, not started; one of a pod shares the shim of the container that the pod is named after.
    pub async fn create(&self, id: &str, pod: Option<&str>, args: &[&str], stdout: &str) -> Result<()> {
        let mut record = Record { id: id.into(), snapshot_key: id.into(), ..self.template.clone() };
        let spec = &mut record.spec;
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        if let Some(pod) = pod {
            let kind = if pod == id { "sandbox" } else { "container" };
            spec["annotations"] =
                json!({"io.kubernetes.cri.sandbox-id": pod, "io.kubernetes.cri.container-type": kind});
        }
        if !args.is_empty() {
            spec["process"]["args"] = json!(args);
        }
        // the record first: a snapshot that nobody refers to is collected
        self.ns.container_create(record).await?;
        let mounts = self.ns.snapshot_prepare(SNAPSHOTTER, id, &self.parent, BTreeMap::default()).await?;
        let stdio = Stdio { stdout: stdout.into(), ..Stdio::default() };
        self.ns.task_create(id, mounts, stdio).await.map(drop)
    }

    /// Starts the task; its pid in the node.
    pub async fn start(&self, id: &str) -> Result<u32> {
        self.ns.task_start(id).await
    }

    /// [`Api::create`] without output, and [`Api::start`].
    pub async fn run(&self, id: &str, pod: Option<&str>, args: &[&str]) -> Result<u32> {
        self.create(id, pod, args, "").await?;
        self.start(id).await
    }

    /// Adds a process to a task and starts it; its pid in the node.
    pub async fn exec_start(&self, id: &str, exec: &str, args: &[&str]) -> Result<u32> {
        let mut process = self.template.spec["process"].clone();
        process["args"] = json!(args);
        process["terminal"] = Value::Bool(false);
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
        };
        let added = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            spec: Some(spec),
            ..Default::default()
        };
        let mut tasks = self.tasks.clone();
        tasks.exec(request(added)).await.with_context(|| format!("exec in {id}"))?;
        let start = StartRequest { container_id: id.into(), exec_id: exec.into() };
        let started =
            tasks.start(request(start)).await.with_context(|| format!("start of an exec in {id}"))?;
        Ok(started.into_inner().pid)
    }

    /// Waits for the end of a task (`exec` empty) or of an exec; its exit status.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<u32> {
        let wait = WaitRequest { container_id: id.into(), exec_id: exec.into() };
        let answer = self.tasks.clone().wait(request(wait)).await;
        Ok(answer.with_context(|| format!("waiting for {id} {exec}"))?.into_inner().exit_status)
    }

    /// Forgets an exec that has ended.
    pub async fn exec_delete(&self, id: &str, exec: &str) -> Result<()> {
        let delete = DeleteProcessRequest { container_id: id.into(), exec_id: exec.into() };
        let answer = self.tasks.clone().delete_process(request(delete)).await;
        answer.map(drop).with_context(|| format!("deleting exec {exec} of {id}"))
    }

    /// Runs a command in a task to its end; its exit status.
    pub async fn exec(&self, id: &str, exec: &str, args: &[&str]) -> Result<u32> {
        self.exec_start(id, exec, args).await?;
        let status = self.wait(id, exec).await?;
        self.exec_delete(id, exec).await?;
        Ok(status)
    }

    /// The state of a task, as containerd's number for it.
    pub async fn state(&self, id: &str) -> Result<i32> {
        let get = GetRequest { container_id: id.into(), exec_id: String::new() };
        let answer = self.tasks.clone().get(request(get)).await.with_context(|| format!("state of {id}"))?;
        Ok(answer.into_inner().process.context("a task")?.status)
    }

    /// Dumps a task, which runs on. containerd keeps the images among its content.
    pub async fn checkpoint(&self, id: &str) -> Result<()> {
        let checkpoint = CheckpointTaskRequest { container_id: id.into(), ..Default::default() };
        let answer = self.tasks.clone().checkpoint(request(checkpoint)).await;
        answer.map(drop).with_context(|| format!("checkpoint of {id}"))
    }

    /// Sends SIGKILL to the first process, waits for the end, deletes the task, the container and its snapshot.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let kill =
            KillRequest { container_id: id.into(), signal: libc::SIGKILL as u32, ..Default::default() };
        self.tasks.clone().kill(request(kill)).await.with_context(|| format!("killing {id}"))?;
        match self.wait(id, "").await? {
            137 => {}
            other => bail!("{id} ended with {other}"),
        }
        self.forget(id).await
    }

    /// Deletes what has ended: the task, the container and its snapshot.
    pub async fn forget(&self, id: &str) -> Result<()> {
        self.ns.task_delete(id).await?;
        self.ns.container_delete(id).await?;
        self.ns.snapshot_remove(SNAPSHOTTER, id).await
    }

    /// Deletes all of a container, whatever state it is in.
    pub async fn wipe(&self, id: &str) -> Result<()> {
        self.ns.task_remove(id, std::time::Duration::from_secs(20)).await?;
        self.ns.container_delete(id).await?;
        self.ns.snapshot_remove(SNAPSHOTTER, id).await
    }
}
