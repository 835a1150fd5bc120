//! What this node keeps of containers that came from elsewhere: a small durable file for each ([`crate::journal`]).
//!
//! While the container is being made it is a journal: each step is written down before it is taken, so that an agent that
//! was killed finds on its next start what there is to undo. Afterwards it remembers what was made for the container
//! (network namespace, FIFOs): whoever deletes the container with containerd's own tools knows nothing of these.

use std::{fs, os::unix::net::UnixStream, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::netns::{gone, key};
use crate::{
    containerd::Namespace,
    control::{incoming_marker, socket_path},
    journal, net,
};

/// How long a task that is undone may take to end.
const END_LIMIT: Duration = Duration::from_secs(20);

/// One thing that was made, or was about to be. Undoing what is not there is fine.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The lease under which all of it is made.
    Lease,
    /// A blob being written, by the reference of the attempt.
    Blob(String),
    /// The image's record.
    Image(String),
    /// The writable snapshot.
    Snapshot,
    /// The network namespace, the FIFOs.
    Places,
    /// The container's record.
    Container,
    /// The marker for the shim.
    Marker,
    /// Images, which the shim makes, and removes unless it dies.
    Images(PathBuf),
    /// The task.
    Task,
}

/// See the module.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Placed {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// The node it came from.
    pub from: String,
    /// The migration by which it came.
    pub migration: String,
    /// It was moved without memory: there is no task.
    pub cold: bool,
    /// It has arrived.
    pub complete: bool,
    /// The run of the machine in which it came.
    pub boot: String,
    /// What was made, in order, until it was complete.
    pub steps: Vec<Step>,
    /// The snapshotter that has its writable layer.
    pub snapshotter: String,
    /// The writable layer's key there.
    pub snapshot_key: String,
    /// The network namespace made for it.
    pub netns: Option<PathBuf>,
    /// The directory of FIFOs made for it.
    pub fifos: Option<PathBuf>,
}

impl Placed {
    fn path(namespace: &str, id: &str) -> PathBuf {
        journal::dir("placed").join(key(namespace, id) + ".json")
    }

    /// What is remembered of a container; `None` if it did not come from elsewhere.
    pub fn load(namespace: &str, id: &str) -> Option<Placed> {
        journal::read(&Placed::path(namespace, id)).map(Placed::of_this_boot)
    }

    /// All of them.
    pub fn all() -> Vec<Placed> {
        journal::all(&journal::dir("placed")).into_iter().map(Placed::of_this_boot).collect()
    }

    /// What was made on tmpfs, or ran, before the machine was switched off is gone; what has its name now is somebody else's.
    fn of_this_boot(mut self) -> Placed {
        if self.is_of_another_boot() {
            (self.netns, self.fifos) = (None, None);
            self.steps.retain(|s| !matches!(s, Step::Places | Step::Marker | Step::Images(_)));
        }
        self
    }

    /// It was begun before the machine was switched off.
    pub fn is_of_another_boot(&self) -> bool {
        !self.boot.is_empty() && self.boot != journal::boot()
    }

    /// Writes it down.
    pub fn save(&self) -> Result<()> {
        journal::write(&Placed::path(&self.namespace, &self.id), self)
    }

    /// A step is about to be taken.
    pub fn will(&mut self, step: Step) -> Result<()> {
        if !self.steps.contains(&step) {
            self.steps.push(step);
        }
        self.save()
    }

    /// A step was not taken after all, or needs no undoing any more.
    pub fn not(&mut self, step: &Step) -> Result<()> {
        self.steps.retain(|s| s != step);
        self.save()
    }

    /// The lease under which it was made.
    pub fn lease(&self) -> String {
        format!("transship-{}", self.migration)
    }

    /// The one that came by this migration.
    pub fn by_migration(migration: &str) -> Option<Placed> {
        Placed::all().into_iter().find(|p| p.migration == migration)
    }

    /// It has arrived: what was made for it stays.
    pub async fn arrived(&mut self, containerd: &Namespace) -> Result<()> {
        (self.complete, self.steps) = (true, vec![Step::Lease]);
        self.save()?;
        journal::forget_commit(&self.migration)?;
        self.release(containerd).await
    }

    /// Of a container that has arrived: what was made for it is kept by its record now, no longer by the lease.
    pub async fn release(&mut self, containerd: &Namespace) -> Result<()> {
        containerd.lease_delete(&self.lease(), false).await?;
        self.not(&Step::Lease)
    }

    /// The same if it was not done yet, for one that is about to be forgotten: nobody would find the lease again.
    pub async fn release_at_last(&mut self, containerd: &Namespace) -> Result<()> {
        match self.complete && self.steps.contains(&Step::Lease) {
            true => self.release(containerd).await,
            false => Ok(()),
        }
    }

    /// Removes what was made for the container beside containerd, and the memory of it; blocking. Fine if it is gone.
    pub fn remove(&self) -> Result<()> {
        self.remove_places()?;
        journal::remove(&Placed::path(&self.namespace, &self.id))?;
        journal::forget_commit(&self.migration)
    }

    fn remove_places(&self) -> Result<()> {
        if let Some(netns) = &self.netns {
            net::destroy(netns).with_context(|| format!("removing the network {}", netns.display()))?;
        }
        if let Some(fifos) = &self.fifos {
            gone(fs::remove_dir_all(fifos)).with_context(|| format!("removing {}", fifos.display()))?;
        }
        Ok(())
    }

    /// Undoes each step, the last one first. Returns what could not be undone; that is then still written down.
    pub async fn undo(mut self, containerd: &Namespace) -> Vec<String> {
        let (mut left, mut kept) = (Vec::new(), Vec::new());
        while let Some(step) = self.steps.pop() {
            match self.undo_step(&step, containerd).await {
                Ok(()) => log::debug!("migration {}: undone: {step:?}", self.migration),
                Err(error) => {
                    log::error!("migration {}: left behind: {step:?}: {error:#}", self.migration);
                    left.push(format!("{error:#}"));
                    kept.insert(0, step);
                }
            }
        }
        self.steps = kept;
        let written = if left.is_empty() { self.remove() } else { self.save() };
        left.extend(written.err().map(|error| format!("{error:#}")));
        let result = if left.is_empty() { "undone, nothing is left".into() } else { left.join("; ") };
        log::info!("migration {} of {}/{}: {result}", self.migration, self.namespace, self.id);
        left
    }

    async fn undo_step(&self, step: &Step, containerd: &Namespace) -> Result<()> {
        match step {
            Step::Lease => containerd.lease_delete(&self.lease(), true).await,
            Step::Blob(reference) => containerd.blob_abort(reference).await,
            Step::Image(name) => containerd.image_delete(name).await,
            Step::Snapshot => containerd.snapshot_remove(&self.snapshotter, &self.snapshot_key).await,
            Step::Container => containerd.container_delete(&self.id).await,
            Step::Task => containerd.task_remove(&self.id, END_LIMIT).await,
            Step::Images(dir) => {
                gone(fs::remove_dir_all(dir)).with_context(|| format!("removing {}", dir.display()))?;
                // a shim that was killed leaves its socket; one that lives would still be there for its task
                let socket = socket_path(&self.namespace, &self.id);
                match UnixStream::connect(&socket) {
                    Ok(_) => Ok(()),
                    Err(_) => gone(fs::remove_file(&socket))
                        .with_context(|| format!("removing {}", socket.display())),
                }
            }
            Step::Places => {
                let placed = self.clone();
                tokio::task::spawn_blocking(move || placed.remove_places()).await.context("a thread")?
            }
            Step::Marker => {
                let marker = incoming_marker(&self.namespace, &self.id);
                gone(fs::remove_file(&marker)).with_context(|| format!("removing {}", marker.display()))
            }
        }
    }
}
