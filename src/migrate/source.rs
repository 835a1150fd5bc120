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

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::abort::Abort;
use super::backlog;
use super::capture::{self, Context};
use super::codec::Kind;
use super::copier::Copier;
use super::destination::failure_of;
use super::fault;
use super::layers::Layers;
use super::link::Link;
use super::live::{self, Moving};
use super::loss::Loss;
use super::postcopy;
use super::precopy;
use super::prepared::Prepared;
use super::protocol::{
    BITS, Commit, Failure, Filled, Hello, LIVE, Manifest, OLDEST, Restored, Running, TMPFS, VERSION, Welcome,
};
use super::remains::Remains;
use super::report::{Clock, PostCopy, Report, Side, millis};
pub use super::still::Still;
use super::tmpfs::Tmpfs;
use super::tuning::{OnPostCopyFailure, Tuning};
use super::turn::Turns;
use super::wire::Wire;
use crate::control::{Event, Limits};
use crate::memory::Space;
use crate::rootfs::WritableLayer;

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

/// How a migration ended on the source, when the container does not run here any more.
pub enum Outcome {
    /// The container runs on the destination, nothing of it is left here but its records.
    Moved(Box<Report>),
    /// The commit was sent and its answer lost, or pages were lost in the post-copy and the operator chose to thaw: the
    /// tasks are frozen until [`Still::resolve`].
    Undecided(Still, String),
    /// Pages were lost in the post-copy: the container is gone here and cannot live on the destination.
    Lost(Loss),
}

/// What [`send`] and [`checkpoint`] are told.
pub struct Options {
    /// The migration; names the images directory.
    pub migration_id: String,
    /// This node, for errors.
    pub node: String,
    /// The destination's name.
    pub peer: String,
    /// Limits.
    pub limits: Limits,
    /// What the operator chose.
    pub tuning: Tuning,
}

/// Moves the container to the peer at the other end of `wire`.
///
/// # Errors
/// With the container running here as before; the error is a [`Failure`] if the destination gave the reason.
pub fn send(
    wire: Wire,
    ticket: &str,
    task: Box<dyn SourceTask>,
    options: &Options,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<Outcome> {
    let mut clock = Clock::start();
    let link = Link::new(wire);
    let cx = Context { link: &link, options, abort, events };
    let sent = try_send(&cx, ticket, task, &mut clock);
    sent.map_err(|e| {
        let failure = failure_of(&e, clock.current(), &options.node);
        // it runs on here already; the other side's log shall say why
        if !failure.lost && failure.node == options.node {
            link.wire().fail(&failure);
        }
        failure.into()
    })
}

fn try_send(cx: &Context<'_>, ticket: &str, task: Box<dyn SourceTask>, clock: &mut Clock) -> Result<Outcome> {
    cx.begin(clock, "prepare");
    let prepared = Prepared::new(&*task, cx.options)?;
    let hello = Hello {
        oldest: OLDEST,
        newest: VERSION,
        migration_id: cx.options.migration_id.clone(),
        ticket: ticket.to_owned(),
    };
    cx.link.json(Kind::Hello, &hello)?;
    let greeted_ms = clock.now_ms();
    let welcome =
        cx.link.wire().expect::<Welcome>(Kind::Welcome).context("greeting the destination's shim")?;
    let live = welcome.version >= LIVE && prepared.criu.dumps_without_memory();
    let manifest =
        Manifest { live, in_netns: live, version: welcome.version, ..prepared.manifest(&*task, Value::Null) };
    cx.link.json(Kind::Manifest, &manifest)?;
    cx.link.flush()?;
    let mut outcome = match live {
        true => send_live(cx, task, prepared, welcome.version, clock)?,
        false => send_whole(cx, task, prepared, clock)?,
    };
    if let Outcome::Moved(report) = &mut outcome {
        // its clock starts with the connection
        report.destination_offset_ms = greeted_ms;
    }
    Ok(outcome)
}

/// One copy of everything while the tasks are frozen.
fn send_whole(
    cx: &Context<'_>,
    task: Box<dyn SourceTask>,
    prepared: Prepared,
    clock: &mut Clock,
) -> Result<Outcome> {
    let turns = Turns::of_node(cx.options.limits.max_frozen);
    let _turn = turns.take(cx, Duration::MAX)?;
    let (still, report) = capture::full(cx, task, prepared, clock)?;
    match commit(cx, still, report, clock, &mut |_, _| Ok(()))? {
        Committed::Undecided(still, lost) => Ok(Outcome::Undecided(still, lost)),
        Committed::Runs(mut still, report) => {
            let mut report = *report;
            clean_up(cx, &mut still, &mut report, clock);
            cx.link.wire().close().ok();
            Ok(Outcome::Moved(Box::new(done(cx, report, clock))))
        }
    }
}

/// Memory and layer in rounds while the tasks run, what is missing in the freeze, the rest afterwards.
fn send_live(
    cx: &Context<'_>,
    task: Box<dyn SourceTask>,
    prepared: Prepared,
    version: u32,
    clock: &mut Clock,
) -> Result<Outcome> {
    let mut copier = Copier::new(&cx.options.tuning)?;
    let mut layers = Layers::new(&prepared.layer)?;
    // tar runs in the container's user namespace, if it has one, and cannot read what is ours
    let mut tmpfs = match version >= TMPFS && !prepared.userns {
        true => Some(Tmpfs::new(prepared.init, prepared.external_mounts())?),
        false => None,
    };
    let ahead = precopy::run(cx, &prepared, &mut copier, &mut layers, tmpfs.as_mut(), clock)?;
    let (layers, tmpfs, bits) = (&mut layers, tmpfs.as_mut(), version >= BITS);
    let mut moving = Moving { copier: &mut copier, layers, tmpfs, bits };
    let stopped = live::freeze(cx, task, prepared, ahead, &mut moving, clock)?;
    let live::Stopped { still, turn, tasks, report, left } = stopped;
    let mut left = Remains::new(&left);
    copier.past_the_freeze();
    let report = Report {
        mode: Some(if left.is_empty() { "pre-copy".into() } else { "post-copy".into() }),
        tracker: Some(copier.tracker().to_string()),
        compression: Some(cx.options.tuning.compress.to_string()),
        ..report
    };
    let mut want = |space, range| postcopy::answer(cx, &mut copier, &tasks, &mut left, space, range);
    let (mut still, mut report) = match commit(cx, still, report, clock, &mut want)? {
        Committed::Undecided(still, lost) => return Ok(Outcome::Undecided(still, lost)),
        Committed::Runs(still, report) => (still, *report),
    };
    drop(turn);
    if !left.is_empty() {
        cx.begin(clock, "post-copy");
        fault::point("post-copy", Some(cx.link));
        let served = postcopy::serve(cx, &mut copier, &tasks, &mut left);
        match served {
            Ok((served, filled)) => {
                report.post_copy = Some(PostCopy {
                    bytes: served.bytes,
                    pages: served.bytes / crate::criu::page_server::page_size() as u64,
                    ms: served.ms,
                    ..served.course
                });
                note_fill(&mut report, &filled);
            }
            Err(e) => return Ok(lost(cx, still, &left, &e)),
        }
        clean_up(cx, &mut still, &mut report, clock);
    } else {
        clean_up(cx, &mut still, &mut report, clock);
        // the container is whole there; that the page daemon has finished is for the report only
        cx.begin(clock, "fill");
        match postcopy::filled(cx) {
            Ok(filled) => note_fill(&mut report, &filled),
            Err(e) => report
                .warnings
                .push(format!("the destination did not say that its memory is in place: {e:#}")),
        }
    }
    copier.stop();
    cx.link.wire().close().ok();
    Ok(Outcome::Moved(Box::new(done(cx, report, clock))))
}

/// The container runs on the destination: what stands still here goes.
fn clean_up(cx: &Context<'_>, still: &mut Still, report: &mut Report, clock: &mut Clock) {
    cx.begin(clock, "clean up");
    fault::point("done", Some(cx.link));
    if let Err(e) = still.gone() {
        report.warnings.push(format!("{e:#}"));
    }
}

fn note_fill(report: &mut Report, filled: &Filled) {
    report.faults = filled.faults.clone();
    report.store_peak_bytes = filled.store_peak_bytes;
    report.fill_ms = filled.fill_ms;
    report.fill_bytes = filled.fill_bytes;
}

fn done(cx: &Context<'_>, mut report: Report, clock: &mut Clock) -> Report {
    report.bytes_sent = cx.link.wire().bytes().0;
    (report.phases, report.total_ms) = clock.done();
    report
}

/// The connection broke, or the destination gave up, while pages were still here.
fn lost(cx: &Context<'_>, mut still: Still, left: &Remains, e: &anyhow::Error) -> Outcome {
    let choice = cx.options.tuning.on_post_copy_failure;
    let loss = Loss {
        node: cx.options.node.clone(),
        peer: cx.options.peer.clone(),
        bytes: left.bytes(),
        choice,
        cause: format!("{e:#}"),
    };
    match choice {
        // what is here is the only whole copy: it must not run before the other one is dead for certain
        OnPostCopyFailure::Thaw => Outcome::Undecided(still, loss.sentence("the container")),
        OnPostCopyFailure::Kill => {
            if let Err(e) = still.gone() {
                log::error!("after a loss in the post-copy: {e:#}");
            }
            Outcome::Lost(loss)
        }
    }
}

/// How the commit went.
enum Committed {
    Runs(Still, Box<Report>),
    Undecided(Still, String),
}

fn commit(
    cx: &Context<'_>,
    mut still: Still,
    mut report: Report,
    clock: &mut Clock,
    want: &mut dyn FnMut(Space, Range<u64>) -> Result<()>,
) -> Result<Committed> {
    cx.begin(clock, "restore");
    let restored: Restored =
        postcopy::expect(cx, Kind::Restored, want).context("waiting for the destination's restore")?;
    fault::point("commit", Some(cx.link));
    if !cx.abort.commit() {
        bail!("the migration was given up by request");
    }
    // what came to the frozen tasks until now; the few packets between here and the announcement there are lost
    if let Some(tap) = still.backlog() {
        report.packets = backlog::send(tap, cx.link)?;
    }
    cx.begin(clock, "commit");
    // from here on nothing that goes wrong on this side, not even a panic, may let the tasks run
    still.disarm();
    let committed = cx.link.json(Kind::Commit, &Commit {}).and_then(|()| cx.link.flush());
    fault::point("sent", Some(cx.link));
    let answer = committed.and_then(|()| postcopy::expect::<Running>(cx, Kind::Running, want));
    let running = match answer {
        Ok(running) => running,
        // the destination itself says that it gave up: only then may the tasks run here again
        Err(e) if e.is::<Failure>() => {
            still.roll_back()?;
            return Err(e.context("the destination gave up after the commit"));
        }
        Err(e) => {
            let lost = format!("the commit was sent and its answer lost: {e:#}");
            return Ok(Committed::Undecided(still, lost));
        }
    };
    let frozen_ms = millis(still.since().elapsed());
    report.freeze_start_ms = Some(clock.now_ms() - frozen_ms);
    report.freeze_ms = frozen_ms - running.since_ms;
    report.destination_phases = if running.phases.is_empty() { restored.phases } else { running.phases };
    // the destination counts from the moment at which it had everything
    let there = report.freeze_ms - running.took_ms;
    report.freeze.extend(running.items.into_iter().map(|mut item| {
        item.start_ms += there;
        item.side = Side::Destination;
        item
    }));
    Ok(Committed::Runs(still, Box::new(report)))
}

/// Writes the container's state into `wire` (see [`super::archive`]); with `stop` it is killed afterwards.
///
/// # Errors
/// With the container running as before.
pub fn checkpoint(
    wire: Wire,
    task: Box<dyn SourceTask>,
    options: &Options,
    container: Value,
    stop: bool,
    abort: &Abort,
    events: &dyn Fn(Event),
) -> Result<Report> {
    let mut clock = Clock::start();
    let link = Link::new(wire);
    let cx = Context { link: &link, options, abort, events };
    clock.phase("prepare");
    let prepared = Prepared::new(&*task, options)?;
    link.json(Kind::Manifest, &prepared.manifest(&*task, container))?;
    let step = capture::full(&cx, task, prepared, &mut clock);
    let (mut still, mut report) = step.map_err(|e| failure_of(&e, clock.current(), &options.node))?;
    report.freeze_ms = millis(still.since().elapsed());
    let sync = |clock: &mut Clock| {
        clock.phase("sync");
        link.wire().close().context("writing the checkpoint to disk")
    };
    if stop {
        // durable before the only running copy is killed
        sync(&mut clock)?;
        still.gone()?;
        // nobody else has these addresses: the netns is its owner's again
        still.lift_fence()?;
    } else {
        still.roll_back()?;
        sync(&mut clock)?;
    }
    Ok(done(&cx, report, &mut clock))
}
