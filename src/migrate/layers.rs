//! The writable layer in a live migration, on the source: whole while the container runs, then what changed, and in the freeze
//! what changed last. Which that is, [`crate::rootfs::staged`] finds out.

use anyhow::{Context as _, Result};

use super::link::Link;
use super::stream::Sender;
use crate::rootfs::{Staged, Stats, WritableLayer, Writers};

/// A layer on its way.
pub(super) struct Layers {
    layer: WritableLayer,
    staged: Staged,
}

/// What one round brought.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LayerRound {
    /// Bytes of content.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
}

impl From<Stats> for LayerRound {
    fn from(stats: Stats) -> Self {
        LayerRound { bytes: stats.bytes_data, entries: stats.entries }
    }
}

impl Layers {
    pub fn new(layer: &WritableLayer) -> Result<Layers> {
        Ok(Layers { layer: layer.clone(), staged: Staged::new(layer)? })
    }

    /// Whether anything was sent yet.
    pub fn begun(&self) -> bool {
        self.staged.rounds() > 0
    }

    /// Sends a round; `pids` are the tasks, which run.
    pub fn round(&mut self, pids: &[i32], link: &Link) -> Result<LayerRound> {
        let writers = Writers::of_tasks(pids, &self.layer)?;
        let mut sender = Sender::new(link);
        let stats = self.staged.round(&writers, &mut sender).context("reading the writable layer")?;
        sender.layer_end()?;
        Ok(stats.into())
    }

    /// Sends the last round; the tasks are frozen.
    pub fn last(&mut self, pids: &[i32], sender: &mut Sender<'_>) -> Result<LayerRound> {
        let writers = Writers::of_tasks(pids, &self.layer)?;
        let stats = self.staged.last(&writers, sender).context("reading the writable layer")?;
        sender.layer_end()?;
        Ok(stats.into())
    }
}
