//! Snapshots and their mounts.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, bail};
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

/// The writable directory of a snapshot: overlayfs' upper directory.
///
/// # Errors
/// The snapshotter does not mount one overlay with an upper directory.
pub fn upper_dir(mounts: &[Mount]) -> Result<PathBuf> {
    let [mount] = mounts else { bail!("the snapshot has {} mounts, and not one overlay", mounts.len()) };
    let upper = mount.options.iter().find_map(|o| o.strip_prefix("upperdir="));
    upper
        .filter(|_| mount.r#type == "overlay")
        .map(PathBuf::from)
        .with_context(|| format!("the snapshot is a mount of type {}, and not an overlay", mount.r#type))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_dirs() {
        let options =
            vec!["index=off".into(), "workdir=/w".into(), "upperdir=/u".into(), "lowerdir=/l".into()];
        let overlay = Mount { r#type: "overlay".into(), options, ..Default::default() };
        assert_eq!(upper_dir(std::slice::from_ref(&overlay)).unwrap(), PathBuf::from("/u"));
        let bind = Mount { r#type: "bind".into(), ..overlay.clone() };
        assert!(upper_dir(&[bind]).is_err());
        assert!(upper_dir(&[]).is_err());
    }
}
