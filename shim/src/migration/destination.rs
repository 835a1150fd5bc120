//! The shim's container as the library's `DestinationTask`: created as an incoming one, brought to life by `runc restore`
//! behind the gates.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;
use transship::{
    cgroup::Freezer,
    criu,
    migrate::destination::{DestinationTask, Killer},
    private,
    rootfs::WritableLayer,
};

use super::source::layer_of;
use crate::{
    console::ConsoleSocket,
    container::{Container, Origin},
    io::{Carry, ProcessIo, StdioKinds},
    reaper::Mark,
    runc::{RestoreArgs, read_pid},
    runc_error::RuncError,
    stdio::Opened,
};

/// CRIU's log, as runc names it.
const RESTORE_LOG: &str = "restore.log";

/// How long killed tasks may take to be gone.
const KILL: Duration = Duration::from_secs(10);

/// A container that arrives.
pub struct Arriving {
    container: Arc<Container>,
    io: Option<Arc<ProcessIo>>,
    opened: Option<Opened>,
    console: Option<ConsoleSocket>,
    ended: Option<Receiver<Result<()>>>,
    since: Mark,
    mounted: bool,
}

impl Arriving {
    /// # Errors
    /// The container was not created as an incoming one.
    pub fn new(container: &Arc<Container>) -> Result<Arriving> {
        if !matches!(container.origin, Origin::Incoming { .. }) {
            bail!("the container was not created to receive a migration");
        }
        let (container, since) = (container.clone(), container.shared.reaper.mark());
        Ok(Arriving { container, io: None, opened: None, console: None, ended: None, since, mounted: false })
    }

    fn work(&self) -> PathBuf {
        self.container.bundle.join("work")
    }
}

impl DestinationTask for Arriving {
    fn layer(&self) -> Result<WritableLayer> {
        layer_of(&self.container, None)
    }

    fn bundle(&self) -> PathBuf {
        self.container.bundle.clone()
    }

    fn mount(&mut self) -> Result<()> {
        self.mounted = true;
        self.container.shared.runtime.block_on(self.container.mount_rootfs())
    }

    fn stdio(&mut self, kinds: &Value) -> Result<()> {
        let kinds: StdioKinds = serde_json::from_value(kinds.clone()).context("the stdio's kinds")?;
        let c = &self.container;
        let (io, opened) = c.shared.runtime.block_on(c.open_stdio_like(&kinds))?;
        (self.io, self.opened) = (Some(io), Some(opened));
        Ok(())
    }

    fn work_dir(&self) -> Result<PathBuf> {
        let work = self.work();
        std::fs::create_dir_all(&work).context("creating CRIU's work directory")?;
        // CRIU would make it for everybody; it keeps the mode of what is there
        private::create(&work.join(RESTORE_LOG)).context("making CRIU's log")?;
        Ok(work)
    }

    fn restore(&mut self, images: &Path, path_first: &Path) -> Result<()> {
        let mut path = OsString::from(path_first);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let c = &self.container;
        if let Some(cgroup) = criu::options::cgroup_left_out(&c.bundle)?
            && c.shared.runtime.block_on(c.runc.is_crun())?
        {
            criu::gate_server::enter_cgroup(path_first, &cgroup)?;
        }
        let opened = self.opened.take().context("no stdio was made")?;
        let args = RestoreArgs {
            image_path: images.to_owned(),
            work_dir: self.work(),
            console_socket: opened.console.as_ref().map(|c| c.path().to_owned()),
            no_pivot: self.container.options.no_pivot_root,
            open_tcp: true,
            external_unix_sockets: true,
            file_locks: true,
            env: vec![("PATH".into(), path)],
            ..RestoreArgs::default()
        };
        self.console = opened.console;
        let (to, ended) = channel();
        let container = self.container.clone();
        self.since = container.shared.reaper.mark();
        self.container.shared.runtime.spawn(async move {
            to.send(container.runc.restore(&container.id, &args, opened.child).await).ok();
        });
        self.ended = Some(ended);
        Ok(())
    }

    fn restored(&mut self) -> Option<Result<u32>> {
        match self.ended.as_ref()?.try_recv() {
            Ok(Ok(())) => Some(read_pid(&self.container.runc.pid_file())),
            Ok(Err(e)) => {
                // runc's own words say little ("type NOTIFY errno 0"): CRIU's first error line says what it was
                let log = self.work().join(RESTORE_LOG);
                let said = e
                    .downcast_ref::<RuncError>()
                    .map_or_else(|| format!("{e:#}"), |e| e.explain("runc restore"));
                Some(Err(match criu::log::first_error_in(&log) {
                    Some(found) => anyhow!("{said}; CRIU: {found}"),
                    None => anyhow!("{said}"),
                }))
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(anyhow!("runc restore was lost sight of"))),
        }
    }

    fn held(&mut self, carry: &Value) -> Result<()> {
        let carry: Option<Carry> = serde_json::from_value(carry.clone()).context("the queued stdio")?;
        let io = self.io.as_ref().context("no stdio was made")?;
        let runtime = &self.container.shared.runtime;
        if let Some(console) = self.console.take() {
            runtime.block_on(io.attach_console(console)).context("taking the terminal")?;
        }
        runtime.block_on(io.preload(carry.unwrap_or_default()))
    }

    fn adopt(&mut self, pid: u32) -> Result<()> {
        let io = self.io.take().context("no stdio was made")?;
        {
            let _runtime = self.container.shared.runtime.enter();
            io.resume();
        }
        self.container.adopt_restored(pid, io, self.since).map_err(|e| anyhow!("{e}"))
    }

    fn killer(&self) -> Killer {
        let container = self.container.clone();
        Box::new(move || {
            let pid = i32::try_from(container.init.pid()).context("the init's pid")?;
            Freezer::of_pid(pid)?.kill_all(KILL).context("killing the tasks")
        })
    }

    fn undo(&mut self) {
        let c = self.container.clone();
        let runtime = &c.shared.runtime;
        if let Some(ended) = self.ended.take() {
            // the gates refuse, so that CRIU kills what it has restored and runc ends by itself
            if matches!(ended.recv_timeout(Duration::from_secs(30)), Err(RecvTimeoutError::Timeout)) {
                log::error!("{}: runc restore does not end", c.id);
            }
            runtime
                .block_on(c.runc.delete(&c.id, true))
                .unwrap_or_else(|e| log::debug!("runc delete: {e:#}"));
            crate::remains::clear_unborn(c.runc.root(), &c.id, &c.bundle);
        }
        if let Some(io) = self.io.take() {
            runtime.block_on(io.close());
        }
        (self.opened, self.console) = (None, None);
        if std::mem::take(&mut self.mounted)
            && let Err(e) = runtime.block_on(c.unmount_rootfs())
        {
            log::error!("unmounting {}: {e:#}", c.rootfs().display());
        }
    }
}
