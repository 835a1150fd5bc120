//! Opening a process' stdio on the container's behalf, with or without a terminal: the glue between `io` and the runc runs.

use std::sync::Arc;

use anyhow::{Context as _, Result};

use crate::{
    console::ConsoleSocket,
    container::Container,
    io::{ChildStdio, Context, ProcessIo, Spawned, StdioKinds},
    process::Process,
};

/// Stdio that has been opened for a runc run.
pub struct Opened {
    /// What runc gets as its own stdio: the process' pipes, nothing with a terminal.
    pub child: ChildStdio,
    /// With a terminal: the socket that runc sends the pty to.
    pub console: Option<ConsoleSocket>,
}

impl Container {
    /// Who owns the pipes of its processes' stdio.
    pub fn io_owner(&self) -> Option<(u32, u32)> {
        let owner = (self.options.io_uid, self.options.io_gid);
        (owner != (0, 0)).then_some(owner)
    }

    /// Opens the stdio of `process` and keeps it there.
    pub(crate) async fn open_stdio(&self, process: &Process) -> Result<Opened> {
        let (io, opened) = self.open(process, None).await?;
        process.set_io(io);
        Ok(opened)
    }

    /// Opens stdio of these kinds for the container's first process, which arrives from another node: nothing is copied
    /// before [`ProcessIo::resume`].
    pub(crate) async fn open_stdio_like(&self, kinds: &StdioKinds) -> Result<(Arc<ProcessIo>, Opened)> {
        self.open(&self.init, Some(kinds)).await
    }

    async fn open(&self, process: &Process, like: Option<&StdioKinds>) -> Result<(Arc<ProcessIo>, Opened)> {
        let reaper = self.shared.reaper.clone();
        let spawn = move |mut command: std::process::Command| {
            let (pid, watch) = reaper.spawn(&mut command)?;
            let exited = Box::pin(async move { drop(watch.exit().await) });
            Ok(Spawned { pid: pid as u32, exited })
        };
        let context = Context {
            namespace: &self.shared.namespace,
            id: &process.id,
            owner: self.io_owner(),
            spawn: &spawn,
            // Nothing is copied before runc has succeeded: what a failing runc says on the process' stderr stands in the error and is
            // not the container's. A logging program reads its pipes by itself, and runc's words with them, as under the Go shim.
            held: like.is_some() || !process.stdio.stdout.starts_with("binary"),
        };
        if like.map_or(process.stdio.terminal, StdioKinds::terminal) {
            let (io, console) = ProcessIo::open_console(&process.stdio, &self.bundle, &context).await?;
            return Ok((io, Opened { child: ChildStdio::default(), console: Some(console) }));
        }
        let (io, child) = match like {
            Some(kinds) => ProcessIo::open_like(kinds, &process.stdio, &context).await?,
            None => ProcessIo::open(&process.stdio, &context).await?,
        };
        Ok((io, Opened { child, console: None }))
    }

    /// After runc has succeeded: takes the pty that it has sent, and starts copying.
    pub(crate) async fn begin_stdio(&self, process: &Process, console: Option<ConsoleSocket>) -> Result<()> {
        let Some(io) = process.io() else { return Ok(()) };
        if let Some(console) = console {
            io.attach_console(console).await.context("failed to retrieve console master")?;
        }
        io.resume();
        Ok(())
    }
}
