//! One request on a container's control socket: read, dispatched, answered by events.

use std::{
    fs::File,
    net::TcpStream,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow, bail};
use transship::{
    control::{
        CheckpointRequest, Decision, Event, Inspected, MigrationState, ReceiveRequest, Request, SendRequest,
        transport,
    },
    migrate::{
        abort::Abort,
        admission, archive,
        destination::{self, failure_of},
        fault,
        filling::Filling,
        protocol::ALPN_DATA,
        report::Report,
        source::{self, Options, Outcome},
        tuning::Tuning,
        wire::Wire,
    },
    tls,
};

use super::{Slot, destination::Arriving, source::Leaving};
use crate::{container::Container, state::State};

/// Serves one connection of the agent.
pub fn serve(stream: &UnixStream, container: &Arc<Container>, slot: &Arc<Slot>) -> Result<()> {
    let Some((request, fds)) = transport::recv::<Request>(stream)? else { return Ok(()) };
    let mut fds = fds.into_iter();
    fault::container(&container.id);
    // the agent may go away at any time: a migration goes on without an audience
    let say = |event: Event| {
        if let Err(e) = transport::send(stream, &event, &[]) {
            log::debug!("an event for the agent: {e:#}");
        }
    };
    let result = match request {
        Request::Inspect => {
            say(Event::Inspected(inspect(container, slot)));
            return Ok(());
        }
        Request::Abort => abort(slot),
        Request::Resolve { decision } => resolve(container, slot, decision),
        Request::Send(r) => fd(&mut fds).and_then(|fd| send(container, slot, &r, fd.into(), &say)),
        Request::Checkpoint(r) => fd(&mut fds)
            .and_then(|fd| checkpoint(container, slot, r, fd.into(), fds.next().map(Into::into), &say)),
        Request::Receive(r) => fd(&mut fds).and_then(|fd| receive(container, slot, &r, fd.into(), &say)),
        Request::Restore(r) => fd(&mut fds)
            .and_then(|fd| restore(container, slot, &r, fd.into(), fds.next().map(Into::into), &say)),
    };
    match result {
        Ok(Some(report)) => say(Event::Done { report }),
        Ok(None) => {} // undecided, and said so
        Err(e) => {
            log::warn!("{}: {e:#}", container.id);
            say(Event::Failed {
                failure: failure_of(&e, "request", ""),
                state: status(container).to_owned(),
            });
        }
    }
    Ok(())
}

/// A bug ends one migration, not the shim's readiness for the next: what a panic drops on its way puts the container back.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text =
            text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        bail!("a bug in the shim: {text}; its log in containerd's journal has the rest")
    })
}

fn fd(fds: &mut dyn Iterator<Item = OwnedFd>) -> Result<OwnedFd> {
    fds.next().context("the request came without its descriptor")
}

fn status(container: &Container) -> &'static str {
    match container.init.state() {
        State::Created | State::CreatedCheckpoint => "created",
        State::Incoming => "incoming",
        State::Running => "running",
        State::Paused => "paused",
        State::Stopped => "stopped",
        State::Deleted => "removed",
    }
}

fn inspect(container: &Arc<Container>, slot: &Slot) -> Inspected {
    let kinds = container.init.io().map(|io| io.kinds());
    Inspected {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        namespace: container.shared.namespace.clone(),
        id: container.id.clone(),
        status: status(container).to_owned(),
        pid: if container.init.exited().is_some() { 0 } else { container.init.pid() },
        bundle: container.bundle.clone(),
        stdio: serde_json::to_value(kinds).unwrap_or_default(),
        runtime: container.runc.binary().to_owned(),
        seals: true,
        execs: container.live_execs().iter().map(|e| e.process.id.clone()).collect(),
        migration: slot.migration(),
    }
}

fn abort(slot: &Slot) -> Result<Option<Report>> {
    match slot.ask_to_end() {
        Some(true) => Ok(Some(Report::default())),
        Some(false) => bail!("the migration was committed: it cannot be given up any more"),
        None => bail!("no migration is in progress"),
    }
}

fn resolve(container: &Arc<Container>, slot: &Slot, decision: Decision) -> Result<Option<Report>> {
    let still = slot.state().undecided.take().context("no undecided migration of this container")?;
    log::info!("{}: resolved as {decision:?}", container.id);
    match decision {
        Decision::Moved => {
            still.resolve(true)?;
            let MigrationState::Undecided { migration_id, .. } = slot.migration() else {
                bail!("no longer undecided")
            };
            slot.set(MigrationState::Moved { migration_id });
        }
        Decision::Stay => {
            still.resolve(false)?;
            slot.set(MigrationState::Idle);
        }
    }
    Ok(Some(Report::default()))
}

fn send(
    container: &Arc<Container>,
    slot: &Slot,
    request: &SendRequest,
    tcp: TcpStream,
    say: &dyn Fn(Event),
) -> Result<Option<Report>> {
    // it may have come only a moment ago, with its memory still on the way to its place
    slot.wait_filled(say)?;
    let leaving = Leaving::begin(container)?;
    let abort = Abort::cutting(&tcp).context("the connection to the destination")?;
    let migration_id = request.migration_id.clone();
    slot.begin(MigrationState::Sending { migration_id: migration_id.clone() }, abort.clone())
        .map_err(|e| anyhow!(e))?;
    let options = Options {
        migration_id: migration_id.clone(),
        node: request.node.clone(),
        peer: request.peer.clone(),
        limits: request.limits.clone(),
        tuning: request.tuning.clone(),
    };
    let outcome = caught(|| {
        let config = tls::config::client(&request.tls, ALPN_DATA, Some(&request.peer))?;
        let name = tls::migration_name(&migration_id);
        let silence = std::time::Duration::from_secs(request.limits.silence_s);
        let wire = Wire::connect(tcp, config, &name, silence)?;
        let tell = |event: Event| {
            if let Event::PostCopy { bytes, total } = event {
                slot.set(MigrationState::Feeding {
                    migration_id: migration_id.clone(),
                    peer: request.peer.clone(),
                    left: total - bytes,
                });
            }
            say(event);
        };
        source::send(wire, &request.ticket, Box::new(leaving), &options, &abort, &tell)
    });
    match outcome {
        Ok(Outcome::Moved(report)) => {
            slot.end(MigrationState::Moved { migration_id });
            Ok(Some(*report))
        }
        Ok(Outcome::Undecided(still, message)) => {
            let (peer, address) = (request.peer.clone(), request.address.clone());
            slot.state().undecided = Some(still);
            slot.end(MigrationState::Undecided { migration_id, peer, address });
            say(Event::Undecided { message });
            Ok(None)
        }
        Ok(Outcome::Lost(loss)) => {
            let (peer, bytes, choice) = (loss.peer.clone(), loss.bytes, loss.choice);
            slot.end(MigrationState::Lost { migration_id, peer, bytes, choice });
            Err(loss.failure(&container.id).into())
        }
        Err(e) => {
            slot.end(MigrationState::Idle);
            // what has no phase yet failed before the first one
            Err(failure_of(&e, "connect", &request.node).into())
        }
    }
}

fn checkpoint(
    container: &Arc<Container>,
    slot: &Slot,
    request: CheckpointRequest,
    file: File,
    secret: Option<File>,
    say: &dyn Fn(Event),
) -> Result<Option<Report>> {
    slot.wait_filled(say)?;
    let leaving = Leaving::begin(container)?;
    let abort = Abort::default();
    let migration_id = request.migration_id.clone();
    slot.begin(MigrationState::Sending { migration_id: migration_id.clone() }, abort.clone())
        .map_err(|e| anyhow!(e))?;
    let options = Options {
        migration_id,
        node: request.node.clone(),
        peer: String::new(),
        limits: request.limits,
        tuning: Tuning::default(),
    };
    let result = caught(|| {
        let wire = archive::create(file, request.seal.as_ref().map(|to| (to, secret.as_ref())))?;
        source::checkpoint(wire, Box::new(leaving), &options, request.container, request.stop, &abort, say)
    });
    slot.end(MigrationState::Idle);
    result.map(Some).map_err(|e| failure_of(&e, "checkpoint", &options.node).into())
}

fn receive(
    container: &Arc<Container>,
    slot: &Slot,
    request: &ReceiveRequest,
    tcp: TcpStream,
    say: &dyn Fn(Event),
) -> Result<Option<Report>> {
    let mut arriving = Arriving::new(container)?;
    let abort = Abort::cutting(&tcp).context("the connection to the source")?;
    // before anything of the container is touched, and beside others that claim to be the source
    let source = caught(|| admission::admit(tcp, request))?;
    arrive(slot, request, abort, |abort| {
        say(Event::Admitted);
        destination::receive(source, &mut arriving, request, abort, say)
    })
}

fn restore(
    container: &Arc<Container>,
    slot: &Slot,
    request: &ReceiveRequest,
    file: File,
    keys: Option<File>,
    say: &dyn Fn(Event),
) -> Result<Option<Report>> {
    let mut arriving = Arriving::new(container)?;
    let (manifest, wire) = archive::open(file, keys.as_ref())?;
    arrive(slot, request, Abort::default(), |abort| {
        Ok((destination::restore(wire, manifest, &mut arriving, request, abort, say)?, None))
    })
}

fn arrive(
    slot: &Slot,
    request: &ReceiveRequest,
    abort: Abort,
    work: impl FnOnce(&Abort) -> Result<(Report, Option<Filling>)>,
) -> Result<Option<Report>> {
    let migration_id = request.migration_id.clone();
    slot.begin(MigrationState::Receiving { migration_id: migration_id.clone() }, abort.clone())
        .map_err(|e| anyhow!(e))?;
    match caught(|| work(&abort)) {
        Ok((report, filling)) => {
            slot.arrived(request, filling);
            Ok(Some(report))
        }
        Err(e) => {
            slot.end(MigrationState::Idle);
            Err(failure_of(&e, "receive", &request.node).into())
        }
    }
}
