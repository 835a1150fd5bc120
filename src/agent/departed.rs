//! Containers that run on another node now, until nothing of them is left here: a record that stays could be started a second time. What
//! cannot be removed at once (containerd is away) is written down and tried again, also by the next agent.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    netns::{self, key},
    placed::Placed,
};
use crate::{
    containerd::{Containerd, Namespace, record::Record},
    journal,
};

/// How long the killed task of a container that has left may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Between two attempts.
const AGAIN: Duration = Duration::from_secs(1);

/// One of them.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Departed {
    namespace: String,
    id: String,
    /// When its record was made: another container of that name is not it.
    created: Option<(i64, i32)>,
    /// It had a task.
    task: bool,
    /// It was moved without memory.
    cold: bool,
}

impl Departed {
    fn path(namespace: &str, id: &str) -> PathBuf {
        journal::dir("departed").join(key(namespace, id) + ".json")
    }

    /// Whether that container has left and is still being removed.
    pub fn is(namespace: &str, record: &Record) -> bool {
        let noted: Option<Departed> = journal::read(&Departed::path(namespace, &record.id));
        noted.is_some_and(|d| d.created == record.created)
    }

    /// Removes all of it; the record last, by which it is found again.
    async fn remove(&self, containerd: &Namespace) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let record = containerd.container(&self.id).await?;
        if let Some(record) = record.filter(|r| r.created == self.created) {
            if self.task {
                containerd.task_remove(&self.id, END_LIMIT).await?;
            }
            // containerd may have been away ever since it came
            if let Some(mut placed) = Placed::load(&self.namespace, &self.id) {
                placed.release_at_last(containerd).await?;
            }
            containerd.snapshot_remove(&record.snapshotter, &record.snapshot_key).await?;
            if self.cold {
                let placed = Placed::load(&self.namespace, &self.id);
                tokio::task::spawn_blocking(move || placed.map_or(Ok(()), |p| p.remove()))
                    .await
                    .context("a thread")??;
            } else {
                let mut others = containerd.container_list().await?;
                others.retain(|o| o.id != self.id);
                let namespace = self.namespace.clone();
                let release = move || netns::release(&namespace, &record, &others);
                notes = tokio::task::spawn_blocking(release).await.context("a thread")?;
            }
            containerd.container_delete(&self.id).await?;
        }
        let path = Departed::path(&self.namespace, &self.id);
        tokio::task::spawn_blocking(move || journal::remove(&path)).await.context("a thread")??;
        Ok(notes)
    }

    /// Tries until it is done.
    async fn pursue(self, containerd: Namespace) {
        loop {
            tokio::time::sleep(AGAIN).await;
            match self.remove(&containerd).await {
                Ok(notes) => {
                    log::info!(
                        "{}/{} has left; nothing of it is here any more {notes:?}",
                        self.namespace,
                        self.id
                    );
                    return;
                }
                Err(error) => {
                    log::debug!("removing {}/{}, which has left: {error:#}", self.namespace, self.id)
                }
            }
        }
    }
}

/// Removes what is left here of a container that is gone. What cannot be removed now is tried again until it is. Returns what the operator
/// should know.
pub async fn clean_up(containerd: &Namespace, record: &Record, task: bool, cold: bool) -> Vec<String> {
    let departed = Departed {
        namespace: containerd.name().to_owned(),
        id: record.id.clone(),
        created: record.created,
        task,
        cold,
    };
    let mut notes = Vec::new();
    let (path, note) = (Departed::path(&departed.namespace, &departed.id), departed.clone());
    let noted = tokio::task::spawn_blocking(move || journal::write(&path, &note)).await.context("a thread");
    if let Err(error) = noted.and_then(|written| written) {
        notes.push(format!("{error:#}"));
    }
    match departed.remove(containerd).await {
        Ok(more) => notes.extend(more),
        Err(error) => {
            notes.push(format!("left on this node, and tried again until it is gone: {error:#}"));
            tokio::spawn(departed.pursue(containerd.clone()));
        }
    }
    notes
}

/// Removes at once what is still here of an earlier container of this name that has left, if it can be done by now.
pub async fn hurry(containerd: &Namespace, id: &str) {
    let noted: Option<Departed> = journal::read(&Departed::path(containerd.name(), id));
    let Some(departed) = noted else { return };
    if let Err(error) = departed.remove(containerd).await {
        log::debug!("removing {}/{id}, which has left: {error:#}", containerd.name());
    }
}

/// Goes on with what an earlier agent had not finished.
///
/// # Errors
/// containerd does not know the namespace of one.
pub fn resume(containerd: &Containerd) -> Result<()> {
    for departed in journal::all::<Departed>(&journal::dir("departed")) {
        log::info!("leftover: {}/{} has left; removing what is still here", departed.namespace, departed.id);
        let namespace = containerd.namespace(&departed.namespace)?;
        tokio::spawn(departed.pursue(namespace));
    }
    Ok(())
}
