//! Making a container on this node that comes from elsewhere, step by step, with every step undone if it comes to
//! nothing: lease, image, snapshot, network namespace, record, marker, task.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use containerd_client::types::Mount;

use super::{
    config::{Config, StdioPolicy},
    host::{self, HostFacts},
    message::Offer,
    netns,
    placed::{Placed, Step},
    preflight::Situation,
    spec::{self, SpecNamespace},
};
use crate::{
    containerd::{
        Namespace,
        image::{Blob, ImageRecord},
        is_already_exists,
        task::Stdio,
    },
    control::incoming_marker,
    journal,
    policy::{
        self,
        record::{bare_image_name, image_name},
    },
};

/// How long what is being made is kept from containerd's garbage collector, should this agent die.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A container being made here.
#[derive(Debug)]
pub struct Placement<'a> {
    config: &'a Config,
    /// containerd, without the lease.
    plain: Namespace,
    /// containerd, under the lease.
    leased: Namespace,
    /// What is made.
    pub offer: Offer,
    /// The migration's id; the lease is named after it.
    pub migration: String,
    placed: Placed,
    /// Where the output goes, as given to containerd.
    pub stdio: String,
    /// The network namespace that was made.
    pub netns: Option<PathBuf>,
    /// Bytes of memory that it may bring along.
    pub memory_cap: u64,
    /// The root's mounts.
    pub mounts: Vec<Mount>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

impl<'a> Placement<'a> {
    /// Begins with a lease; `from` is the node (or file) the container comes from.
    pub async fn begin(
        config: &'a Config,
        containerd: &Namespace,
        offer: Offer,
        migration: &str,
        from: &str,
    ) -> Result<Placement<'a>> {
        let mut placed = Placed {
            namespace: offer.namespace.clone(),
            id: offer.record.id.clone(),
            from: from.into(),
            migration: migration.into(),
            cold: offer.cold,
            boot: journal::boot(),
            snapshotter: offer.record.snapshotter.clone(),
            snapshot_key: offer.record.snapshot_key.clone(),
            ..Placed::default()
        };
        placed.will(Step::Lease)?;
        let lease = placed.lease();
        if let Err(error) = containerd.lease_create(&lease, LEASE_LIFE).await {
            // nothing but the answer may have been lost
            placed.undo(containerd).await;
            return Err(error);
        }
        Ok(Placement {
            config,
            plain: containerd.clone(),
            leased: containerd.under_lease(&lease)?,
            offer,
            migration: migration.into(),
            placed,
            stdio: String::new(),
            netns: None,
            memory_cap: 0,
            mounts: Vec::new(),
            warnings: Vec::new(),
        })
    }

    /// Takes a step that makes something in containerd: written down first, and not undone if another made it.
    async fn step<T>(&mut self, step: Step, making: impl Future<Output = Result<T>>) -> Result<T> {
        self.placed.will(step.clone())?;
        let made = making.await;
        if made.as_ref().is_err_and(is_already_exists) {
            self.placed.not(&step)?;
        }
        made
    }

    /// containerd, under the lease.
    pub fn containerd(&self) -> &Namespace {
        &self.leased
    }

    fn id(&self) -> &str {
        &self.offer.record.id
    }

    /// The offered blobs that this node lacks.
    pub async fn missing_blobs(&self) -> Result<Vec<Blob>> {
        let mut missing = Vec::new();
        for blob in &self.offer.blobs {
            crate::containerd::content::check_digest(&blob.digest)?;
            if self.leased.blob_info(&blob.digest).await?.is_none() {
                missing.push(blob.clone());
            }
        }
        Ok(missing)
    }

    /// The name under which a blob is written.
    pub fn blob_reference(&mut self, digest: &str) -> Result<String> {
        let reference = format!("transship-{}-{digest}", self.migration);
        self.placed.will(Step::Blob(reference.clone()))?;
        Ok(reference)
    }

    /// Image, layers and the writable snapshot; the blobs must be there.
    pub async fn image_and_snapshot(&mut self, on_layer: impl FnMut(usize, usize)) -> Result<()> {
        let image = self.offer.image.clone();
        let mut on_layer = on_layer;
        let closure = self
            .leased
            .image_closure(&image.target, Some(&self.offer.chain))
            .await
            .with_context(|| format!("image {}", image.name))?;
        self.keep_image(image).await?;
        for blob in closure.blobs.iter().filter(|b| !b.labels.is_empty()) {
            // what refers to what, as the documents say and not as the peer does
            self.leased.blob_label(&blob.digest, &blob.labels).await?;
        }
        let count = closure.layers.len();
        let snapshotter = self.offer.record.snapshotter.clone();
        self.leased.unpack(&snapshotter, &closure, |number, _| on_layer(number, count)).await?;
        let (key, leased) = (self.offer.record.snapshot_key.clone(), self.leased.clone());
        let preparing = leased.snapshot_prepare(&snapshotter, &key, closure.chain_id(), Default::default());
        self.mounts = self.step(Step::Snapshot, preparing).await?;
        Ok(())
    }

    /// The image's record, under a name that takes nothing from this node's own images.
    async fn keep_image(&mut self, mut image: ImageRecord) -> Result<()> {
        let bare = bare_image_name(&image.name, &image.target.digest).to_string();
        let here = self.leased.image(&bare).await?.map(|i| i.target.digest);
        let name = image_name(&self.config.policy, &image.name, &image.target.digest, here.as_deref());
        if here.as_ref().is_some_and(|there| *there != image.target.digest) {
            self.warnings
                .push(format!("the image name {bare} means another image on this node; it is {name} here"));
        }
        self.offer.record.image.clone_from(&name);
        if here.is_some() && name == bare {
            return Ok(());
        }
        image.name = name;
        // what programs of this node are told about an image is this node's business
        image.labels.clear();
        image.target.annotations.clear();
        image.target.platform = None;
        let (step, leased) = (Step::Image(image.name.clone()), self.leased.clone());
        match self.step(step, leased.image_create(image)).await {
            Err(error) if is_already_exists(&error) => Ok(()),
            other => other,
        }
    }

    /// The network namespace, fenced, and the spec's path to it.
    pub async fn network(&mut self) -> Result<()> {
        let Some(net) = self.offer.net.clone() else { return Ok(()) };
        let path = netns_path(&self.offer);
        self.placed.netns = Some(path.clone());
        self.placed.will(Step::Places)?;
        let (bridge, at) = (self.config.bridge.clone(), path.clone());
        tokio::task::spawn_blocking(move || netns::build(&net, &at, bridge.as_deref()))
            .await
            .context("the thread that builds the network")??;
        spec::set_network(&mut self.offer.record.spec, &path);
        self.netns = Some(path);
        Ok(())
    }

    /// The container's record.
    pub async fn container(&mut self) -> Result<()> {
        let (record, leased) = (self.offer.record.clone(), self.leased.clone());
        self.step(Step::Container, leased.container_create(record)).await
    }

    /// The task, which waits in its shim for what comes.
    pub async fn task(&mut self) -> Result<()> {
        self.placed.fifos = Some(netns::fifo_dir(&self.offer.namespace, self.id()));
        self.placed.will(Step::Places)?;
        let stdio = self.prepare_stdio()?;
        let marker = incoming_marker(&self.offer.namespace, self.id());
        self.placed.will(Step::Marker)?;
        write_marker(&marker, &self.migration, self.netns.as_deref())?;
        self.placed.will(Step::Images(self.config.images_dir.join(&self.migration)))?;
        let (id, leased) = (self.id().to_string(), self.leased.clone());
        self.step(Step::Task, leased.task_create(&id, self.mounts.clone(), stdio)).await?;
        let inspected = crate::control::client::inspect(&self.offer.namespace, &id).await?;
        ensure!(
            inspected.status == "incoming",
            "the new shim of {id} does not wait for a container, it is {}",
            inspected.status
        );
        // the shim has taken note of it
        netns::gone(fs::remove_file(&marker)).with_context(|| format!("removing {}", marker.display()))?;
        self.placed.not(&Step::Marker)
    }

    /// Where the streams go: each is there again if it was there on the source, as the restored processes have it open.
    fn prepare_stdio(&mut self) -> Result<Stdio> {
        let [stdin, stdout, stderr] = self.offer.stdio.clone().map(|s| !s.is_empty());
        let (namespace, id) = (self.offer.namespace.clone(), self.id().to_string());
        let fifos = netns::fifo_dir(&namespace, &id);
        let mut stdio = Stdio { terminal: self.offer.terminal, ..Stdio::default() };
        let make = |name: &str| -> Result<String> {
            private_dir(&fifos)?;
            let path = fifos.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))
                .with_context(|| format!("making {}", path.display()))?;
            Ok(path.to_string_lossy().into_owned())
        };
        netns::gone(fs::remove_dir_all(&fifos)).with_context(|| format!("removing {}", fifos.display()))?;
        if stdin {
            stdio.stdin = make("stdin")?;
        }
        let output = match self.config.stdio {
            StdioPolicy::Fifo => None,
            StdioPolicy::Log => {
                ensure!(plain(&namespace) && plain(&id), "{namespace}/{id} cannot be the name of a log file");
                let dir = self.config.log_dir.join(&namespace);
                private_dir(&dir)?;
                Some(format!("file://{}", dir.join(format!("{id}.log")).display()))
            }
        };
        let place = |name: &str| output.clone().map_or_else(|| make(name), Ok);
        if stdout {
            stdio.stdout = place("stdout")?;
        }
        // a terminal has one stream for both
        if stderr && !stdio.terminal {
            stdio.stderr = place("stderr")?;
        }
        self.stdio = if stdio.stdout.is_empty() { stdio.stderr.clone() } else { stdio.stdout.clone() };
        Ok(stdio)
    }

    /// Everything worked: what was made stays. Remembers what is to go with the container.
    pub async fn keep(mut self) -> Result<Vec<String>> {
        self.placed.arrived(&self.plain).await?;
        Ok(std::mem::take(&mut self.warnings))
    }

    /// Nothing came of it: undoes all of it. Returns what could not be undone.
    pub async fn undo(self) -> Vec<String> {
        self.placed.undo(&self.plain).await
    }
}

/// Where a container's network namespace is made here.
pub fn netns_path(offer: &Offer) -> PathBuf {
    let same = match spec::namespace(&offer.record.spec, "network") {
        SpecNamespace::At(path) => spec::safe_netns(&path),
        _ => None,
    };
    same.unwrap_or_else(|| netns::own_path(&offer.namespace, &offer.record.id))
}

/// Looks up what [`super::preflight::check`] needs; `None` for the bridge where the network is not built.
pub async fn situation(config: &Config, containerd: &Namespace, offer: &Offer) -> Result<Situation> {
    let (criu, asked) = (config.criu.clone(), offer.runtime.clone());
    // it is started for its version: none that a peer makes up
    let runtime = config.policy.oci_runtimes.iter().find(|r| **r == asked).cloned();
    let host = tokio::task::spawn_blocking(move || {
        HostFacts::gather(criu.as_deref(), runtime.as_deref().unwrap_or("runc"))
    })
    .await
    .context("a thread")?;
    let record = &offer.record;
    let taken = if containerd.container(&record.id).await?.is_some() {
        Some(format!("a container {} is there already", record.id))
    } else if containerd.task(&record.id).await?.is_some() {
        Some(format!("a task {} is there already", record.id))
    } else {
        None
    };
    let (mut taken, mut snapshotter) = (taken, None);
    match containerd.snapshot(&record.snapshotter, &record.snapshot_key).await {
        Ok(Some(_)) if taken.is_none() => {
            taken = Some(format!("a snapshot {} is there already", record.snapshot_key));
        }
        Ok(_) => {}
        Err(error) => snapshotter = Some(error.root_cause().to_string()),
    }
    let bridge = config.bridge.clone().map(|name| {
        match Path::new("/sys/class/net").join(&name).join("bridge").exists() {
            true => Ok(name),
            false => Err(name),
        }
    });
    let (images_free, images_in_memory) = host::free_space(&config.images_dir)?;
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let netns = netns_path(offer);
    // one that comes cold would be started in that of another
    let named = matches!(spec::namespace(&record.spec, "network"), SpecNamespace::At(_));
    let wanted = if offer.cold { named } else { offer.net.is_some() };
    let sources = spec::host_mounts(&record.spec).into_iter();
    let mounts = sources.map(|m| (m.clone(), policy::host::look(&m, &config.host_mounts))).collect();
    Ok(Situation {
        host,
        taken,
        images_free,
        images_in_memory,
        memory_available: host::mem_available(&meminfo).unwrap_or(u64::MAX),
        snapshotter,
        bridge,
        policy: config.policy.clone(),
        mounts,
        netns_taken: (wanted && netns.exists()).then_some(netns),
    })
}

/// Names of namespaces and containers as containerd allows them: they become names of files.
pub fn plain(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=200).contains(&name.len()) && name.bytes().all(fine) && name.as_bytes()[0].is_ascii_alphanumeric()
}

fn private_dir(dir: &Path) -> Result<()> {
    crate::private::dir(dir)
}

fn write_marker(path: &Path, migration: &str, netns: Option<&Path>) -> Result<()> {
    let Some(dir) = path.parent() else { bail!("{}: no directory", path.display()) };
    private_dir(dir)?;
    let text = serde_json::json!({ "migration_id": migration, "netns": netns }).to_string();
    let write = || -> std::io::Result<()> {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, text.as_bytes())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names() {
        assert!(plain("redis-1.a_b") && plain("k8s.io"));
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ü", ".x"] {
            assert!(!plain(bad), "{bad:?}");
        }
    }
}
