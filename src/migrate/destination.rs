//! The destination of a migration (and of a restore from a file): receive, restore behind the gates, run, or undo.
//!
//! ```text
//! Receiving --Final--> Restoring --gate 2 reached--> Held --Commit--> Running
//!     '---------------------'-------- any error ------'--> Undone
//! ```
//!
//! The guarantee: until the commit came the tasks have not run a single instruction, and every error ends with nothing
//! left (the caller's [`DestinationTask::undo`] is called here, in one place). After it the container is ours.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::abort::Abort;
use super::admission::Admitted;
use super::arrival::Arrival;
use super::backlog::Arrived;
use super::codec::Kind;
use super::fault;
use super::filling::Filling;
use super::link::Link;
use super::prepared::ImagesDir;
use super::protocol::{
    Commit, Failure, Final, Hello, Manifest, OLDEST, Restored, Running, VERSION, Welcome, select,
};
use super::report::{Clock, Report, millis};
use super::stream::Receiver;
use super::wire::{FrameSink, Lost, Wire};
use crate::control::{Event, Limits, ReceiveRequest};
use crate::criu::gate::At;
use crate::criu::{self, Criu, GateServer};
use crate::program::Programs;
use crate::rootfs::{KeptTimes, WritableLayer};
use crate::{journal, net, procstat};

/// What the destination needs of the shim's container, which was created as an incoming one.
pub trait DestinationTask: Send {
    /// Where the writable layer goes; the rootfs is not mounted yet.
    fn layer(&self) -> Result<WritableLayer>;
    /// The bundle; the gates are put into it.
    fn bundle(&self) -> PathBuf;
    /// Mounts the rootfs.
    fn mount(&mut self) -> Result<()>;
    /// Makes stdio of these kinds; nothing is copied yet.
    fn stdio(&mut self, kinds: &Value) -> Result<()>;
    /// CRIU's work directory, where its log and the page daemon's socket are; it exists.
    fn work_dir(&self) -> Result<PathBuf>;
    /// Starts `runc restore` on these images, with this directory first in PATH, and returns at once.
    fn restore(&mut self, images: &Path, path_first: &Path) -> Result<()>;
    /// `runc restore` has ended: `Ok` with the init's pid, or what it (and CRIU) said.
    fn restored(&mut self) -> Option<Result<u32>>;
    /// The tasks exist and stand at the gate: a terminal is attached, stdio gets what was queued on the source.
    fn held(&mut self, carry: &Value) -> Result<()>;
    /// The tasks run: from here on this is an ordinary running container with this init.
    fn adopt(&mut self, pid: u32) -> Result<()>;
    /// Nothing of it may be left: tasks, runc's state, mounts.
    fn undo(&mut self);
    /// Ends the running container, for when its memory cannot be completed any more. Called from another thread.
    fn killer(&self) -> Killer;
}

/// What comes with an error after the gate was opened.
#[derive(Debug)]
pub(super) struct MayHaveRun;

impl std::fmt::Display for MayHaveRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the container may have run here for a moment")
    }
}

/// Ends a container at once.
pub type Killer = Box<dyn FnOnce() -> Result<()> + Send>;

/// Takes the container from the source, which was let in.
///
/// With a [`Filling`] beside the report the container runs, and its memory is completed in the background.
///
/// # Errors
/// With nothing left here but the container's records, which the agent removes.
pub fn receive(
    source: Admitted,
    task: &mut dyn DestinationTask,
    request: &ReceiveRequest,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<(Report, Option<Filling>)> {
    let Admitted { wire, hello, mut clock } = source;
    let link = Arc::new(Link::new(wire));
    let result = greet(&link, &hello).and_then(|manifest| {
        if manifest.live {
            return Arrival { link: &link, task, request, abort, events }.take(&manifest, &mut clock);
        }
        let report = take(&link, task, request, abort, &mut clock, events, &manifest, true)?;
        Ok((report, None))
    });
    result.map_err(|e| {
        // undone first: once the source has our word, it runs again
        task.undo();
        let failure = failure_of(&e, clock.current(), &request.node);
        // it would take our word for that nothing has run
        if !failure.ran {
            link.wire().fail(&failure);
        }
        failure.into()
    })
}

/// Takes the container from a checkpoint file, read up to and including its manifest.
///
/// # Errors
/// As [`receive`].
pub fn restore(
    wire: Wire,
    manifest: Manifest,
    task: &mut dyn DestinationTask,
    request: &ReceiveRequest,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<Report> {
    let mut clock = Clock::start();
    let link = Link::new(wire);
    let result = take(&link, task, request, abort, &mut clock, events, &manifest, false);
    result.inspect_err(|_| task.undo())
}

/// What the operator and the peer are told about an error.
pub fn failure_of(e: &anyhow::Error, phase: &str, node: &str) -> Failure {
    match e.downcast_ref::<Failure>() {
        Some(f) => f.clone(),
        None => Failure {
            phase: phase.to_owned(),
            node: node.to_owned(),
            message: format!("{e:#}"),
            lost: e.is::<Lost>(),
            ran: e.is::<MayHaveRun>(),
            ..Failure::default()
        },
    }
}

fn greet(link: &Link, hello: &Hello) -> Result<Manifest> {
    let mut wire = link.wire();
    let version = select((OLDEST, VERSION), (hello.oldest, hello.newest)).map_err(|e| anyhow!(e))?;
    wire.json(Kind::Welcome, &Welcome { version })?;
    wire.expect(Kind::Manifest)
}

/// Everything in one copy, made while the source stands still; `waits`: there is a source that waits for our word.
#[expect(clippy::too_many_arguments, reason = "the two callers differ in all of them")]
fn take(
    link: &Link,
    task: &mut dyn DestinationTask,
    request: &ReceiveRequest,
    abort: &Abort,
    clock: &mut Clock,
    events: &dyn Fn(Event),
    manifest: &Manifest,
    waits: bool,
) -> Result<Report> {
    let phase = |clock: &mut Clock, name: &str| {
        clock.phase(name);
        events(Event::Phase { phase: name.to_owned() });
    };
    phase(clock, "receive");
    let images = ImagesDir::create(&request.limits.images_dir, &request.migration_id)?;
    let netns = request.netns.as_deref().map(net::open).transpose().context("opening the prepared netns")?;
    fault::point("receive", Some(link).filter(|_| waits));
    let (carry, totals) = receive_state(link, &images.0, task, &request.limits, abort, events)?;

    phase(clock, "prepare");
    task.mount().context("mounting the container's rootfs")?;
    task.stdio(&manifest.stdio).context("making the container's stdio")?;
    let criu = Criu::find(request.limits.criu.as_deref()).context("looking for CRIU on the destination")?;
    let mut gate = GateServer::prepare(&task.bundle(), &Programs::find()?, &criu.path, "")?;
    phase(clock, "runc restore");
    task.work_dir()?;
    task.restore(&images.0, gate.dir()).context("starting runc restore")?;
    wait_for(At::Restore, &mut gate, link, task, abort, waits)?;
    fault::point("restoring", Some(link).filter(|_| waits));
    phase(clock, "criu restore");
    vet(&images.0, &task.bundle(), request, manifest)?;
    let times = KeptTimes::of(&task.bundle().join("rootfs"));
    gate.open_restore()?;
    fault::point("restore", Some(link).filter(|_| waits));
    wait_for(At::PostRestore, &mut gate, link, task, abort, waits)?;
    drop(times);

    // the tasks are complete and stand at the gate: from here the source decides
    task.held(&carry).context("connecting the container's stdio")?;
    let kick = connections(netns.as_ref(), &gate);
    let holder = holder(&gate);
    let (mut backlog, mut noted) = (Vec::new(), None);
    if waits {
        fault::point("held", Some(link));
        phase(clock, "commit");
        backlog =
            wait_for_commit(link, &mut |kind, _| bail!("the source sent {kind:?} where Commit was due"))?;
        noted = Some(committed(&request.migration_id));
        fault::point("committed", Some(link));
        // asked to give up in between: too late, the source will not run it again
        abort.commit();
    } else {
        ensure!(abort.commit(), "the migration was given up by request");
    }
    still_held(&gate, holder, task)?;
    phase(clock, "resume");
    // sockets leave repair mode after the gate and send a probe at once: the way must be free by then
    if let Some(ns) = &netns {
        net::unfence(ns.as_fd()).context("lifting the fence of the container's network")?;
    }
    let let_go = Instant::now();
    gate.open_run().context(MayHaveRun)?;
    fault::point("running", Some(link).filter(|_| waits));
    announce(netns.as_ref(), request, &backlog, kick, events);
    let pid = wait_for_runc(link, task, waits).context(MayHaveRun)?;
    task.adopt(pid).context("taking over the restored container").context(MayHaveRun)?;
    let (phases, total_ms) = clock.done();
    if let Some(noted) = noted {
        join(noted, events);
    }
    if waits {
        let running =
            Running { since_ms: millis(let_go.elapsed()), phases: phases.clone(), ..Running::default() };
        // the tasks run: a lost message changes nothing any more
        if let Err(e) = link.json(Kind::Running, &running).and_then(|()| link.flush()) {
            events(Event::Warning { message: format!("telling the source: {e:#}") });
        }
    }
    Ok(Report {
        migration_id: request.migration_id.clone(),
        total_ms,
        phases,
        sent: totals,
        ..Report::default()
    })
}

/// What the images say is no more than the spec does: looked at when all of them are here, before CRIU does.
pub(super) fn vet(images: &Path, bundle: &Path, request: &ReceiveRequest, manifest: &Manifest) -> Result<()> {
    let in_netns = manifest.in_netns && request.netns.is_some();
    let measure = criu::vet::Measure::Policy { policy: &request.limits.policy, in_netns };
    let subject = criu::vet::Subject { images, bundle, measure };
    criu::vet::check(&subject).context("the checkpoint is refused")
}

/// The connections of the restored tasks, which stand at the gate.
pub(super) fn connections(netns: Option<&OwnedFd>, gate: &GateServer) -> net::Kick {
    match (netns, gate.held_by()) {
        (Some(ns), Some(script)) => net::Kick::collect(ns.as_fd(), &restored_tasks(script))
            .inspect_err(|e| log::warn!("looking for the container's TCP connections: {e:#}"))
            .unwrap_or_default(),
        _ => net::Kick::default(),
    }
}

/// CRIU, which holds the restored tasks at the second gate: the parent of the script that waits there.
pub(super) fn holder(gate: &GateServer) -> Option<i32> {
    // a script whose parent has ended becomes a child of the shim, or of init
    let orphan = |pid: &i32| *pid == 1 || *pid == std::process::id() as i32;
    gate.held_by().and_then(parent).filter(|pid| !orphan(pid))
}

/// Without CRIU, or runc, nothing comes of opening the gate. Said before it is tried: the tasks, which wait for CRIU's word, have not run.
pub(super) fn still_held(gate: &GateServer, by: Option<i32>, task: &mut dyn DestinationTask) -> Result<()> {
    let lives = by.is_some() && holder(gate) == by;
    ensure!(lives || gate.held_by().is_none(), "CRIU ended while it held the restored tasks");
    match task.restored() {
        None => Ok(()),
        Some(Err(e)) => Err(e),
        Some(Ok(_)) => bail!("runc restore ended while the restored tasks were held"),
    }
}

/// Says that the tasks are restored, and waits for the source's word. Returns the packets that came to them meanwhile. What
/// else may come before it goes to `other`.
pub(super) fn wait_for_commit(
    link: &Link,
    other: &mut dyn FnMut(Kind, &[u8]) -> Result<()>,
) -> Result<Vec<net::Packet>> {
    link.json(Kind::Restored, &Restored::default())?;
    let mut backlog = Arrived::default();
    let mut wire = link.wire();
    let mut next = || match wire.recv()? {
        Kind::Commit => wire.message::<Commit>().map(|_| true),
        Kind::Backlog => backlog.add(wire.payload()).map(|()| false),
        Kind::Failed => Err(wire.message::<Failure>()?.into()),
        kind => other(kind, wire.payload()).map(|()| false),
    };
    while !next().context("waiting for the source's commit")? {}
    Ok(backlog.packets)
}

/// Has the commit written down, while the gate opens.
pub(super) fn committed(migration: &str) -> JoinHandle<Result<()>> {
    let migration = migration.to_owned();
    std::thread::spawn(move || journal::commit(&migration))
}

/// It is written down: the source may be told to delete its copy.
pub(super) fn join(noted: JoinHandle<Result<()>>, events: &dyn Fn(Event)) {
    let noted = noted.join().unwrap_or_else(|_| Err(anyhow!("the thread panicked")));
    if let Err(e) = noted {
        events(Event::Warning { message: format!("noting the commit: {e:#}") });
    }
}

/// The tasks run: whoever talked to them hears of it, and `backlog` comes to them.
pub(super) fn announce(
    netns: Option<&OwnedFd>,
    request: &ReceiveRequest,
    backlog: &[net::Packet],
    kick: net::Kick,
    events: &dyn Fn(Event),
) {
    let Some(ns) = netns else { return };
    if let Some(cfg) = &request.net
        && let Err(e) = net::announce(ns.as_fd(), cfg)
    {
        events(Event::Warning { message: format!("announcing the container's addresses: {e:#}") });
    }
    match net::deliver(ns.as_fd(), backlog) {
        Ok(delivered) if delivered < backlog.len() => {
            log::info!("{delivered} of {} packets from the freeze could be delivered", backlog.len());
        }
        Ok(_) => {}
        Err(e) => events(Event::Warning { message: format!("delivering packets from the freeze: {e:#}") }),
    }
    // peers that retransmitted into the fence wait longer and longer: have them send now
    if let Err(e) = kick.send(ns.as_fd()) {
        events(Event::Warning { message: format!("waking the container's TCP peers: {e:#}") });
    }
}

fn receive_state(
    link: &Link,
    images: &Path,
    task: &dyn DestinationTask,
    limits: &Limits,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<(Value, Final)> {
    let mut receiver = Receiver::new(images, &task.layer()?, limits, &criu::vet::spec(&task.bundle())?)?;
    let mut shown = 0;
    let mut wire = link.wire();
    loop {
        match wire.recv()? {
            Kind::Final => {
                let totals = wire.message::<Final>()?;
                return Ok((receiver.finish(&totals)?, totals));
            }
            Kind::Failed => return Err(wire.message::<Failure>()?.into()),
            kind => receiver.take(kind, wire.payload())?,
        }
        if wire.bytes().1 - shown > 8 << 20 {
            shown = wire.bytes().1;
            events(Event::Progress { bytes: shown, total: None });
            ensure!(!abort.asked(), "the migration was given up by request");
        }
    }
}

/// Waits until runc's CRIU stands at this gate; notices when runc has ended instead, and shows the peer signs of life.
pub(super) fn wait_for(
    point: At,
    gate: &mut GateServer,
    link: &Link,
    task: &mut dyn DestinationTask,
    abort: &Abort,
    waits: bool,
) -> Result<()> {
    loop {
        if gate.reached(point, Duration::from_millis(100))? {
            return Ok(());
        }
        match task.restored() {
            Some(Err(e)) => return Err(e),
            Some(Ok(_)) => bail!("runc restore ended without waiting at its gate ({point:?})"),
            None => {}
        }
        ensure!(!abort.asked(), "the migration was given up by request");
        if waits {
            link.wire().alive()?;
        }
    }
}

/// After the gate is open: runc ends by itself, within milliseconds.
pub(super) fn wait_for_runc(link: &Link, task: &mut dyn DestinationTask, waits: bool) -> Result<u32> {
    loop {
        if let Some(ended) = task.restored() {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(1));
        if waits {
            // the tasks run: a connection that is lost now undoes nothing any more
            link.wire().alive().ok();
        }
    }
}

/// The tasks that CRIU has restored, from the pid of the script that it runs: CRIU is the script's parent, and restores the
/// tasks as its own siblings, below runc (`rst_sibling`).
fn restored_tasks(script: i32) -> Vec<i32> {
    let Some(criu) = parent(script) else { return Vec::new() };
    let Some(runc) = parent(criu) else { return Vec::new() };
    let (mut found, mut next) = (Vec::new(), children(runc));
    next.retain(|pid| *pid != criu);
    while let Some(pid) = next.pop() {
        next.extend(children(pid));
        found.push(pid);
    }
    found
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    procstat::field(&stat, 4)
}

fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let of_thread =
        |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("children")).unwrap_or_default();
    threads
        .flatten()
        .flat_map(|t| of_thread(t).split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_the_peer_is_passed_on_unchanged() {
        let f = Failure { phase: "dump".into(), node: "a".into(), message: "m".into(), ..Failure::default() };
        let e = anyhow::Error::from(f.clone()).context("receiving");
        assert_eq!(failure_of(&e, "receive", "b"), f);
        let own = failure_of(&anyhow!("no room").context("writing"), "receive", "b");
        assert_eq!(
            (own.message.as_str(), own.phase.as_str(), own.node.as_str()),
            ("writing: no room", "receive", "b")
        );
    }
}
