//! What an earlier run of the agent left, and what goes with containers that somebody deletes.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};

use super::{
    Agent,
    outcome::{self, Fate},
    placed::{Placed, Step},
};
use crate::{
    containerd::{Containerd, Namespace},
    control::{self, MigrationState, RUN_DIR},
    journal,
};

/// How long to wait before containerd is asked again for its events.
const RETRY: Duration = Duration::from_secs(2);

/// How long an arrival may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(30);

/// Says what was left and removes what nobody can need any more. An arriving container whose agent died before the
/// commit is undone; one that runs is kept.
pub async fn sweep(agent: &Agent) {
    if let Err(error) = try_sweep(agent).await {
        log::warn!("looking for leftovers: {error:#}");
    }
}

async fn try_sweep(agent: &Agent) -> Result<()> {
    let containerd = Containerd::connect(&agent.config.containerd).await?;
    for placed in Placed::all() {
        let namespace = containerd.namespace(&placed.namespace)?;
        if placed.complete {
            drop_if_gone(&containerd, &placed).await;
        } else {
            unfinished(&namespace, placed).await;
        }
    }
    super::departed::resume(&containerd)?;
    markers()?;
    for namespace in containerd.namespaces().await? {
        let namespace = containerd.namespace(&namespace)?;
        for lease in namespace.lease_list().await? {
            if lease.strip_prefix("transship-").is_some_and(|id| id.len() == 32) {
                log::info!("leftover: lease {lease} in {}; removed", namespace.name());
                namespace.lease_delete(&lease, true).await?;
            }
        }
    }
    images(&agent.config.images_dir);
    Ok(())
}

/// A container whose arrival an earlier agent did not see the end of: undone, unless its shim has it running, for then
/// it was committed.
async fn unfinished(containerd: &Namespace, mut placed: Placed) {
    let name = format!("{}/{}", placed.namespace, placed.id);
    if placed.is_of_another_boot() && journal::is_committed(&placed.migration) {
        // its source has deleted its own copy, or will: the files here are all there is
        log::warn!(
            "leftover: {name} came from {} and ended with the machine; it can be started anew",
            placed.from
        );
        outcome::keep(&placed.migration, &placed.from, Fate::Runs);
        if let Err(error) = placed.arrived(containerd).await {
            log::warn!("{name}: {error:#}");
        }
        return;
    }
    let mut inspected = control::client::inspect(&placed.namespace, &placed.id).await.ok();
    if inspected.as_ref().is_some_and(|i| i.status == "incoming") {
        // it may be anywhere between its beginning and its commit; the shim knows
        let abort = control::client::call(&placed.namespace, &placed.id, control::Request::Abort, Vec::new());
        if let Ok(mut answer) = abort.await {
            while let Ok(Some(_)) = tokio::time::timeout(END_LIMIT, answer.recv()).await {}
        }
        for _ in 0..20 {
            inspected = control::client::inspect(&placed.namespace, &placed.id).await.ok();
            let receiving = |i: &control::Inspected| matches!(i.migration, MigrationState::Receiving { .. });
            if !inspected.as_ref().is_some_and(receiving) {
                break;
            }
            tokio::time::sleep(END_LIMIT / 20).await;
        }
    }
    let known = inspected.is_some();
    if !inspected.is_some_and(|i| matches!(i.status.as_str(), "running" | "paused" | "stopped")) {
        log::info!("leftover: {name} never arrived from {}; undoing it", placed.from);
        let (migration, from) = (placed.migration.clone(), placed.from.clone());
        // without a shim that can say that it never ran, nobody knows for certain
        if placed.undo(containerd).await.is_empty() && known {
            outcome::keep(&migration, &from, Fate::Aborted);
        }
        return;
    }
    log::info!("leftover: {name} has arrived from {}; finishing what is left to do", placed.from);
    let finished = async {
        if let Err(error) = containerd.task_start(&placed.id).await {
            log::info!("{name}: starting its task: {error:#}"); // it was started
        }
        outcome::keep(&placed.migration, &placed.from, Fate::Runs);
        // what was sent when it came may have been lost
        outcome::announce_again(&placed.migration).await;
        placed.arrived(containerd).await
    };
    if let Err(error) = finished.await {
        log::warn!("{name}: {error:#}");
    }
}

/// What [`tidy`] calls it when it works on a container.
pub const TIDYING: &str = "being tidied up";

/// Tries again what could not be done when a container arrived, or when its arrival was undone, for want of containerd; never ends.
pub async fn tidy(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(RETRY).await;
        let idle = |p: &Placed| agent.busy.what(&p.namespace, &p.id).is_none();
        let left: Vec<_> = Placed::all().into_iter().filter(|p| is_left(p) && idle(p)).collect();
        if left.is_empty() {
            continue;
        }
        let Ok(containerd) = Containerd::connect(&agent.config.containerd).await else { continue };
        for Placed { namespace, id, .. } in &left {
            let Some(_busy) = agent.busy.enter(namespace, id, TIDYING) else { continue };
            let Ok(containerd) = containerd.namespace(namespace) else { continue };
            tidy_one(&containerd, id).await;
        }
    }
}

/// Whether something is still to be done for a container that came here.
fn is_left(placed: &Placed) -> bool {
    !placed.complete || placed.steps.contains(&Step::Lease)
}

/// Does it, for a container with which nothing else is being done now.
pub async fn tidy_one(containerd: &Namespace, id: &str) {
    let Some(mut placed) = Placed::load(containerd.name(), id).filter(is_left) else { return };
    if !placed.complete {
        unfinished(containerd, placed).await;
    } else if let Err(error) = placed.release(containerd).await {
        log::debug!("{}/{id}: {error:#}", containerd.name());
    }
}

/// Markers without a journal.
fn markers() -> Result<()> {
    for directory in fs::read_dir(Path::new(RUN_DIR).join("incoming")).into_iter().flatten().flatten() {
        for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
            log::info!("leftover: marker {}; removed", file.path().display());
            fs::remove_file(file.path()).with_context(|| format!("removing {}", file.path().display()))?;
        }
    }
    Ok(())
}

/// Directories of images of migrations that no shim knows of (none is receiving: those hold a lock on theirs).
fn images(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if in_use(&path) {
            log::info!("images {} are in use", path.display());
            continue;
        }
        log::info!("leftover: images {}; removed", path.display());
        if let Err(error) = fs::remove_dir_all(&path) {
            log::warn!("removing {}: {error}", path.display());
        }
    }
}

/// Images of a migration whose shim on this node, its source, has died: they hold memory and are nobody's any more. A CRIU that dumped into
/// them may need a moment to end.
pub async fn images_of_source(dir: &Path, migration: &str) {
    let path = dir.join(format!("{migration}-source"));
    for _ in 0..50 {
        if !path.exists() {
            return;
        }
        let looked = path.clone();
        if matches!(tokio::task::spawn_blocking(move || in_use(&looked)).await, Ok(false)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    log::info!("leftover: images {}; removed", path.display());
    if let Err(error) = super::netns::gone(fs::remove_dir_all(&path)) {
        log::warn!("removing {}: {error}", path.display());
    }
}

/// Whether a process has something open below a directory, or works in it.
fn in_use(dir: &Path) -> bool {
    let below = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(dir));
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|process| {
        let process = process.path();
        below(&process.join("cwd"))
            || fs::read_dir(process.join("fd")).into_iter().flatten().flatten().any(|fd| below(&fd.path()))
    })
}

/// Removes what was made for containers that came from elsewhere when somebody deletes them; never ends.
pub async fn follow_deletions(agent: Arc<Agent>) {
    loop {
        if let Err(error) = deletions(&agent).await {
            log::debug!("containerd's events: {error:#}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn deletions(agent: &Agent) -> Result<()> {
    let containerd = Containerd::connect(&agent.config.containerd).await?;
    let mut deleted = containerd.deletions().await?;
    // what was deleted while nobody listened
    for placed in Placed::all() {
        if placed.complete && agent.busy.what(&placed.namespace, &placed.id).is_none() {
            drop_if_gone(&containerd, &placed).await;
        }
    }
    while let Some((namespace, id)) = deleted.next().await? {
        let Some(placed) = Placed::load(&namespace, &id) else { continue };
        // whoever moves it away or undoes its arrival cleans up as well
        if placed.complete && agent.busy.what(&namespace, &id).is_none() {
            drop_if_gone(&containerd, &placed).await;
        }
    }
    Ok(())
}

async fn drop_if_gone(containerd: &Containerd, placed: &Placed) {
    let gone = async {
        let namespace = containerd.namespace(&placed.namespace)?;
        let gone = namespace.container(&placed.id).await?.is_none();
        if gone {
            placed.clone().release_at_last(&namespace).await?;
        }
        Ok::<_, anyhow::Error>(gone)
    };
    match gone.await {
        Ok(false) => {}
        Ok(true) => {
            log::info!("{}/{} was deleted; removing its network and FIFOs", placed.namespace, placed.id);
            let placed = placed.clone();
            let removed = tokio::task::spawn_blocking(move || placed.remove()).await;
            if let Ok(Err(error)) = removed {
                log::warn!("{error:#}");
            }
        }
        Err(error) => log::warn!("{}/{}: {error:#}", placed.namespace, placed.id),
    }
}
