//! What an earlier run of the agent left, and what goes with containers that somebody deletes.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};

use super::{
    Agent,
    netns::Placed,
    outcome::{self, Fate},
};
use crate::{
    containerd::{Containerd, Namespace, record::Record},
    control::{self, MigrationState, RUN_DIR},
};

/// How long to wait before containerd is asked again for its events.
const RETRY: Duration = Duration::from_secs(2);

/// Says what was left and removes what nobody can need any more. An arriving container whose agent died before the
/// commit is undone; one that runs is kept.
pub async fn sweep(agent: &Agent) {
    if let Err(error) = try_sweep(agent).await {
        log::warn!("looking for leftovers: {error:#}");
    }
}

async fn try_sweep(agent: &Agent) -> Result<()> {
    let containerd = Containerd::connect(&agent.config.containerd).await?;
    markers(&containerd).await?;
    for namespace in containerd.namespaces().await? {
        let namespace = containerd.namespace(&namespace)?;
        arriving(&namespace).await?;
        for lease in namespace.lease_list().await? {
            if lease.strip_prefix("transship-").is_some_and(|id| id.len() == 32) {
                log::info!("leftover: lease {lease} in {}; removed", namespace.name());
                namespace.lease_delete(&lease, false).await?;
            }
        }
    }
    for placed in Placed::all() {
        drop_if_gone(&containerd, &placed).await;
    }
    images(&agent.config.images_dir);
    Ok(())
}

/// Containers whose shim still waits for a source that has lost its agent.
async fn arriving(namespace: &Namespace) -> Result<()> {
    for record in namespace.container_list().await?.into_iter().filter(super::ps::is_ours) {
        let placed = Placed::load(namespace.name(), &record.id);
        let (migration, from) = placed.as_ref().map_or(("", ""), |p| (p.migration.as_str(), p.from.as_str()));
        let fate = outcome::recall(migration, from);
        let inspected = match control::client::inspect(namespace.name(), &record.id).await {
            Ok(inspected) => inspected,
            // its shim died with the agent, before anything of it ran as far as anybody knows
            Err(_) if placed.is_some() && fate != Fate::Runs => {
                log::info!("leftover: {}/{} never arrived; removing it", namespace.name(), record.id);
                remove(namespace, &record).await;
                continue;
            }
            Err(_) => continue,
        };
        if inspected.status != "incoming" {
            if let MigrationState::Arrived { migration_id } = &inspected.migration
                && fate != Fate::Runs
                && migration_id == migration
            {
                finish(namespace, &record.id, migration, from).await;
            }
            continue;
        }
        log::info!("leftover: {}/{} never arrived; undoing it", namespace.name(), record.id);
        let abort =
            control::client::call(namespace.name(), &record.id, control::Request::Abort, Vec::new()).await;
        if let Ok(mut answer) = abort {
            while let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(30), answer.recv()).await {}
        }
        match control::client::inspect(namespace.name(), &record.id).await {
            // it was committed, and runs
            Ok(now) if now.status != "incoming" => finish(namespace, &record.id, migration, from).await,
            _ => {
                if remove(namespace, &record).await {
                    outcome::keep(migration, from, Fate::Aborted);
                }
            }
        }
    }
    Ok(())
}

/// Removes what was made of a container; true if nothing is left of it but what [`Placed`] holds.
async fn remove(namespace: &Namespace, record: &Record) -> bool {
    let removed = async {
        namespace.task_remove(&record.id, Duration::from_secs(20)).await?;
        namespace.container_delete(&record.id).await?;
        namespace.snapshot_remove(&record.snapshotter, &record.snapshot_key).await
    };
    let removed = removed.await;
    if let Err(error) = &removed {
        log::error!("{}/{}: {error:#}", namespace.name(), record.id);
    }
    removed.is_ok()
}

/// A container arrived while no agent was there: containerd has not heard of it, and its announcement may have been lost.
async fn finish(namespace: &Namespace, id: &str, migration: &str, from: &str) {
    log::info!("{}/{id} arrived while no agent ran; finishing its migration", namespace.name());
    if let Err(error) = namespace.task_start(id).await {
        log::warn!("{}/{id} runs, but containerd could not be told: {error:#}", namespace.name());
    }
    outcome::keep(migration, from, Fate::Runs);
    super::netns::announce_again(migration).await;
}

async fn markers(containerd: &Containerd) -> Result<()> {
    let root = Path::new(RUN_DIR).join("incoming");
    for directory in fs::read_dir(&root).into_iter().flatten().flatten() {
        for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
            let path = file.path();
            let (Some(namespace), Some(id)) = (
                directory.file_name().to_str().map(String::from),
                path.file_stem().and_then(|s| s.to_str()).map(String::from),
            ) else {
                continue;
            };
            log::info!("leftover: {namespace}/{id} was announced and never created; marker removed");
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            // the record was made just before the marker
            let namespace = containerd.namespace(&namespace)?;
            if namespace.task(&id).await?.is_none()
                && let Some(record) = namespace.container(&id).await?
                && super::ps::is_ours(&record)
                && Placed::load(namespace.name(), &id).is_some()
            {
                namespace.container_delete(&id).await?;
                namespace.snapshot_remove(&record.snapshotter, &record.snapshot_key).await?;
            }
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
        if agent.busy.what(&placed.namespace, &placed.id).is_none() {
            drop_if_gone(&containerd, &placed).await;
        }
    }
    while let Some((namespace, id)) = deleted.next().await? {
        let Some(placed) = Placed::load(&namespace, &id) else { continue };
        // whoever moves it away or undoes its arrival cleans up as well
        if agent.busy.what(&namespace, &id).is_none() {
            drop_if_gone(&containerd, &placed).await;
        }
    }
    Ok(())
}

async fn drop_if_gone(containerd: &Containerd, placed: &Placed) {
    let gone = async {
        let namespace = containerd.namespace(&placed.namespace)?;
        Ok::<_, anyhow::Error>(namespace.container(&placed.id).await?.is_none())
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
