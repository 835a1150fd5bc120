//! Processes added to a running container: described by Exec, run by Start, ended, deleted.

use std::{path::PathBuf, sync::Arc, sync::atomic::Ordering};

use anyhow::Context;
use containerd_shim_protos::{
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit},
    shim::shim::ExecProcessRequest,
    topics,
};
use nix::errno::Errno;
use serde_json::Value;

use crate::{
    container::Container,
    errors::{TaskError, TaskResult, system_words},
    io::StdioConfig,
    lifecycle::explain,
    process::{Ended, Process, timestamp},
    reaper::Exit,
    runc,
    state::{Op, State},
};

/// A process added by exec.
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    /// The OCI process, as JSON.
    spec: Vec<u8>,
}

impl Container {
    /// Takes note of a process that Start will run.
    pub fn add_exec(&self, request: &ExecProcessRequest) -> TaskResult<()> {
        let id = &request.exec_id;
        // It becomes part of file names in the bundle.
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(TaskError::invalid_argument(format!("exec id {id:?}")));
        }
        self.reserve_exec(id)?;
        let exec = self.described(request);
        let result = exec.as_ref().map(|_| ()).map_err(Clone::clone);
        self.settle_exec(id, exec.ok());
        result?;
        let event =
            TaskExecAdded { container_id: self.id.clone(), exec_id: id.clone(), ..Default::default() };
        self.shared.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, event);
        Ok(())
    }

    fn described(&self, request: &ExecProcessRequest) -> TaskResult<Arc<Exec>> {
        self.refuse_while_moving()?;
        self.init.check(Op::Exec)?;
        let json = request.spec.as_ref().map(|a| a.value.as_slice()).unwrap_or_default();
        let mut spec: Value = serde_json::from_slice(json).context("read the exec's process")?;
        let fields = spec.as_object_mut().context("the exec's process is not an object")?;
        fields.insert("terminal".into(), request.terminal.into());
        let stdio = StdioConfig {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = Process::new(&request.exec_id, true, stdio, State::Created);
        let spec = serde_json::to_vec(&spec).context("encode the exec's process")?;
        Ok(Arc::new(Exec { process, spec }))
    }

    /// Runs an added process. Its exit is announced after its start.
    pub async fn start_exec(self: &Arc<Self>, exec_id: &str) -> TaskResult<u32> {
        let exec = self.exec(exec_id)?;
        if self.init_gone.load(Ordering::Acquire) {
            let text = format!("container {} init process is not running", self.id);
            return Err(TaskError::failed_precondition(text));
        }
        self.refuse_while_moving()?;
        self.running_execs.send_modify(|n| *n += 1);
        let result = self.run_exec(&exec).await;
        if result.is_err() {
            self.running_execs.send_modify(|n| *n -= 1);
        }
        result
    }

    async fn run_exec(self: &Arc<Self>, exec: &Arc<Exec>) -> TaskResult<u32> {
        let process = &exec.process;
        let op = process.op.lock().await;
        process.check(Op::Start)?;
        let mark = self.shared.reaper.mark();
        let pid_file = self.exec_pid_file(&process.id);
        let pid = match self.runc_exec(exec, &pid_file).await {
            Ok(pid) => pid,
            Err(e) => {
                if let Some(io) = process.io() {
                    io.close().await;
                }
                process.release_waiters();
                return Err(e);
            }
        };
        process.set_pid(pid);
        process.set_state(State::Running);
        let watch = self.shared.reaper.watch(pid as i32, mark);
        let event = TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: process.id.clone(),
            pid,
            ..Default::default()
        };
        self.shared.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, event);
        drop(op);
        let (container, process) = (self.clone(), process.clone());
        self.shared.runtime.spawn(async move {
            if let Ok(exit) = watch.exit().await {
                container.exec_exited(&process, exit).await;
            }
        });
        Ok(pid)
    }

    async fn runc_exec(&self, exec: &Exec, pid_file: &std::path::Path) -> TaskResult<u32> {
        let process = &exec.process;
        let mut spec = tempfile::Builder::new()
            .prefix(".exec-")
            .suffix(".json")
            .tempfile_in(&self.bundle)
            .context("make a file for the exec's process")?;
        std::io::Write::write_all(&mut spec, &exec.spec).context("write the exec's process")?;
        let stdio = self.open_stdio(process).await.context("failed to create exec process I/O")?;
        let socket = stdio.console.as_ref().map(|c| c.path());
        let run = self.runc.exec(&self.id, spec.path(), pid_file, socket, stdio.child).await;
        run.map_err(|e| explain(e, "OCI runtime exec failed"))?;
        self.begin_stdio(process, stdio.console).await?;
        Ok(runc::read_pid(pid_file).context("failed to retrieve OCI runtime exec pid")?)
    }

    async fn exec_exited(&self, process: &Process, exit: Exit) {
        let op = process.op.lock().await;
        process.set_exited(&exit);
        let event = TaskExit {
            container_id: self.id.clone(),
            id: process.id.clone(),
            pid: exit.pid as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(Some(exit.at))).into(),
            ..Default::default()
        };
        self.shared.publish(topics::TASK_EXIT_EVENT_TOPIC, event);
        drop(op);
        self.running_execs.send_modify(|n| *n -= 1);
    }

    /// Sends a signal to an added process.
    pub(crate) async fn kill_exec(&self, process: &Process, signal: u32) -> TaskResult<()> {
        let _op = process.op.lock().await;
        process.check(Op::Kill)?;
        match process.pid() {
            0 => Err(TaskError::failed_precondition("process not created")),
            _ if process.exited().is_some() => Err(TaskError::not_found("process already finished")),
            pid => {
                // SAFETY: plain call. The pid is ours until its exit is recorded above, up to the moment between its
                // collection and the handling of its exit, in which the number cannot be reused yet (pids wrap).
                if unsafe { libc::kill(pid as i32, signal as i32) } == 0 {
                    return Ok(());
                }
                match Errno::last() {
                    Errno::ESRCH => Err(TaskError::not_found("exec kill error: process already finished")),
                    e => {
                        let e = system_words(e);
                        Err(TaskError::unknown(format!("exec kill error: unknown error after kill: {e}")))
                    }
                }
            }
        }
    }

    /// Forgets an added process that has ended or never ran.
    pub async fn delete_exec(&self, exec_id: &str) -> TaskResult<Ended> {
        let process = self.process(exec_id)?;
        let op = process.op.lock().await;
        process.check(Op::Delete)?;
        process.finish_io().await;
        let _ = std::fs::remove_file(self.exec_pid_file(exec_id));
        process.set_state(State::Deleted);
        self.forget_exec(exec_id);
        drop(op);
        Ok(process.ended())
    }

    fn exec_pid_file(&self, exec_id: &str) -> PathBuf {
        self.bundle.join(format!("{exec_id}.pid"))
    }
}
