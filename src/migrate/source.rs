//! The source of a migration (and of a checkpoint file): freeze, dump, stream, commit, or roll back.
//!
//! ```text
//! Running --freeze--> Still --commit sent--> Committed --Running received--> Gone
//!    ^                  |                       |
//!    '---- any error ---'                       '--answer lost--> Undecided --resolve--> Gone | Running
//! ```
//!
//! The guarantee: [`send`] returns `Moved` only when the destination said that the tasks run there, `Undecided` with
//! the tasks still frozen when the commit's answer was lost, and an error only with the tasks running as before.
//! A CRIU run is never interrupted: an error while it dumps is remembered, CRIU ends, then the tasks are thawed.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::abort::Abort;
use super::codec::Kind;
use super::destination::failure_of;
use super::fault;
use super::protocol::{
    Commit, Failure, Frozen, Hello, Manifest, OLDEST, Restored, Running, VERSION, Welcome,
};
use super::report::{Clock, Report, millis};
use super::stream::Sender;
use super::wire::{FrameSink, Wire};
use crate::cgroup::Freezer;
use crate::control::{Event, Limits, RUN_DIR};
use crate::criu::options::{Facts, dump_options};
use crate::criu::{self, Criu, DumpRequest};
use crate::net;
use crate::rootfs::{KeptTimes, WritableLayer};

/// What the source needs of the shim's container.
pub trait SourceTask: Send {
    /// The init's pid on this node.
    fn pid(&self) -> u32;
    /// The bundle; `config.json` is in it.
    fn bundle(&self) -> PathBuf;
    /// runc's `state.json` of the container.
    fn runc_state(&self) -> PathBuf;
    /// The mounted rootfs.
    fn rootfs(&self) -> PathBuf;
    /// Where the writable layer is.
    fn layer(&self) -> Result<WritableLayer>;
    /// Which kinds the stdio streams are, for the manifest.
    fn stdio_kinds(&self) -> Value;
    /// The tasks are frozen: drain their output, stop copying, return what is left.
    fn quiesce(&mut self) -> Result<Value>;
    /// Rollback: copying goes on where it stopped.
    fn resume(&mut self);
    /// The container is the destination's: kill the frozen tasks (they must not run again) and wait for their end.
    fn kill(&mut self) -> Result<()>;
}

/// How a migration ended on the source, when it was no failure.
pub enum Outcome {
    /// The container runs on the destination, nothing of it is left here but its records.
    Moved(Report),
    /// The commit was sent and its answer lost: the tasks are frozen until [`Still::resolve`].
    Undecided(Still, String),
}

/// What [`send`] and [`checkpoint`] are told.
pub struct Options {
    /// The migration; names the images directory.
    pub migration_id: String,
    /// This node, for errors.
    pub node: String,
    /// Limits.
    pub limits: Limits,
}

/// The tasks stand still, fenced off. Dropping it rolls back: fence lifted, thawed, stdio going on.
pub struct Still {
    task: Box<dyn SourceTask>,
    freezer: Freezer,
    netns: OwnedFd,
    since: Instant,
    armed: bool,
}

impl Still {
    fn enter(mut task: Box<dyn SourceTask>, freezer: Freezer, netns: OwnedFd) -> Result<(Still, Value)> {
        let since = Instant::now();
        if let Err(e) = freezer.freeze(Duration::from_secs(10)) {
            freezer.thaw().ok();
            return Err(e.context("freezing the container's cgroup"));
        }
        // the fence comes after the freeze: until here every packet was answered, after it none is
        if let Err(e) = net::fence(netns.as_fd()) {
            net::unfence(netns.as_fd()).ok();
            freezer.thaw().ok();
            return Err(e.context("fencing the container's network"));
        }
        let carry = task.quiesce();
        let still = Still { task, freezer, netns, since, armed: true };
        Ok((still, carry.context("draining the container's output")?))
    }

    fn roll_back(&mut self) -> Result<()> {
        self.armed = false;
        let unfenced = net::unfence(self.netns.as_fd());
        self.task.resume();
        self.freezer.thaw().context("thawing the container (its cgroup is still frozen)")?;
        unfenced.context("lifting the fence (the container runs, its network is still fenced)")
    }

    /// Kills the frozen tasks; not a packet of theirs gets out. The fence stays: where the container lives on under the same
    /// addresses, nothing here may answer for them until the agent removes the netns.
    fn gone(&mut self) -> Result<()> {
        self.armed = false;
        net::silence(self.freezer.pids().unwrap_or_default());
        self.task.kill().context("killing the frozen copy")
    }

    /// Ends an undecided migration: `moved` kills the frozen copy, otherwise it runs on as before.
    pub fn resolve(mut self, moved: bool) -> Result<()> {
        if moved { self.gone() } else { self.roll_back() }
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

/// Moves the container to the peer at the other end of `wire`.
///
/// # Errors
/// With the container running here as before; the error is a [`Failure`] if the destination gave the reason.
pub fn send(
    wire: &mut Wire,
    ticket: &str,
    task: Box<dyn SourceTask>,
    options: &Options,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<Outcome> {
    let mut clock = Clock::start();
    let sent = try_send(wire, ticket, task, options, abort, &mut clock, events);
    sent.map_err(|e| {
        let failure = failure_of(&e, clock.current(), &options.node);
        // it runs on here already; the other side's log shall say why
        if !failure.lost && failure.node == options.node {
            wire.fail(&failure);
        }
        failure.into()
    })
}

fn try_send(
    wire: &mut Wire,
    ticket: &str,
    task: Box<dyn SourceTask>,
    options: &Options,
    abort: &Abort,
    clock: &mut Clock,
    events: &dyn Fn(Event),
) -> Result<Outcome> {
    let phase = |clock: &mut Clock, name: &str| {
        clock.phase(name);
        events(Event::Phase { phase: name.to_owned() });
    };
    phase(clock, "prepare");
    let prepared = Prepared::new(&*task, options)?;
    let hello = Hello {
        oldest: OLDEST,
        newest: VERSION,
        migration_id: options.migration_id.clone(),
        ticket: ticket.to_owned(),
    };
    wire.json(Kind::Hello, &hello)?;
    wire.expect::<Welcome>(Kind::Welcome).context("greeting the destination's shim")?;
    wire.json(Kind::Manifest, &prepared.manifest(&*task, Value::Null))?;
    wire.flush()?;
    let (mut still, mut report) = freeze_and_stream(wire, task, prepared, options, abort, clock, events)?;
    phase(clock, "restore");
    let restored =
        wire.expect::<Restored>(Kind::Restored).context("waiting for the destination's restore")?;
    fault::point("commit");
    if !abort.commit() {
        bail!("the migration was given up by request");
    }
    phase(clock, "commit");
    let answer = wire.json(Kind::Commit, &Commit {}).and_then(|()| wire.expect::<Running>(Kind::Running));
    let running = match answer {
        Ok(running) => running,
        // the destination itself says that it gave up: only then may the tasks run here again
        Err(e) if e.is::<Failure>() => return Err(e.context("the destination gave up after the commit")),
        Err(e) => {
            let lost = format!("the commit was sent and its answer lost: {e:#}");
            return Ok(Outcome::Undecided(still, lost));
        }
    };
    report.freeze_ms = millis(still.since.elapsed()) - running.since_ms;
    phase(clock, "clean up");
    if let Err(e) = still.gone() {
        report.warnings.push(format!("{e:#}"));
    }
    wire.close().ok();
    report.bytes_sent = wire.bytes().0;
    report.destination_phases = if running.phases.is_empty() { restored.phases } else { running.phases };
    (report.phases, report.total_ms) = clock.done();
    Ok(Outcome::Moved(report))
}

/// Writes the container's state into `wire` (see [`super::archive`]); with `stop` it is killed afterwards.
///
/// # Errors
/// With the container running as before.
pub fn checkpoint(
    wire: &mut Wire,
    task: Box<dyn SourceTask>,
    options: &Options,
    container: Value,
    stop: bool,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<Report> {
    let mut clock = Clock::start();
    clock.phase("prepare");
    let prepared = Prepared::new(&*task, options)?;
    wire.json(Kind::Manifest, &prepared.manifest(&*task, container))?;
    let step = freeze_and_stream(wire, task, prepared, options, abort, &mut clock, events);
    let (mut still, mut report) = step.map_err(|e| failure_of(&e, clock.current(), &options.node))?;
    report.freeze_ms = millis(still.since.elapsed());
    if stop {
        // durable before the only running copy is killed
        clock.phase("sync");
        wire.close().context("writing the checkpoint to disk")?;
        still.gone()?;
        // nobody else has these addresses: the netns is its owner's again
        net::unfence(still.netns.as_fd()).context("lifting the fence")?;
    } else {
        still.roll_back()?;
        clock.phase("sync");
        wire.close().context("writing the checkpoint to disk")?;
    }
    report.bytes_sent = wire.bytes().0;
    (report.phases, report.total_ms) = clock.done();
    Ok(report)
}

/// What can be found out before the freeze.
struct Prepared {
    criu: Criu,
    freezer: Freezer,
    netns: OwnedFd,
    dir: ImagesDir,
    layer: WritableLayer,
    rootfs: PathBuf,
    opts: criu::rpc::CriuOpts,
    descriptors: [String; 3],
}

impl Prepared {
    fn new(task: &dyn SourceTask, options: &Options) -> Result<Prepared> {
        let pid = i32::try_from(task.pid()).context("the container's pid")?;
        let criu = Criu::find(options.limits.criu.as_deref()).context("looking for CRIU on the source")?;
        let freezer = Freezer::of_pid(pid).context("looking for the container's cgroup")?;
        let netns = net::netns_of_pid(pid).context("opening the container's network namespace")?;
        let dir = ImagesDir::create(&options.limits.images_dir, &format!("{}-source", options.migration_id))?;
        for sub in [IMAGES, WORK] {
            std::fs::create_dir(dir.0.join(sub)).context("creating the images directory")?;
        }
        let config = task.bundle().join("config.json");
        let spec = oci_spec::runtime::Spec::load(&config)
            .with_context(|| format!("reading {}", config.display()))?;
        let facts = Facts::gather(&spec, pid, &task.rootfs(), freezer.path())?;
        let limits = criu::options::Limits {
            ghost_limit: options.limits.ghost_limit,
            ..criu::options::Limits::default()
        };
        let opts = dump_options(&spec, &facts, &limits).context("preparing CRIU's dump")?;
        let descriptors = criu::stdio::descriptors(Some(&task.runc_state()), pid)?;
        Ok(Prepared {
            criu,
            freezer,
            netns,
            dir,
            layer: task.layer()?,
            rootfs: task.rootfs(),
            opts,
            descriptors,
        })
    }

    fn manifest(&self, task: &dyn SourceTask, container: Value) -> Manifest {
        Manifest {
            version: VERSION,
            criu: self.criu.version.to_string(),
            stdio: task.stdio_kinds(),
            container,
        }
    }
}

/// Below a migration's directory: CRIU's images.
const IMAGES: &str = "images";
/// Below a migration's directory: CRIU's log and statistics.
const WORK: &str = "work";

fn freeze_and_stream(
    wire: &mut Wire,
    task: Box<dyn SourceTask>,
    prepared: Prepared,
    options: &Options,
    abort: &Abort,
    clock: &mut Clock,
    events: &dyn Fn(Event),
) -> Result<(Still, Report)> {
    let Prepared { criu, freezer, netns, dir, layer, rootfs, opts, descriptors } = prepared;
    let clock = RefCell::new(clock);
    let phase = |name: &str| {
        clock.borrow_mut().phase(name);
        events(Event::Phase { phase: name.to_owned() });
    };
    let go_on = || if abort.asked() { bail!("the migration was given up by request") } else { Ok(()) };
    go_on()?;
    phase("freeze");
    let (still, carry) = Still::enter(task, freezer, netns)?;
    fault::point("frozen");
    let processes = still.freezer.pids().map(|p| p.len()).unwrap_or(0);
    wire.json(Kind::Frozen, &Frozen { processes })?;
    wire.flush()?;

    phase("dump");
    let (images, work) = (dir.0.join(IMAGES), dir.0.join(WORK));
    let times = KeptTimes::of(&rootfs);
    let shown = Cell::new(0);
    let sender = RefCell::new(Sender::new(wire));
    let mut on_post_dump = || {
        // while CRIU's extra links to unlinked files exist
        phase("layer");
        times.put_back();
        sender.borrow_mut().layer(&layer)?;
        phase("dump end");
        Ok(())
    };
    let mut request = DumpRequest {
        opts,
        images_dir: &images,
        work_dir: &work,
        descriptors: &descriptors,
        on_post_dump: Some(&mut on_post_dump),
    };
    let dumped = criu.dump(&mut request, &mut |event| {
        let mut sender = sender.borrow_mut();
        sender.pages(event)?;
        if sender.sent() - shown.get() > 8 << 20 {
            shown.set(sender.sent());
            events(Event::Progress { bytes: shown.get() });
        }
        go_on()
    });
    drop(times);
    let mut sender = sender.into_inner();
    let streamed = dumped.and_then(|_| {
        phase("files");
        sender.files(&images)?;
        sender.stdio(&carry)
    });
    if let Err(e) = streamed {
        // the destination's own reason, if it was the destination that hung up
        let why = if e.is::<criu::dump::DumpFailed>() { None } else { sender.reason() };
        return Err(why.map_or_else(|| keep_log(e, &work, options), Into::into));
    }
    let sent = sender.finish()?;
    events(Event::Progress { bytes: wire.bytes().0 });
    let report = Report { migration_id: options.migration_id.clone(), sent, processes, ..Report::default() };
    Ok((still, report))
}

/// Logs of failed dumps that are kept.
const LOGS: usize = 16;

/// CRIU's log outlives the images: whoever reads the error wants to see the rest of it. Returns the error with the place.
fn keep_log(error: anyhow::Error, work: &Path, options: &Options) -> anyhow::Error {
    if !error.is::<criu::dump::DumpFailed>() {
        return error;
    }
    let dir = Path::new(RUN_DIR).join("logs");
    let to = dir.join(format!("{}-dump.log", options.migration_id));
    let keep = || -> std::io::Result<()> {
        std::fs::create_dir_all(&dir)?;
        std::fs::copy(work.join(criu::dump::LOG_FILE), &to)?;
        let mut all: Vec<_> = std::fs::read_dir(&dir)?
            .flatten()
            .filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f.path())))
            .collect();
        all.sort();
        all.iter().rev().skip(LOGS).try_for_each(|(_, path)| std::fs::remove_file(path))
    };
    match keep() {
        Ok(()) => anyhow!("{error:#} (log: {})", to.display()),
        Err(e) => {
            log::warn!("keeping CRIU's log as {}: {e}", to.display());
            error
        }
    }
}

/// A directory for images that goes away with its owner.
pub(super) struct ImagesDir(pub PathBuf);

impl ImagesDir {
    /// Makes `parent/name`, for root only.
    pub fn create(parent: &Path, name: &str) -> Result<ImagesDir> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = parent.join(name);
        std::fs::create_dir_all(parent)
            .and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(&dir))
            .with_context(|| format!("creating the images directory {}", dir.display()))?;
        Ok(ImagesDir(dir))
    }
}

impl Drop for ImagesDir {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            log::warn!("removing {}: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_directory_goes_away_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let dir = ImagesDir::create(&parent.path().join("images"), "m-1").unwrap();
        let path = dir.0.clone();
        std::fs::write(path.join("core-1.img"), b"x").unwrap();
        assert!(ImagesDir::create(&parent.path().join("images"), "m-1").is_err(), "never shared");
        drop(dir);
        assert!(!path.exists());
    }
}
