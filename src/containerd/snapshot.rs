//! Snapshots and their mounts.

use std::collections::BTreeMap;

use anyhow::Result;
use containerd_client::{
    services::v1::snapshots::{
        CommitSnapshotRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
        StatSnapshotRequest, UsageRequest, snapshots_client::SnapshotsClient,
    },
    tonic::transport::Channel,
    types::Mount,
};

use super::client::{Asked, MAX_MESSAGE, Namespace, found, gone};

/// What a snapshotter says of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The snapshot it lies on; empty at the bottom.
    pub parent: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl Namespace {
    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A snapshot; `None` if there is none of that key.
    pub async fn snapshot(&self, snapshotter: &str, key: &str) -> Result<Option<SnapshotInfo>> {
        let request = self.request(StatSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() });
        let answer =
            self.snapshots().stat(request).await.asked(|| format!("snapshot {key} of {snapshotter}"));
        let info = found(answer)?.and_then(|a| a.info);
        Ok(info.map(|i| SnapshotInfo { parent: i.parent, labels: i.labels.into_iter().collect() }))
    }

    /// Bytes that an active snapshot holds itself, without its parents.
    pub async fn snapshot_usage(&self, snapshotter: &str, key: &str) -> Result<u64> {
        let request = self.request(UsageRequest { snapshotter: snapshotter.into(), key: key.into() });
        let answer = self.snapshots().usage(request).await;
        Ok(answer.asked(|| format!("the size of snapshot {key} of {snapshotter}"))?.size.max(0) as u64)
    }

    /// The mounts of an active snapshot.
    pub async fn snapshot_mounts(&self, snapshotter: &str, key: &str) -> Result<Vec<Mount>> {
        let request = self.request(MountsRequest { snapshotter: snapshotter.into(), key: key.into() });
        let answer = self.snapshots().mounts(request).await;
        Ok(answer.asked(|| format!("the mounts of snapshot {key} of {snapshotter}"))?.mounts)
    }

    /// Makes an active snapshot; returns its mounts.
    pub async fn snapshot_prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels.into_iter().collect(),
        });
        let answer = self.snapshots().prepare(request).await;
        Ok(answer.asked(|| format!("preparing snapshot {key} of {snapshotter}"))?.mounts)
    }

    /// Turns the active snapshot `key` into the committed one `name`.
    pub async fn snapshot_commit(
        &self,
        snapshotter: &str,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        let request = self.request(CommitSnapshotRequest {
            snapshotter: snapshotter.into(),
            name: name.into(),
            key: key.into(),
            labels: labels.into_iter().collect(),
        });
        let answer = self.snapshots().commit(request).await;
        answer.asked(|| format!("committing snapshot {name} of {snapshotter}"))
    }

    /// Removes a snapshot; fine if there is none.
    pub async fn snapshot_remove(&self, snapshotter: &str, key: &str) -> Result<()> {
        let request =
            self.request(RemoveSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() });
        let answer = self.snapshots().remove(request).await;
        gone(answer.asked(|| format!("removing snapshot {key} of {snapshotter}")))
    }
}
