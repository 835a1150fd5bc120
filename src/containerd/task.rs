//! Tasks: containers that run.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use containerd_client::{
    services::v1::{
        CreateTaskRequest, DeleteTaskRequest, GetRequest, KillRequest, ListPidsRequest, ListTasksRequest,
        StartRequest, WaitRequest, tasks_client::TasksClient,
    },
    tonic::transport::Channel,
    types::{Mount, v1::Process},
};

use super::client::{Asked, MAX_MESSAGE, Namespace, found, gone};

/// A task's status as containerd counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// containerd does not know.
    Unknown,
    /// Created, not started.
    Created,
    /// Running.
    Running,
    /// Exited, not deleted.
    Stopped,
    /// Frozen on request.
    Paused,
}

impl Status {
    /// As `ctr task ls` writes it, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Status::Unknown => "unknown",
            Status::Created => "created",
            Status::Running => "running",
            Status::Stopped => "stopped",
            Status::Paused => "paused",
        }
    }

    fn of(number: i32) -> Self {
        match number {
            1 => Status::Created,
            2 => Status::Running,
            3 => Status::Stopped,
            4 | 5 => Status::Paused,
            _ => Status::Unknown,
        }
    }
}

/// A task.
#[derive(Clone, Debug)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// The init's pid on this node.
    pub pid: u32,
    /// Its status.
    pub status: Status,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Standard input, output and error, as given at its creation.
    pub stdio: [String; 3],
}

impl From<Process> for Task {
    fn from(process: Process) -> Self {
        Task {
            id: if process.container_id.is_empty() { process.id } else { process.container_id },
            pid: process.pid,
            status: Status::of(process.status),
            terminal: process.terminal,
            stdio: [process.stdin, process.stdout, process.stderr],
        }
    }
}

/// The standard streams of a task to be created.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// A FIFO's path, or empty.
    pub stdin: String,
    /// A FIFO's path, or a URI such as `file:///var/log/x`, or empty.
    pub stdout: String,
    /// As `stdout`.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

impl Namespace {
    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The task of a container; `None` if it has none.
    pub async fn task(&self, id: &str) -> Result<Option<Task>> {
        let request = self.request(GetRequest { container_id: id.into(), exec_id: String::new() });
        let answer = self.tasks().get(request).await.asked(|| format!("reading the task of {id}"));
        Ok(found(answer)?.and_then(|a| a.process).map(Task::from))
    }

    /// All tasks.
    pub async fn task_list(&self) -> Result<Vec<Task>> {
        let request = self.request(ListTasksRequest::default());
        let answer = self.tasks().list(request).await.asked(|| "listing tasks".into())?;
        Ok(answer.tasks.into_iter().map(Task::from).collect())
    }

    /// Creates a container's task on these mounts.
    pub async fn task_create(&self, id: &str, rootfs: Vec<Mount>, stdio: Stdio) -> Result<u32> {
        let request = self.request(CreateTaskRequest {
            container_id: id.into(),
            rootfs,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..Default::default()
        });
        Ok(self.tasks().create(request).await.asked(|| format!("creating the task of {id}"))?.pid)
    }

    /// Starts a container's task; returns its pid.
    pub async fn task_start(&self, id: &str) -> Result<u32> {
        let request = self.request(StartRequest { container_id: id.into(), exec_id: String::new() });
        Ok(self.tasks().start(request).await.asked(|| format!("starting the task of {id}"))?.pid)
    }

    /// Kills all processes of a container's task; fine if there are none.
    pub async fn task_kill(&self, id: &str) -> Result<()> {
        let signal = libc::SIGKILL as u32;
        let request = KillRequest { container_id: id.into(), exec_id: String::new(), signal, all: true };
        let answer = self.tasks().kill(self.request(request)).await;
        gone(answer.asked(|| format!("killing the task of {id}")))
    }

    /// Waits for a task's end; fine if there is none.
    pub async fn task_wait(&self, id: &str) -> Result<()> {
        let request = self.request(WaitRequest { container_id: id.into(), exec_id: String::new() });
        gone(self.tasks().wait(request).await.asked(|| format!("waiting for the task of {id}")).map(drop))
    }

    /// Deletes a container's task, which must have ended; fine if there is none.
    pub async fn task_delete(&self, id: &str) -> Result<()> {
        let request = self.request(DeleteTaskRequest { container_id: id.into() });
        let answer = self.tasks().delete(request).await;
        gone(answer.asked(|| format!("deleting the task of {id}")).map(drop))
    }

    /// Kills what is left of a task, waits for its end, and deletes it; fine if there is none.
    ///
    /// # Errors
    /// It did not end within `limit`, or containerd failed.
    pub async fn task_remove(&self, id: &str, limit: Duration) -> Result<()> {
        let Some(task) = self.task(id).await? else { return Ok(()) };
        // one that never ran may have no process to kill, and then deleting it is all
        if task.status == Status::Created && self.task_delete(id).await.is_ok() {
            return Ok(());
        }
        if task.status != Status::Stopped {
            let ended = async {
                self.task_kill(id).await?;
                self.task_wait(id).await
            };
            match tokio::time::timeout(limit, ended).await {
                Ok(result) => result?,
                Err(_) => anyhow::bail!("the task of {id} did not end within {} s", limit.as_secs()),
            }
        }
        self.task_delete(id).await
    }

    /// The pids of a container's processes.
    pub async fn task_pids(&self, id: &str) -> Result<Vec<u32>> {
        let request = self.request(ListPidsRequest { container_id: id.into() });
        let answer = self.tasks().list_pids(request).await.asked(|| format!("the processes of {id}"))?;
        Ok(answer.processes.into_iter().map(|p| p.pid).collect())
    }
}

/// Where containerd keeps the bundle of a task, if it uses its default state directory.
pub fn bundle(namespace: &str, id: &str) -> PathBuf {
    PathBuf::from("/run/containerd/io.containerd.runtime.v2.task").join(namespace).join(id)
}
