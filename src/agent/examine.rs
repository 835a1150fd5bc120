//! What there is to know of a container before it is moved, and what forbids that on its own node.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{
    Agent,
    api::{ErrorReport, ExitCode, MigrateRequest},
    host::{self, HostFacts},
    message::Offer,
    netns, pod, preflight, spec,
};
use crate::{
    containerd::{
        Containerd, Namespace,
        image::{Closure, ImageRecord},
        record::Record,
        task::{Status, Task},
    },
    control::{self, Inspected},
    criu::Criu,
    migrate::loss::megabytes,
};

type Outcome<T> = Result<T, ErrorReport>;

/// What is known of the container before anything is said to the peer.
pub struct Subject {
    /// containerd, in the container's namespace.
    pub containerd: Namespace,
    /// The record.
    pub record: Record,
    /// Its task.
    pub task: Option<Task>,
    /// What its shim says; only of one that runs.
    pub inspected: Option<Inspected>,
    /// What the peer is told.
    pub offer: Offer,
}

fn internal(error: anyhow::Error) -> ErrorReport {
    ErrorReport::new(ExitCode::Failed, format!("{error:#}"))
}

/// Reads all that the offer holds, and refuses what cannot move.
pub async fn examine(agent: &Agent, request: &MigrateRequest) -> Outcome<Subject> {
    let id = &request.container;
    let fail = |code, message: String, advice: &str| Err(ErrorReport::new(code, message).advice(advice));
    let containerd = Containerd::connect(&agent.config.containerd).await.map_err(internal)?;
    let containerd = containerd
        .namespace(&request.namespace)
        .map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{e:#}")))?;
    let Some(record) = containerd.container(id).await.map_err(internal)? else {
        return fail(
            ExitCode::NotFound,
            format!("no container {id} in namespace {}", request.namespace),
            "see `ctr --namespace N containers list`, or name another namespace with --namespace",
        );
    };
    pod::check(&record)
        .map_err(|refusal| ErrorReport::new(ExitCode::Refused, refusal.message).advice(refusal.advice))?;
    let task = containerd.task(id).await.map_err(internal)?;
    let running = task.as_ref().is_some_and(|t| t.status == Status::Running);
    let state = task.as_ref().map_or("has no task", |t| t.status.name());
    if let Some(task) = &task
        && task.status == Status::Paused
    {
        return fail(ExitCode::NotRunning, format!("{id} is paused"), "resume it first (ctr task resume)");
    }
    match (running, request.cold) {
        (false, false) => {
            return fail(
                ExitCode::NotRunning,
                format!(
                    "{id} does not run (it {})",
                    if state == "has no task" { state.into() } else { format!("is {state}") }
                ),
                "--cold moves its image, record and writable layer all the same",
            );
        }
        (true, true) => {
            return fail(ExitCode::Usage, format!("{id} runs"), "leave --cold away to move it as it runs");
        }
        _ => {}
    }
    preflight::check_movable(&record.spec).or_else(|refusal| {
        // without memory there are no PIDs and addresses to keep
        if request.cold {
            return Ok(());
        }
        Err(ErrorReport::new(ExitCode::Refused, refusal.message).advice(refusal.advice))
    })?;
    if record.snapshot_key.is_empty() || record.image.is_empty() {
        return fail(
            ExitCode::Refused,
            format!(
                "{id} was not made of an image (it has no snapshot), so the other node cannot make it anew"
            ),
            "",
        );
    }
    let (image, closure, layer) = image_of(&containerd, &record).await.map_err(|error| {
        ErrorReport::new(ExitCode::Refused, format!("{error:#}")).advice(
            "the image must be complete in this node's content store, as it was when the container was made",
        )
    })?;
    let inspected = match &task {
        Some(task) if running => Some(inspect(agent, &containerd, request, &record, task).await?),
        _ => None,
    };
    let mut offer = Offer {
        namespace: request.namespace.clone(),
        record: record.clone(),
        image,
        blobs: closure.blobs.clone(),
        chain: closure.chain_id().to_string(),
        layer,
        cold: !running,
        ignore_cpu: request.ignore_cpu,
        silence_seconds: request.silence_seconds,
        ghost_limit: request.ghost_limit,
        on_post_copy_failure: agent.config.migration.tuning(&request.tuning).on_post_copy_failure,
        terminal: spec::terminal(&record.spec),
        ..Offer::default()
    };
    describe(agent, &containerd, &mut offer, task.as_ref(), inspected.as_ref()).await.map_err(internal)?;
    if running && offer.host.criu.is_empty() {
        let named = agent.config.criu.as_ref().map(|p| format!(" as {}", p.display())).unwrap_or_default();
        return fail(
            ExitCode::Refused,
            format!("CRIU was not found on {}{named}", agent.node),
            "install it, or correct `criu` in agent.toml; `transship doctor` says more",
        );
    }
    Ok(Subject { containerd, record, task, inspected, offer })
}

/// The container's image as it was when it was made, and the size of its layer.
pub async fn image_of(containerd: &Namespace, record: &Record) -> Result<(ImageRecord, Closure, u64)> {
    let (snapshotter, key) = (&record.snapshotter, &record.snapshot_key);
    let snapshot = containerd.snapshot(snapshotter, key).await?;
    let snapshot =
        snapshot.with_context(|| format!("the container's snapshot {key} of {snapshotter} is gone"))?;
    let image = containerd.image(&record.image).await?;
    let image = image.with_context(|| format!("image {} is gone from this node", record.image))?;
    let closure = containerd.image_closure(&image.target, Some(&snapshot.parent)).await;
    let closure = closure.with_context(|| format!("image {}", record.image))?;
    // a snapshotter that cannot say is no reason not to move
    let layer = containerd.snapshot_usage(snapshotter, key).await.unwrap_or(0);
    Ok((image, closure, layer))
}

/// Asks the container's shim, and refuses what it knows to be unmovable.
async fn inspect(
    agent: &Agent,
    containerd: &Namespace,
    request: &MigrateRequest,
    record: &Record,
    task: &Task,
) -> Outcome<Inspected> {
    let id = &request.container;
    let inspected = control::client::inspect(&request.namespace, id).await.map_err(|error| {
        ErrorReport::new(
            ExitCode::Refused,
            format!("{id} does not run under transship (its runtime is {}): {error:#}", record.runtime),
        )
        .advice("run it with --runtime io.containerd.transship.v2; --cold moves one that is stopped")
    })?;
    if let control::MigrationState::Undecided { peer, .. } = &inspected.migration {
        return Err(ErrorReport::new(
            ExitCode::Undecided,
            format!("{id} is frozen here since its move to {peer} was committed without an answer"),
        )
        .advice("find out whether it runs there, then `transship resolve`"));
    }
    // what is on this node already and only not in its place yet, the shim waits for
    if let control::MigrationState::Filling { peer, left, .. } = &inspected.migration
        && *left > 0
    {
        return Err(ErrorReport::new(
            ExitCode::Busy,
            format!("{} of {id}'s memory are still on {peer}", megabytes(*left)),
        )
        .advice("move it on when all of it is here; see `transship ps`")
        .state(format!("{id} runs on {}", agent.node)));
    }
    if !inspected.execs.is_empty() {
        return Err(ErrorReport::new(
            ExitCode::Refused,
            format!("{id} has running exec sessions ({}), which cannot move", inspected.execs.join(", ")),
        )
        .advice("end them first"));
    }
    if netns::is_host(task.pid) {
        return Err(ErrorReport::new(ExitCode::Refused, format!("{id} is in the network of {}", agent.node)));
    }
    if let Some(other) = stranger(containerd, task).await.map_err(internal)? {
        return Err(ErrorReport::new(
            ExitCode::Refused,
            format!("{id} shares its network with others (process {other}), which would be cut off from it"),
        )
        .advice("containers of one pod cannot be moved one by one"));
    }
    Ok(inspected)
}

/// A process in the task's network that is not the task's. The list of the task's processes is read after the look at /proc: who is in the one
/// but not in the other is a stranger, however fast the task forks. A program of the move that brought the task here, which worked inside its
/// network, is given the time to end.
async fn stranger(containerd: &Namespace, task: &Task) -> Result<Option<u32>> {
    const LOOKS: usize = 7;
    let mut users = netns::Users::now(task.pid);
    for look in 1..LOOKS {
        if users.besides(&containerd.task_pids(&task.id).await?).is_none() {
            return Ok(None);
        }
        tokio::time::sleep(Duration::from_millis(25 << look)).await;
    }
    Ok(users.besides(&[]))
}

/// What the offer says of node, processes and network.
pub async fn describe(
    agent: &Agent,
    containerd: &Namespace,
    offer: &mut Offer,
    task: Option<&Task>,
    inspected: Option<&Inspected>,
) -> Result<()> {
    offer.runtime = "runc".into();
    if let (Some(task), Some(inspected)) = (task, inspected) {
        offer.stdio.clone_from(&task.stdio);
        offer.terminal = task.terminal;
        offer.stdio_kinds.clone_from(&inspected.stdio);
        if !inspected.runtime.is_empty() {
            offer.runtime.clone_from(&inspected.runtime);
        }
        let pids = containerd.task_pids(&task.id).await?;
        let memory = host::Memory::of(&pids);
        (offer.memory, offer.shared_memory, offer.paged_memory) =
            (memory.moved, memory.shared, memory.unshared);
        let pid = task.pid;
        let captured = tokio::task::spawn_blocking(move || netns::capture(pid)).await.context("a thread")?;
        offer.net = Some(captured?);
    }
    let (criu, runtime) = (agent.config.criu.clone(), offer.runtime.clone());
    let paged = offer.paged_memory;
    let looked_up = tokio::task::spawn_blocking(move || {
        let by_pages = paged > 0 && Criu::find(criu.as_deref()).is_ok_and(|c| c.dumps_without_memory());
        (HostFacts::gather(criu.as_deref(), &runtime), if by_pages { paged } else { 0 })
    });
    (offer.host, offer.paged_memory) = looked_up.await.context("a thread")?;
    Ok(())
}
