//! The shim's container as the library's `SourceTask`: what leaves this node, or is written into a checkpoint file.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;
use transship::{
    cgroup::Freezer,
    migrate::source::SourceTask,
    rootfs::{MountSpec, WritableLayer},
};

use crate::{
    container::{Container, MoveGuard},
    state::State,
};

/// How long a reader of the container's output may take to accept what was written before the freeze; what it does not
/// take by then travels along.
const DRAIN: Duration = Duration::from_millis(20);
/// How long killed tasks may take to be gone.
const KILL: Duration = Duration::from_secs(10);

/// A running container that is about to leave; while it lives the Task API refuses what would disturb it.
pub struct Leaving {
    container: Arc<Container>,
    _guard: MoveGuard,
}

impl Leaving {
    /// # Errors
    /// The container does not run, is paused, has live exec sessions or is being moved already.
    pub fn begin(container: &Arc<Container>) -> Result<Leaving> {
        let guard = container.shared.runtime.block_on(container.begin_move()).map_err(|e| anyhow!("{e}"))?;
        if container.init.state() == State::Paused {
            bail!("the container is paused: resume it first");
        }
        let execs: Vec<_> = container.live_execs().iter().map(|e| e.process.id.clone()).collect();
        if !execs.is_empty() {
            // CRIU dumps a tree; what exec added hangs outside of it
            bail!("exec sessions run in the container ({}): end them first", execs.join(", "));
        }
        Ok(Leaving { container: container.clone(), _guard: guard })
    }
}

impl SourceTask for Leaving {
    fn pid(&self) -> u32 {
        self.container.init.pid()
    }

    fn bundle(&self) -> PathBuf {
        self.container.bundle.clone()
    }

    fn runc_state(&self) -> PathBuf {
        self.container.runc.root().join(&self.container.id).join("state.json")
    }

    fn rootfs(&self) -> PathBuf {
        self.container.rootfs()
    }

    fn layer(&self) -> Result<WritableLayer> {
        layer_of(&self.container, Some(self.container.rootfs()))
    }

    fn stdio_kinds(&self) -> Value {
        let kinds = self.container.init.io().map(|io| io.kinds()).unwrap_or_default();
        serde_json::to_value(kinds).unwrap_or_default()
    }

    fn quiesce(&mut self) -> Result<Value> {
        let Some(io) = self.container.init.io() else { return Ok(Value::Null) };
        let carry = self.container.shared.runtime.block_on(io.quiesce(DRAIN))?;
        Ok(serde_json::to_value(carry)?)
    }

    fn resume(&mut self) {
        if let Some(io) = self.container.init.io() {
            let _runtime = self.container.shared.runtime.enter();
            io.resume();
        }
    }

    fn kill(&mut self) -> Result<()> {
        let init = &self.container.init;
        if let Some(io) = init.io() {
            let _runtime = self.container.shared.runtime.enter();
            io.discard();
        }
        Freezer::of_pid(init.pid() as i32)?.kill_all(KILL).context("killing the tasks")?;
        let gone = async { tokio::time::timeout(KILL, init.wait()).await };
        self.container.shared.runtime.block_on(gone).context("the killed tasks do not go away")?;
        Ok(())
    }
}

/// Where a container's writable layer is.
pub fn layer_of(container: &Container, mounted: Option<PathBuf>) -> Result<WritableLayer> {
    let specs: Vec<_> = container
        .mounts
        .iter()
        .map(|m| MountSpec { kind: &m.type_, source: &m.source, options: &m.options })
        .collect();
    WritableLayer::from_mounts(&specs, mounted.as_deref())
}
