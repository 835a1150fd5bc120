//! Tasks that stand still: frozen, fenced off, their stdio held. Dropping it puts everything back.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::report::millis;
use super::source::SourceTask;
use crate::cgroup::Freezer;
use crate::net::{self, Backlog};

/// The tasks stand still, fenced off. Dropping it rolls back: fence lifted, thawed, stdio going on.
pub struct Still {
    task: Box<dyn SourceTask>,
    freezer: Freezer,
    netns: OwnedFd,
    /// Packets for the container that came meanwhile; None where they cannot be had.
    backlog: Option<Backlog>,
    since: Instant,
    armed: bool,
}

/// What standing still took, item by item, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entering {
    /// The cgroup's freeze.
    pub freeze_ms: f64,
    /// The fence around the network.
    pub fence_ms: f64,
    /// Draining the output.
    pub quiesce_ms: f64,
}

/// How long the tasks may take to stand still before their sockets are looked at.
const REFREEZE: Duration = Duration::from_secs(2);

impl Still {
    /// Freezes, fences, drains. Returns what was queued in the stdio beside it.
    ///
    /// # Errors
    /// With everything as it was before.
    pub(super) fn enter(
        mut task: Box<dyn SourceTask>,
        freezer: Freezer,
        netns: OwnedFd,
    ) -> Result<(Still, Value, Entering)> {
        // without it clients wait longer, no more
        let backlog = Backlog::prepare(netns.as_fd());
        let mut backlog =
            backlog.inspect_err(|e| log::warn!("packets that come in the freeze will be lost: {e:#}")).ok();
        let since = Instant::now();
        let mut took = Entering::default();
        if let Err(e) = freezer.freeze(Duration::from_secs(10)) {
            freezer.thaw().ok();
            return Err(e.context("freezing the container's cgroup"));
        }
        took.freeze_ms = millis(since.elapsed());
        // the fence comes after the freeze: until here every packet was answered, after it none is
        let at = Instant::now();
        let fence = || net::fence(netns.as_fd());
        let fenced = backlog.as_mut().map_or_else(fence, |backlog| backlog.behind(fence));
        if let Err(e) = fenced {
            net::unfence(netns.as_fd()).ok();
            freezer.thaw().ok();
            return Err(e.context("fencing the container's network"));
        }
        took.fence_ms = millis(at.elapsed());
        let at = Instant::now();
        let carry = task.quiesce();
        took.quiesce_ms = millis(at.elapsed());
        let still = Still { task, freezer, netns, backlog, since, armed: true };
        Ok((still, carry.context("draining the container's output")?, took))
    }

    /// Since when.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// The frozen cgroup.
    pub(super) fn freezer(&self) -> &Freezer {
        &self.freezer
    }

    /// Packets for the container that came since it stands still.
    pub(super) fn backlog(&mut self) -> Option<&mut Backlog> {
        self.backlog.as_mut()
    }

    /// The source's network is its owner's again (the container lives nowhere else).
    pub(super) fn lift_fence(&self) -> Result<()> {
        net::unfence(self.netns.as_fd()).context("lifting the fence")
    }

    /// The tasks run on as before.
    pub(super) fn roll_back(&mut self) -> Result<()> {
        self.armed = false;
        // A CRIU that was killed in its dump had thawed them, and they run on as it dies. Until their sockets are out of repair mode, in
        // which the kernel refuses to read and to write, they had better not.
        if self.freezer.path().exists()
            && let Err(e) = self.freezer.freeze(REFREEZE)
        {
            log::warn!("freezing the container once more: {e:#}");
        }
        let unfenced = net::unfence(self.netns.as_fd());
        match net::unsilence(self.freezer.pids().unwrap_or_default()) {
            0 => {}
            n => log::warn!("CRIU ended in its dump and left {n} connections in repair mode: mended"),
        }
        self.task.resume();
        self.freezer.thaw().context("thawing the container (its cgroup is still frozen)")?;
        if let Some(mut backlog) = self.backlog.take().filter(|_| unfenced.is_ok())
            && let Err(e) = net::deliver(self.netns.as_fd(), &backlog.take())
        {
            log::warn!("delivering the packets that came in the freeze: {e:#}");
        }
        unfenced.context("lifting the fence (the container runs, its network is still fenced)")
    }

    /// From here on the tasks never run again, whatever happens to this object; [`Still::gone`] ends them.
    pub(super) fn disarm(&mut self) {
        self.armed = false;
    }

    /// Kills the frozen tasks; not a packet of theirs gets out. The fence stays: where the container lives on under the same
    /// addresses, nothing here may answer for them until the agent removes the netns.
    pub(super) fn gone(&mut self) -> Result<()> {
        self.armed = false;
        net::silence(self.freezer.pids().unwrap_or_default());
        self.task.kill().context("killing the frozen copy")
    }

    /// Ends an undecided migration: `moved` kills the frozen copy, otherwise it runs on as before.
    pub fn resolve(mut self, moved: bool) -> Result<()> {
        if moved {
            return self.gone();
        }
        self.roll_back()?;
        // it may have run on the other node for a while: its addresses are here again
        let announced =
            net::capture(self.netns.as_fd()).and_then(|config| net::announce(self.netns.as_fd(), &config));
        if let Err(e) = announced {
            log::warn!("announcing the container's addresses again: {e:#}");
        }
        Ok(())
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if self.armed
            && let Err(e) = self.roll_back()
        {
            log::error!("rolling back: {e:#}");
        }
    }
}
