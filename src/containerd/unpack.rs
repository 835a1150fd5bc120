//! Layers to snapshots.
//!
//! The same steps, names and labels as containerd's own unpacker (`core/unpack/unpacker.go`), so that containers which
//! containerd makes of the image afterwards find the layers, and the garbage collector keeps them with it.

use std::{collections::BTreeMap, time::SystemTime};

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::{ApplyRequest, diff_client::DiffClient};

use super::{
    client::{Asked, Namespace, is_already_exists},
    image::{Closure, Layer},
};

/// Annotations with this prefix become labels of the layer's snapshot.
const INHERITED: &str = "containerd.io/snapshot/";

impl Namespace {
    /// Unpacks what is missing of an image's layers; returns how many were unpacked. `on_layer` is told of each
    /// before its work begins.
    ///
    /// # Errors
    /// A blob is missing or does not contain what the config says, the snapshotter does not exist or failed.
    pub async fn unpack(
        &self,
        snapshotter: &str,
        closure: &Closure,
        mut on_layer: impl FnMut(usize, &Layer),
    ) -> Result<usize> {
        let mut unpacked = 0;
        let mut parent = "";
        for (number, layer) in closure.layers.iter().enumerate() {
            if self.snapshot(snapshotter, &layer.chain_id).await?.is_none() {
                on_layer(number, layer);
                self.unpack_layer(snapshotter, parent, layer)
                    .await
                    .with_context(|| format!("unpacking layer {}", layer.blob.digest))?;
                unpacked += 1;
            }
            parent = &layer.chain_id;
        }
        let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        self.blob_label(&closure.config, &BTreeMap::from([(label, closure.chain_id().to_string())])).await?;
        Ok(unpacked)
    }

    async fn unpack_layer(&self, snapshotter: &str, parent: &str, layer: &Layer) -> Result<()> {
        let mut labels: BTreeMap<_, _> =
            layer.blob.annotations.clone().into_iter().filter(|(k, _)| k.starts_with(INHERITED)).collect();
        labels.insert("containerd.io/snapshot.ref".into(), layer.chain_id.clone());
        let nanos =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
        let key = format!("extract-{nanos}-{} {}", crate::tls::random_hex(3)?, layer.chain_id);
        let mounts = match self.snapshot_prepare(snapshotter, &key, parent, labels.clone()).await {
            // another made it meanwhile, or the snapshotter had it
            Err(error)
                if is_already_exists(&error)
                    && self.snapshot(snapshotter, &layer.chain_id).await?.is_some() =>
            {
                return Ok(());
            }
            other => other?,
        };
        let applied = async {
            let request =
                ApplyRequest { diff: Some(layer.blob.clone().into()), mounts, ..Default::default() };
            let answer = DiffClient::new(self.channel.clone()).apply(self.request(request)).await;
            let diff = answer.asked(|| "applying it".into())?.applied.unwrap_or_default();
            ensure!(
                diff.digest == layer.diff_id,
                "its content has digest {}, the config says {}",
                diff.digest,
                layer.diff_id
            );
            self.snapshot_commit(snapshotter, &layer.chain_id, &key, labels).await
        };
        match applied.await {
            Ok(()) => {
                let uncompressed = ("containerd.io/uncompressed".to_string(), layer.diff_id.clone());
                self.blob_label(&layer.blob.digest, &BTreeMap::from([uncompressed])).await
            }
            Err(error) => {
                if let Err(left) = self.snapshot_remove(snapshotter, &key).await {
                    log::warn!("snapshot {key} of {snapshotter} is left behind: {left:#}");
                }
                if is_already_exists(&error) { Ok(()) } else { Err(error) }
            }
        }
    }
}
