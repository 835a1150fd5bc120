//! Image records, and which blobs one image needs on one platform.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, bail, ensure};
use containerd_client::{
    services::v1::{
        CreateImageRequest, DeleteImageRequest, GetImageRequest, Image, images_client::ImagesClient,
    },
    types::Descriptor as ProtoDescriptor,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    client::{Asked, MAX_MESSAGE, Namespace, found, gone},
    content::check_digest,
};

/// The largest index, manifest or config that is read, in bytes. containerd's own limit for them is 8 MiB.
const MAX_DOCUMENT: usize = 8 << 20;
/// How deep indexes may lie in one another.
const MAX_DEPTH: usize = 4;
/// The most manifests and layers looked at.
const MAX_ENTRIES: usize = 1024;

/// What the OCI image format calls a descriptor.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// For which platform (in an index).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Annotations; some of them are labels of the snapshot unpacked from a layer.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// See [`Descriptor::platform`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Platform {
    /// `linux`
    pub os: String,
    /// `amd64`, `arm64`, ...
    pub architecture: String,
}

impl From<ProtoDescriptor> for Descriptor {
    fn from(d: ProtoDescriptor) -> Self {
        Descriptor {
            media_type: d.media_type,
            digest: d.digest,
            size: d.size.max(0) as u64,
            platform: None,
            annotations: d.annotations.into_iter().collect(),
        }
    }
}

impl From<Descriptor> for ProtoDescriptor {
    fn from(d: Descriptor) -> Self {
        ProtoDescriptor {
            media_type: d.media_type,
            digest: d.digest,
            size: d.size as i64,
            annotations: d.annotations.into_iter().collect(),
        }
    }
}

/// An image's record.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct ImageRecord {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its index or manifest.
    pub target: Descriptor,
}

/// A blob and the labels that make it keep others.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Blob {
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// `containerd.io/gc.ref.content.*`, as containerd's own import sets them.
    pub labels: BTreeMap<String, String>,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The (compressed) blob.
    pub blob: Descriptor,
    /// The digest of its content.
    pub diff_id: String,
    /// The chain id of this layer and all below it: its snapshot's name.
    pub chain_id: String,
}

/// All that one image needs on one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closure {
    /// Every blob, children before their parents; the target is the last.
    pub blobs: Vec<Blob>,
    /// The config's digest.
    pub config: String,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
}

impl Closure {
    /// The name of the snapshot that a container's writable layer lies on.
    pub fn chain_id(&self) -> &str {
        self.layers.last().map_or("", |l| &l.chain_id)
    }
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Chain ids of layers with these content digests (image-spec, config.md, "Layer ChainID").
pub fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(below) => digest_of(format!("{below} {diff_id}").as_bytes()),
        });
    }
    chain
}

/// The SHA-256 digest of some bytes, in the form of the OCI formats.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>())
}

/// This machine's architecture in the words of Go and OCI.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// The labels by which a parent keeps its children (containerd's `images.ChildGCLabels`).
fn gc_labels(document: &Document) -> BTreeMap<String, String> {
    let label =
        |name: String, d: &Descriptor| (format!("containerd.io/gc.ref.content.{name}"), d.digest.clone());
    let manifests = document.manifests.iter().enumerate().map(|(i, d)| label(format!("m.{i}"), d));
    let config = document.config.iter().map(|d| label("config".into(), d));
    let layers = document.layers.iter().enumerate().map(|(i, d)| label(format!("l.{i}"), d));
    manifests.chain(config).chain(layers).collect()
}

impl Namespace {
    fn images(&self) -> ImagesClient<containerd_client::tonic::transport::Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// An image's record; `None` if there is none of that name.
    pub async fn image(&self, name: &str) -> Result<Option<ImageRecord>> {
        let request = self.request(GetImageRequest { name: name.into() });
        let answer = self.images().get(request).await.asked(|| format!("reading image {name}"));
        Ok(found(answer)?.and_then(|a| a.image).map(|image| ImageRecord {
            name: image.name,
            labels: image.labels.into_iter().collect(),
            target: image.target.unwrap_or_default().into(),
        }))
    }

    /// Makes an image's record.
    pub async fn image_create(&self, image: ImageRecord) -> Result<()> {
        let name = image.name.clone();
        let image = Image {
            name: image.name,
            labels: image.labels.into_iter().collect::<HashMap<_, _>>(),
            target: Some(image.target.into()),
            ..Default::default()
        };
        let request = self.request(CreateImageRequest { image: Some(image), source_date_epoch: None });
        self.images().create(request).await.asked(|| format!("creating image {name}"))?;
        Ok(())
    }

    /// Deletes an image's record; fine if there is none.
    pub async fn image_delete(&self, name: &str) -> Result<()> {
        let request = self.request(DeleteImageRequest { name: name.into(), sync: false, target: None });
        gone(self.images().delete(request).await.asked(|| format!("deleting image {name}")))
    }

    /// The blobs that an image needs. `chain`: the snapshot that a container of it lies on, which tells among the
    /// manifests of an index; without it this machine's platform does.
    ///
    /// # Errors
    /// A blob is missing in the content store, or none of the image's manifests belongs to `chain` or to this platform.
    pub async fn image_closure(&self, target: &Descriptor, chain: Option<&str>) -> Result<Closure> {
        let mut walk = Walk::default();
        let mut queue = vec![(target.clone(), Vec::new())];
        let mut first = None;
        while let Some((descriptor, above)) = queue.pop() {
            ensure!(above.len() < MAX_DEPTH, "the image's indexes lie too deep in one another");
            walk.count += 1;
            ensure!(walk.count <= MAX_ENTRIES, "the image has too many manifests");
            let is_target = above.is_empty();
            let Some(document) = self.document(&descriptor, is_target).await? else { continue };
            let mut path: Vec<Blob> = above;
            path.insert(
                0,
                Blob {
                    digest: descriptor.digest.clone(),
                    size: descriptor.size,
                    labels: gc_labels(&document),
                },
            );
            if let Some(config) = &document.config {
                let closure = self.manifest_closure(&document, config, path).await;
                let closure = match closure {
                    Ok(closure) => closure,
                    Err(error) => {
                        walk.problem.get_or_insert(error);
                        continue;
                    }
                };
                match chain {
                    Some(chain) if closure.chain_id() == chain => return Ok(closure),
                    Some(_) => walk.others = true,
                    None => first = first.or(Some(closure)),
                }
                continue;
            }
            let fits = |d: &&Descriptor| {
                chain.is_some()
                    || d.platform.as_ref().is_none_or(|p| p.os == "linux" && p.architecture == architecture())
            };
            // the last in is looked at first
            for manifest in document.manifests.iter().filter(fits).rev() {
                queue.push((manifest.clone(), path.clone()));
            }
        }
        match (first, walk.problem, walk.others) {
            (Some(closure), _, _) => Ok(closure),
            (None, Some(problem), _) => Err(problem),
            (None, None, true) => bail!(
                "the image has changed since the container was made: its name now means layers that the container does not lie on"
            ),
            (None, None, false) => bail!("no manifest of the image fits this platform"),
        }
    }

    /// An index or manifest; `None` if it is not here, which only the target may not be: an index also lists platforms
    /// that nobody has fetched.
    async fn document(&self, descriptor: &Descriptor, must: bool) -> Result<Option<Document>> {
        check_digest(&descriptor.digest)?;
        if !must && self.blob_info(&descriptor.digest).await?.is_none() {
            return Ok(None);
        }
        let bytes = self.blob(&descriptor.digest, MAX_DOCUMENT).await?;
        let document: Document =
            serde_json::from_slice(&bytes).with_context(|| format!("manifest {}", descriptor.digest))?;
        let entries = document.manifests.len() + document.layers.len();
        ensure!(entries <= MAX_ENTRIES, "manifest {} has {entries} entries", descriptor.digest);
        Ok(Some(document))
    }

    async fn manifest_closure(
        &self,
        document: &Document,
        config: &Descriptor,
        path: Vec<Blob>,
    ) -> Result<Closure> {
        check_digest(&config.digest)?;
        let bytes = self.blob(&config.digest, MAX_DOCUMENT).await.context("the image's config")?;
        let parsed: Config = serde_json::from_slice(&bytes).context("the image's config")?;
        let diff_ids = parsed.rootfs.diff_ids;
        ensure!(
            diff_ids.len() == document.layers.len(),
            "the image's config names {} layers, its manifest {}",
            diff_ids.len(),
            document.layers.len()
        );
        let mut blobs = Vec::new();
        let mut layers = Vec::new();
        let chain = chain_ids(&diff_ids);
        let mut seen = BTreeSet::new();
        for ((blob, diff_id), chain_id) in document.layers.iter().zip(diff_ids).zip(chain) {
            check_digest(&blob.digest)?;
            check_digest(&diff_id)?;
            ensure!(
                self.blob_info(&blob.digest).await?.is_some(),
                "layer {} of the image is not in the content store (fetch the image again on this node)",
                blob.digest
            );
            if seen.insert(blob.digest.clone()) {
                blobs.push(Blob { digest: blob.digest.clone(), size: blob.size, labels: BTreeMap::new() });
            }
            layers.push(Layer { blob: blob.clone(), diff_id, chain_id });
        }
        blobs.push(Blob { digest: config.digest.clone(), size: bytes.len() as u64, labels: BTreeMap::new() });
        blobs.extend(path);
        Ok(Closure { blobs, config: config.digest.clone(), layers })
    }
}

#[derive(Default)]
struct Walk {
    count: usize,
    problem: Option<anyhow::Error>,
    others: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains() {
        let ids: Vec<String> = ["a", "b", "c"].iter().map(|s| digest_of(s.as_bytes())).collect();
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], ids[0]);
        assert_eq!(chain[1], digest_of(format!("{} {}", ids[0], ids[1]).as_bytes()));
        assert_eq!(chain[2], digest_of(format!("{} {}", chain[1], ids[2]).as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn labels_like_containerds() {
        let json = r#"{"config":{"digest":"c"},"layers":[{"digest":"x"},{"digest":"y"}]}"#;
        let labels = gc_labels(&serde_json::from_str(json).unwrap());
        let expected = [("config", "c"), ("l.0", "x"), ("l.1", "y")]
            .map(|(k, v)| (format!("containerd.io/gc.ref.content.{k}"), v.to_string()));
        assert_eq!(labels, expected.into());
    }
}
