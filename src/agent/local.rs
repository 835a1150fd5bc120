//! Requests that need no peer: `checkpoint`, `restore`, `resolve`.

use std::{fs::File, os::fd::OwnedFd};

use anyhow::{Context, Result};

use super::{
    Agent,
    api::{
        CheckpointReport, CheckpointRequest, Decision, EncryptTo, ErrorReport, Event, ExitCode, Reply,
        ResolveRequest, RestoreReport, RestoreRequest,
    },
    departed::clean_up,
    destination::{follow, no_blobs},
    draft::Draft,
    examine::{describe, image_of},
    message::{Offer, Refusal},
    netns,
    placement::{Placement, plain, situation},
    pod, preflight,
    reporter::Reporter,
    spec,
};
use crate::{
    containerd::{
        Containerd, Namespace,
        task::{Status, Task},
    },
    control::{self, MigrationState, ReceiveRequest},
    migrate::{
        archive,
        protocol::Failure,
        seal::{self, SealTo},
    },
    tls::random_hex,
};

type Outcome<T> = Result<T, ErrorReport>;

/// About a key that is not the file's.
const KEYS: &str = "--identity takes the file with the secret key that belongs to one of --encrypt-to's; --passphrase-file the one with the \
    passphrase; a file that is not encrypted takes neither";

fn internal(error: anyhow::Error) -> ErrorReport {
    ErrorReport::new(ExitCode::Failed, format!("{error:#}"))
}

fn refused(refusal: Refusal) -> ErrorReport {
    ErrorReport::new(ExitCode::Refused, refusal.message).advice(refusal.advice)
}

async fn containerd(agent: &Agent, namespace: &str) -> Outcome<Namespace> {
    let connection = Containerd::connect(&agent.config.containerd).await.map_err(internal)?;
    connection.namespace(namespace).map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{e:#}")))
}

fn end(agent: &Agent, reporter: &mut Reporter, result: Outcome<Reply>) {
    reporter.end(result.map_err(|mut error| {
        if error.node.is_empty() {
            error.node.clone_from(&agent.node);
        }
        if error.phase.is_empty() {
            error.phase = reporter.phase_name();
        }
        if error.state.is_empty() {
            error.state = "nothing was changed".into();
        }
        if error.advice.is_empty() {
            error.advice = match error.code {
                ExitCode::BadFile => {
                    "make the checkpoint anew, or copy it again: it is not as it was written"
                }
                ExitCode::Usage => "name a file that exists on this node",
                _ => "the agent's log says more; `transship doctor` examines the node",
            }
            .into();
        }
        error
    }));
}

/// Writes a container's state to a file.
pub async fn checkpoint(
    agent: &Agent,
    request: CheckpointRequest,
    encrypt: Option<EncryptTo>,
    reporter: &mut Reporter,
) {
    let id = request.container.clone();
    let result = match agent.busy.enter(&request.namespace, &id, "being checkpointed") {
        None => Err(ErrorReport::new(ExitCode::Busy, format!("{id} is busy with a migration or checkpoint"))),
        Some(_busy) => try_checkpoint(agent, &request, encrypt, reporter).await,
    };
    end(agent, reporter, result.map(Reply::Checkpointed));
}

async fn try_checkpoint(
    agent: &Agent,
    request: &CheckpointRequest,
    encrypt: Option<EncryptTo>,
    reporter: &mut Reporter,
) -> Outcome<CheckpointReport> {
    reporter.phase("preflight");
    let id = &request.container;
    let containerd = containerd(agent, &request.namespace).await?;
    let Some(record) = containerd.container(id).await.map_err(internal)? else {
        let message = format!("no container {id} in namespace {}", request.namespace);
        return Err(ErrorReport::new(ExitCode::NotFound, message));
    };
    pod::check(&record).map_err(refused)?;
    let task: Option<Task> = containerd.task(id).await.map_err(internal)?;
    let Some(task) = task.filter(|t| matches!(t.status, Status::Running | Status::Paused)) else {
        return Err(ErrorReport::new(ExitCode::NotRunning, format!("{id} does not run")));
    };
    if task.status == Status::Paused {
        let error = ErrorReport::new(ExitCode::NotRunning, format!("{id} is paused"));
        return Err(error.advice(format!("resume it: ctr -n {} task resume {id}", request.namespace)));
    }
    let inspected = control::client::inspect(&request.namespace, id).await.map_err(|error| {
        ErrorReport::new(ExitCode::Refused, format!("{id} does not run under transship: {error:#}"))
    })?;
    if encrypt.is_some() && !inspected.seals {
        let message = format!("the shim of {id} was started by an older transship, which cannot encrypt");
        return Err(ErrorReport::new(ExitCode::Refused, message).advice("start the container anew"));
    }
    let (seal, secret) = encrypt.map(seal_to).transpose()?.unzip();
    preflight::check_movable(&record.spec).map_err(refused)?;
    let (image, closure, layer) = image_of(&containerd, &record).await.map_err(internal)?;
    let mut offer = Offer {
        namespace: request.namespace.clone(),
        image,
        blobs: closure.blobs.clone(),
        chain: closure.chain_id().to_string(),
        layer,
        terminal: spec::terminal(&record.spec),
        record,
        ..Offer::default()
    };
    describe(agent, &containerd, &mut offer, Some(&task), Some(&inspected)).await.map_err(internal)?;
    let draft = Draft::begin(&request.output).map_err(|e| {
        ErrorReport::new(ExitCode::Usage, format!("{}: {e}", request.output.display()))
            .advice("name a file that does not exist, in a directory that does")
    })?;
    reporter.phase("dump");
    let encrypted = seal.is_some();
    let fds = [Some(draft.file().try_clone().map_err(|e| internal(e.into()))?), secret.flatten()];
    let fds = fds.into_iter().flatten().map(OwnedFd::from).collect();
    let report = write(agent, request, offer, (seal, fds), reporter).await?;
    let bytes = draft.finish().map_err(|e| {
        let mut error =
            ErrorReport::new(ExitCode::Failed, format!("naming {}: {e}", request.output.display()));
        let now = if request.leave_running { "runs as before" } else { "is stopped" };
        error.state = format!("{id} {now}; its checkpoint is complete");
        error.advice("give the file another name: it is as good as any")
    })?;
    Ok(CheckpointReport {
        container: id.clone(),
        output: request.output.clone(),
        bytes,
        freeze_ms: report.freeze_ms,
        running: request.leave_running,
        encrypted,
        warnings: report.warnings,
    })
}

async fn write(
    agent: &Agent,
    request: &CheckpointRequest,
    offer: Offer,
    (seal, fds): (Option<SealTo>, Vec<OwnedFd>),
    reporter: &mut Reporter,
) -> Outcome<crate::migrate::report::Report> {
    let id = &request.container;
    let start = async {
        let asked = control::CheckpointRequest {
            migration_id: random_hex(16)?,
            node: agent.node.clone(),
            stop: !request.leave_running,
            container: serde_json::to_value(&offer)?,
            limits: agent.config.limits(0, 0, u64::MAX),
            seal,
        };
        control::client::call(&request.namespace, id, control::Request::Checkpoint(asked), fds).await
    };
    let mut events = start.await.map_err(internal)?;
    while let Some(event) = events.recv().await {
        match event {
            control::Event::Phase { phase } => reporter.phase(&phase),
            control::Event::Progress { bytes, total } => reporter.progress("memory", bytes, total),
            control::Event::Warning { message } => reporter.say(Event::Warning { message }),
            control::Event::Done { report } => return Ok(report),
            control::Event::Failed { failure, state } => {
                let mut error =
                    ErrorReport::new(ExitCode::DumpFailed, failure.message).advice(failure.advice);
                error.phase = failure.phase;
                error.state = match state.as_str() {
                    "running" => format!("{id} runs as before; the file was removed"),
                    other => format!("{id} is {other}; the file was removed"),
                };
                return Err(error);
            }
            _ => {}
        }
    }
    let mut error = ErrorReport::new(ExitCode::DumpFailed, format!("the shim of {id} died"));
    error.state = "unknown: look at `transship ps`; the file was removed".into();
    Err(error)
}

/// What the shim is told, and the descriptor that goes with it.
fn seal_to(encrypt: EncryptTo) -> Outcome<(SealTo, Option<File>)> {
    match encrypt {
        EncryptTo::Recipients(keys) => Ok((SealTo::Recipients(keys), None)),
        EncryptTo::PassphraseFile(path) => Ok((SealTo::Passphrase, Some(keys_at(&path)?))),
    }
}

fn keys_at(path: &std::path::Path) -> Outcome<File> {
    seal::open_keys(path).map_err(|e| {
        ErrorReport::new(ExitCode::Usage, format!("{e:#}"))
            .advice("name a regular file of this node: the agent reads it")
    })
}

/// Makes a container of a checkpoint file.
pub async fn restore(agent: &Agent, request: RestoreRequest, reporter: &mut Reporter) {
    let result = try_restore(agent, &request, reporter).await;
    end(agent, reporter, result.map(Reply::Restored));
}

async fn try_restore(
    agent: &Agent,
    request: &RestoreRequest,
    reporter: &mut Reporter,
) -> Outcome<RestoreReport> {
    reporter.phase("preflight");
    let path = request.file.clone();
    let file = File::open(&path)
        .map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{}: {e}", path.display())))?;
    let keys = request.keys.as_deref().map(keys_at).transpose()?;
    let bad = |error: anyhow::Error| {
        let message = format!("{}: {error:#}", request.file.display());
        match error.is::<seal::WrongKey>() || error.is::<archive::NotSealed>() {
            true => ErrorReport::new(ExitCode::Usage, message).advice(KEYS),
            false => ErrorReport::new(ExitCode::BadFile, message),
        }
    };
    // the whole file is read once: nothing is made of a damaged one; the shim reads it again
    let opened = tokio::task::spawn_blocking(move || -> Result<_> {
        let (manifest, _) = archive::verify(file.try_clone()?, keys.as_ref())?;
        Ok((file, keys, manifest))
    });
    let (file, keys, manifest) = opened.await.context("a thread").and_then(|r| r).map_err(bad)?;
    let mut offer: Offer = serde_json::from_value(manifest.container)
        .context("what the file says of the container")
        .map_err(bad)?;
    let was = (offer.namespace.clone(), offer.record.id.clone());
    if !request.namespace.is_empty() {
        offer.namespace.clone_from(&request.namespace);
    }
    if !request.container.is_empty() && request.container != offer.record.id {
        rename(&mut offer, &request.container);
    }
    spec::move_cgroup(&mut offer.record.spec, (&was.0, &was.1), (&offer.namespace, &offer.record.id));
    offer.ignore_cpu |= request.ignore_cpu;
    // a file is always of a container that ran; one that says otherwise would be looked at less closely
    offer.cold = false;
    // and is restored from images
    offer.paged_memory = 0;
    let (namespace, id) = (offer.namespace.clone(), offer.record.id.clone());
    if !plain(&namespace) || !plain(&id) {
        return Err(ErrorReport::new(ExitCode::Usage, format!("{namespace}/{id} is no name of a container")));
    }
    let Some(_busy) = agent.busy.enter(&namespace, &id, "being restored") else {
        return Err(ErrorReport::new(ExitCode::Busy, format!("{id} is busy")));
    };
    let containerd = containerd(agent, &namespace).await?;
    let found = situation(&agent.config, &containerd, &offer).await.map_err(internal)?;
    preflight::check(&offer, &found).map_err(refused)?;
    reporter.phase("prepare");
    let migration = random_hex(16).map_err(internal)?;
    let from = format!("file {}", request.file.display());
    let mut placement =
        Placement::begin(&agent.config, &containerd, offer, &migration, &from).await.map_err(internal)?;
    placement.memory_cap = found.memory_cap(false);
    let fds = [Some(file), keys].into_iter().flatten().map(OwnedFd::from).collect();
    match place(agent, &mut placement, fds, reporter).await {
        Ok((pid, mut warnings)) => {
            let stdio = placement.stdio.clone();
            warnings.extend(placement.keep().await.map_err(internal)?);
            let total_ms = reporter.elapsed_ms();
            Ok(RestoreReport { namespace, container: id, pid, total_ms, stdio, warnings })
        }
        Err(error) => {
            let left = placement.undo().await;
            let mut report = match error.downcast::<Failure>() {
                Ok(failure) => {
                    let mut report =
                        ErrorReport::new(ExitCode::RestoreFailed, failure.message).advice(failure.advice);
                    report.phase = failure.phase;
                    report
                }
                Err(error) => ErrorReport::new(ExitCode::RestoreFailed, format!("{error:#}")),
            };
            report.state = match left.is_empty() {
                true => "nothing was left".into(),
                false => format!("left behind: {}", left.join("; ")),
            };
            Err(report)
        }
    }
}

async fn place(
    agent: &Agent,
    placement: &mut Placement<'_>,
    fds: Vec<OwnedFd>,
    reporter: &mut Reporter,
) -> Result<(u32, Vec<String>)> {
    no_blobs(&placement.missing_blobs().await?, &placement.offer)?;
    placement.image_and_snapshot(|_, _| {}).await?;
    placement.network().await?;
    placement.container().await?;
    placement.task().await?;
    reporter.phase("restore");
    let offer = &placement.offer;
    let request = control::Request::Restore(ReceiveRequest {
        migration_id: placement.migration.clone(),
        ticket: String::new(),
        node: agent.node.clone(),
        peer: String::new(),
        tls: None,
        limits: agent.config.limits(0, 0, placement.memory_cap),
        netns: placement.netns.clone(),
        net: offer.net.clone(),
        on_post_copy_failure: offer.on_post_copy_failure,
    });
    let (namespace, id) = (offer.namespace.clone(), offer.record.id.clone());
    let events = control::client::call(&namespace, &id, request, fds).await?;
    let warnings = follow(&namespace, &id, events, None).await?;
    let pid = placement.containerd().task_start(&id).await?;
    Ok((pid, warnings))
}

/// Another name for the container that is made of a file. Its network namespace then gets one of its own too.
fn rename(offer: &mut Offer, id: &str) {
    offer.record.snapshot_key = id.into();
    offer.record.id = id.into();
    let path = netns::own_path(&offer.namespace, id);
    spec::set_network(&mut offer.record.spec, &path);
}

/// Ends a migration whose outcome this node could not learn.
pub async fn resolve(agent: &Agent, request: ResolveRequest) -> Outcome<Reply> {
    let (namespace, id) = (request.namespace.as_str(), request.container.as_str());
    let inspected = control::client::inspect(namespace, id)
        .await
        .map_err(|error| ErrorReport::new(ExitCode::NotFound, format!("{error:#}")))?;
    let MigrationState::Undecided { peer, .. } = inspected.migration else {
        let message = format!("{id} is not undecided (it is {})", inspected.status);
        return Err(ErrorReport::new(ExitCode::Usage, message).advice("see `transship ps`"));
    };
    let decision = match request.decision {
        Decision::RunHere => control::Decision::Stay,
        Decision::Moved => control::Decision::Moved,
    };
    let asked = control::client::call(namespace, id, control::Request::Resolve { decision }, Vec::new());
    let mut events = asked.await.map_err(internal)?;
    while let Some(event) = events.recv().await {
        match event {
            control::Event::Done { .. } => {
                let mut notes = Vec::new();
                if request.decision == Decision::Moved {
                    let containerd = containerd(agent, namespace).await?;
                    if let Some(record) = containerd.container(id).await.map_err(internal)? {
                        notes = clean_up(&containerd, &record, true, false).await;
                    }
                }
                for note in notes {
                    log::info!("{namespace}/{id}: {note}");
                }
                let message = match request.decision {
                    Decision::RunHere => format!("{id} runs on {} again", agent.node),
                    Decision::Moved => format!("{id} runs on {peer}; what was left of it here is gone"),
                };
                log::info!("resolved: {message}");
                return Ok(Reply::Resolved { message });
            }
            control::Event::Failed { failure, state } => {
                let mut error = ErrorReport::new(ExitCode::Failed, failure.message).advice(failure.advice);
                error.state = format!("{id} is {state}");
                return Err(error);
            }
            _ => {}
        }
    }
    Err(ErrorReport::new(ExitCode::Failed, format!("the shim of {id} died")))
}
