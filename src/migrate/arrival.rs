//! A live migration on the destination: rounds into the page store while the container runs elsewhere, `runc restore` started
//! and held before CRIU's own work, then the last delta, the restore, the commit, and the fill in the background.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use super::abort::Abort;
use super::background::Background;
use super::codec::Kind;
use super::destination::{
    DestinationTask, MayHaveRun, announce, committed, connections, holder, join, still_held, vet, wait_for,
    wait_for_commit, wait_for_runc,
};
use super::fault;
use super::filling::{Filling, Started};
use super::link::Link;
use super::prepared::ImagesDir;
use super::protocol::{Failure, Filled, Final, Manifest, Ready, Round, Running};
use super::report::{Clock, Item, Report, Side, millis};
use super::stream::Receiver;
use super::tmpfs::Stage;
use crate::control::{Event, ReceiveRequest};
use crate::criu::gate::At;
use crate::criu::gate_server::Opening;
use crate::criu::{self, Criu, GateServer};
use crate::net;
use crate::program::{self, Programs};
use crate::rootfs::{KeptTimes, NeedsUnmount};

/// CRIU's log while it restores: errors and warnings. More costs a millisecond or two.
const LOG_LEVEL: u8 = 2;

/// The container on its way in.
pub(super) struct Arrival<'a> {
    pub link: &'a Arc<Link>,
    pub task: &'a mut dyn DestinationTask,
    pub request: &'a ReceiveRequest,
    pub abort: &'a Abort,
    pub events: &'a dyn Fn(Event),
}

/// `runc restore` runs and waits in front of CRIU's restore.
struct AtGate {
    gate: GateServer,
    daemon: Started,
    /// Where CRIU finds a faster tar.
    tools: PathBuf,
}

impl Arrival<'_> {
    fn phase(&self, clock: &mut Clock, name: &str) {
        clock.phase(name);
        (self.events)(Event::Phase { phase: name.to_owned() });
    }

    /// Takes everything and runs the container. What is returned beside the report goes on in the background.
    pub fn take(&mut self, manifest: &Manifest, clock: &mut Clock) -> Result<(Report, Option<Filling>)> {
        self.phase(clock, "receive");
        let images = ImagesDir::create(&self.request.limits.images_dir, &self.request.migration_id)?;
        let netns =
            self.request.netns.as_deref().map(net::open).transpose().context("opening the prepared netns")?;
        let spec = criu::vet::spec(&self.task.bundle())?;
        let receiver = Receiver::live(&images.0, &self.task.layer()?, &self.request.limits, &spec)?;
        ensure!(
            !manifest.in_netns || netns.is_some(),
            "the container comes from a network namespace of its own, and none was made for it here"
        );
        fault::point("receive", Some(self.link));
        let (receiver, totals, at) = self.receive(receiver, &images.0, manifest, clock)?;
        let since = Instant::now();
        let mut items = Vec::new();
        let mut item = |name: &str, from: f64| {
            let ms = millis(since.elapsed()) - from;
            items.push(Item { name: name.into(), start_ms: from, ms, side: Side::Destination });
            from + ms
        };
        self.phase(clock, "plan");
        let stored = receiver.stored();
        let whole = receiver.finish_live(&totals)?;
        let AtGate { mut gate, daemon, tools } = match at {
            Some(at) => at,
            None => self.prepare(&images.0, manifest, clock)?,
        };
        let now = item("plan", 0.0);
        vet(&images.0, &self.task.bundle(), self.request, manifest)?;
        let now = item("images", now);
        let serving = match whole.plan.is_eager() {
            true => None,
            false => Some(daemon.serve(whole.store, &whole.plan, self.link.clone())?),
        };
        fault::point("restoring", Some(self.link));
        self.phase(clock, "criu restore");
        let times = KeptTimes::of(&self.task.bundle().join("rootfs"));
        gate.open_restore_with(&Opening {
            lazy_pages: serving.is_some(),
            netns: self.request.netns.as_deref().filter(|_| manifest.in_netns),
            path_first: Some(&criu::tar::first(&tools)),
            log_level: Some(LOG_LEVEL),
        })?;
        fault::point("restore", Some(self.link));
        wait_for(At::PostRestore, &mut gate, self.link, self.task, self.abort, true)?;
        drop(times);
        let now = item("CRIU restore", now);

        // the tasks are complete and stand at the gate: from here the source decides
        self.task.held(&whole.carry).context("connecting the container's stdio")?;
        let kick = connections(netns.as_ref(), &gate);
        let holder = holder(&gate);
        let now = item("stdio and connections", now);
        fault::point("held", Some(self.link));
        self.phase(clock, "commit");
        let backlog = wait_for_commit(self.link, &mut |kind, payload| match (kind, &serving) {
            // a page that was asked for during the restore
            (Kind::Memory, Some(serving)) => {
                serving.deliver(payload);
                Ok(())
            }
            (Kind::Memory, None) => bail!("the source sends pages that nobody asked for"),
            _ => bail!("the source sent {kind:?} where Commit was due"),
        })?;
        let now = item("commit", now);
        let noted = committed(&self.request.migration_id);
        fault::point("committed", Some(self.link));
        // asked to give up in between: too late, the source will not run it again
        self.abort.commit();
        still_held(&gate, holder, self.task)?;
        self.phase(clock, "resume");
        // sockets leave repair mode after the gate and send a probe at once: the way must be free by then
        if let Some(ns) = &netns {
            net::unfence(ns.as_fd()).context("lifting the fence of the container's network")?;
        }
        let now = item("network", now);
        let let_go = Instant::now();
        let took_ms = millis(let_go - since);
        gate.open_run().context(MayHaveRun)?;
        if let Some(serving) = &serving {
            serving.running();
        }
        fault::point("running", Some(self.link));
        announce(netns.as_ref(), self.request, &backlog, kick, self.events);
        let pid = wait_for_runc(self.link, self.task, true).context(MayHaveRun)?;
        self.task.adopt(pid).context("taking over the restored container").context(MayHaveRun)?;
        item("resume", now);
        let (phases, total_ms) = clock.done();
        let running = Running { since_ms: millis(let_go.elapsed()), phases: phases.clone(), took_ms, items };
        join(noted, self.events);
        // the tasks run: a lost message changes nothing any more
        let told = self.link.json(Kind::Running, &running).and_then(|()| self.link.flush());
        if let Err(e) = told {
            (self.events)(Event::Warning { message: format!("telling the source: {e:#}") });
        }
        let filling = match serving {
            Some(serving) => Some(serving.fill(self.task.killer())),
            None => {
                let filled = Filled { store_peak_bytes: stored, ..Filled::default() };
                self.link.json(Kind::MemoryDone, &filled).and_then(|()| self.link.flush()).ok();
                None
            }
        };
        let report = Report {
            migration_id: self.request.migration_id.clone(),
            total_ms,
            phases,
            sent: totals,
            ..Report::default()
        };
        Ok((report, filling))
    }

    fn receive(
        &mut self,
        mut receiver: Receiver,
        images: &std::path::Path,
        manifest: &Manifest,
        clock: &mut Clock,
    ) -> Result<(Receiver, Final, Option<AtGate>)> {
        let mut at = None;
        let mut shown = 0;
        // the container runs on its source, and others run here
        let mut background = None;
        loop {
            // nobody else uses the connection yet: it may be kept locked while we wait
            let mut wire = self.link.wire();
            match wire.recv()? {
                Kind::Final => return Ok((receiver, wire.message()?, at)),
                Kind::Failed => return Err(wire.message::<Failure>()?.into()),
                Kind::Round => {
                    let round: Round = wire.message()?;
                    self.phase(clock, &format!("round {}", round.n));
                    if at.is_none() && background.is_none() {
                        background = Some(Background::enter());
                    }
                }
                Kind::Prepare => {
                    drop(wire);
                    // what is started now is for the freeze, and so is all that comes later
                    drop(background.take());
                    ensure!(at.is_none(), "the source prepares twice");
                    at = Some(self.prepare(images, manifest, clock)?);
                    match receiver.layer_mounted(&self.task.bundle().join("rootfs")) {
                        Err(e) if e.is::<NeedsUnmount>() => self.step_back(&mut at, &mut receiver, &e)?,
                        other => other?,
                    }
                    self.link.json(Kind::Ready, &Ready {})?;
                    self.link.flush()?;
                    self.phase(clock, "receive the rest");
                    continue;
                }
                kind => match receiver.take(kind, wire.payload()) {
                    Err(e) if e.is::<NeedsUnmount>() => {
                        self.step_back(&mut at, &mut receiver, &e)?;
                        receiver.take_again(kind, wire.payload())?;
                    }
                    other => other?,
                },
            }
            if wire.bytes().1 - shown > 8 << 20 {
                shown = wire.bytes().1;
                (self.events)(Event::Progress { bytes: shown, total: None });
                ensure!(!self.abort.asked(), "the migration was given up by request");
            }
        }
    }

    /// What changed last in the writable layer cannot be said through its mount: the restore that waits is ended, the mount goes,
    /// and both are made again when everything has come. That costs their time in the freeze.
    fn step_back(
        &mut self,
        at: &mut Option<AtGate>,
        receiver: &mut Receiver,
        why: &anyhow::Error,
    ) -> Result<()> {
        log::warn!("{why:#}; runc's restore starts anew in the freeze");
        drop(at.take());
        self.task.undo();
        receiver.layer_unmounted()
    }

    /// Everything that does not need the last delta.
    fn prepare(
        &mut self,
        images: &std::path::Path,
        manifest: &Manifest,
        clock: &mut Clock,
    ) -> Result<AtGate> {
        self.phase(clock, "prepare");
        self.task.mount().context("mounting the container's rootfs")?;
        self.task.stdio(&manifest.stdio).context("making the container's stdio")?;
        let criu =
            Criu::find(self.request.limits.criu.as_deref()).context("looking for CRIU on the destination")?;
        criu.warm().context("asking CRIU for the kernel's features")?;
        let programs = Programs::find()?;
        let mut gate = GateServer::prepare(&self.task.bundle(), &programs, &criu.path, "")?;
        let work = self.task.work_dir()?;
        let tools = criu::tar::tools(&work, &programs).context("CRIU's tools")?;
        criu::tar::staged::files_in(&tools, &Stage::dir_in(images)).context("CRIU's tools")?;
        let daemon = Started::new(&work, &program::own()?)?;
        self.phase(clock, "runc restore");
        self.task.restore(images, gate.dir()).context("starting runc restore")?;
        wait_for(At::Restore, &mut gate, self.link, self.task, self.abort, true)?;
        Ok(AtGate { gate, daemon, tools })
    }
}
