//! What is done to a running container as a whole: signals, pause and resume, resource limits.

use containerd_shim_protos::{
    events::task::{TaskPaused, TaskResumed},
    topics,
};

use crate::{
    container::Container,
    errors::{TaskError, TaskResult},
    lifecycle::explain,
    runc_error::RuncError,
    state::{Op, State},
};

impl Container {
    /// Sends a signal: to an exec, or to init, with `all` to every process of the container.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> TaskResult<()> {
        self.refuse_while_moving()?;
        if !exec_id.is_empty() {
            let process = self.process(exec_id)?;
            return self.kill_exec(&process, signal).await;
        }
        let _op = self.init.op.lock().await;
        // A migration may have begun while this waited.
        self.refuse_while_moving()?;
        self.init.check(Op::Kill)?;
        self.announce_before_kill();
        self.runc.kill(&self.id, signal, all).await.map_err(|e| kill_error(&e))
    }

    /// Freezes the container.
    pub async fn pause(&self) -> TaskResult<()> {
        let _op = self.init.op.lock().await;
        self.refuse_while_moving()?;
        self.init.check(Op::Pause)?;
        self.runc.pause(&self.id).await.map_err(|e| explain(e, "OCI runtime pause failed"))?;
        self.init.set_state(State::Paused);
        let event = TaskPaused { container_id: self.id.clone(), ..Default::default() };
        self.shared.publish(topics::TASK_PAUSED_EVENT_TOPIC, event);
        Ok(())
    }

    /// Thaws the container.
    pub async fn resume(&self) -> TaskResult<()> {
        let _op = self.init.op.lock().await;
        self.refuse_while_moving()?;
        self.init.check(Op::Resume)?;
        self.runc.resume(&self.id).await.map_err(|e| explain(e, "OCI runtime resume failed"))?;
        self.init.set_state(State::Running);
        let event = TaskResumed { container_id: self.id.clone(), ..Default::default() };
        self.shared.publish(topics::TASK_RESUMED_EVENT_TOPIC, event);
        Ok(())
    }

    /// Changes resource limits; `resources` is OCI's LinuxResources as JSON.
    pub async fn update(&self, resources: &[u8]) -> TaskResult<()> {
        let _op = self.init.op.lock().await;
        self.refuse_while_moving()?;
        self.init.check(Op::Update)?;
        // Refused here with a position, rather than by runc without one.
        serde_json::from_slice::<serde::de::IgnoredAny>(resources)
            .map_err(|e| TaskError::unknown(format!("cannot read the resources: {e}")))?;
        Ok(self.runc.update(&self.id, resources).await?)
    }
}

/// What clients (and containerd itself) need to know of a failed kill is whether the process is gone already.
fn kill_error(e: &anyhow::Error) -> TaskError {
    let mentions = |text| e.downcast_ref::<RuncError>().is_some_and(|e| e.mentions(text));
    let gone = ["os: process already finished", "container not running", "no such process"];
    if gone.into_iter().any(mentions) {
        TaskError::not_found("process already finished")
    } else if mentions("does not exist") {
        TaskError::not_found("no such container")
    } else {
        TaskError::unknown(format!("unknown error after kill: {e:#}"))
    }
}
