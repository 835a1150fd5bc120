//! Network namespaces of containers that come and go, and what this node remembers of containers that came.
//!
//! A container that arrives gets a network namespace made for it, and perhaps FIFOs. Whoever deletes it later with
//! containerd's own tools knows nothing of these: [`Placed`] remembers them, and the agent removes them when containerd
//! tells of the deletion, or at its next start.

use std::{
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::spec::{self, SpecNamespace};
use crate::{
    containerd::record::Record,
    control::RUN_DIR,
    net::{self, Attach, NetConfig},
};

/// Whether a network has links that need a bridge on the node.
pub fn has_links(net: &NetConfig) -> bool {
    net.links.iter().any(net::config::Link::needs_attachment)
}

/// Reads the network of a container whose init has this pid; blocking.
pub fn capture(pid: u32) -> Result<NetConfig> {
    let netns = fs::File::open(format!("/proc/{pid}/ns/net"))
        .with_context(|| format!("the network namespace of process {pid}"))?;
    net::capture(netns.as_fd()).context("reading the container's network")
}

/// Whether a process is in this agent's own network namespace, which is the node's.
pub fn is_host(pid: u32) -> bool {
    let inode = |path: String| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let host = inode("/proc/self/ns/net".into());
    host.is_some() && inode(format!("/proc/{pid}/ns/net")) == host
}

/// Builds a network at `path`, fenced; blocking.
pub fn build(config: &NetConfig, path: &Path, bridge: Option<&str>) -> Result<()> {
    let attach = Attach { bridge: bridge.map(str::to_string), ..Attach::default() };
    net::build(config, path, &attach).with_context(|| format!("building the network {}", path.display()))
}

/// Where a container's network namespace is made that had none with a name on its source.
pub fn own_path(namespace: &str, id: &str) -> PathBuf {
    Path::new("/run/netns").join(format!("transship-{}", &key(namespace, id)[..12]))
}

/// Where the FIFOs of a container are.
pub fn fifo_dir(namespace: &str, id: &str) -> PathBuf {
    Path::new(RUN_DIR).join("fifo").join(key(namespace, id))
}

fn key(namespace: &str, id: &str) -> String {
    let hash = Sha256::digest(format!("{namespace}/{id}"));
    hash[..16].iter().map(|b| format!("{b:02x}")).collect()
}

/// What this node keeps for a container that came from another one.
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
    /// The network namespace made for it.
    pub netns: Option<PathBuf>,
    /// The directory of FIFOs made for it.
    pub fifos: Option<PathBuf>,
}

impl Placed {
    fn path(namespace: &str, id: &str) -> PathBuf {
        Path::new(RUN_DIR).join("placed").join(key(namespace, id) + ".json")
    }

    /// What is remembered of a container; `None` if it did not come from another node.
    pub fn load(namespace: &str, id: &str) -> Option<Placed> {
        serde_json::from_slice(&fs::read(Placed::path(namespace, id)).ok()?).ok()
    }

    /// All of them.
    pub fn all() -> Vec<Placed> {
        let dir = fs::read_dir(Path::new(RUN_DIR).join("placed"));
        let files = dir.into_iter().flatten().flatten();
        files.filter_map(|f| serde_json::from_slice(&fs::read(f.path()).ok()?).ok()).collect()
    }

    /// Remembers it.
    pub fn save(&self) -> Result<()> {
        let path = Placed::path(&self.namespace, &self.id);
        let staged = path.with_extension("new");
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(&staged, serde_json::to_vec(self)?)?;
            fs::rename(&staged, &path)
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Removes what was made for the container, and the memory of it; blocking. Fine if it is gone.
    pub fn remove(&self) -> Result<()> {
        if let Some(netns) = &self.netns {
            net::destroy(netns).with_context(|| format!("removing the network {}", netns.display()))?;
        }
        if let Some(fifos) = &self.fifos {
            gone(fs::remove_dir_all(fifos)).with_context(|| format!("removing {}", fifos.display()))?;
        }
        let path = Placed::path(&self.namespace, &self.id);
        gone(fs::remove_file(&path)).with_context(|| format!("removing {}", path.display()))
    }
}

/// Announces the addresses of the container that came by this migration, if it is still here.
pub async fn announce_again(migration: &str) {
    let Some(path) = Placed::all().into_iter().find(|p| p.migration == migration).and_then(|p| p.netns)
    else {
        return;
    };
    let announced = tokio::task::spawn_blocking(move || {
        let netns = net::open(&path)?;
        let config = net::capture(netns.as_fd())?;
        net::announce(netns.as_fd(), &config)
    });
    if let Ok(Err(error)) = announced.await {
        log::warn!("announcing the addresses of migration {migration} again: {error:#}");
    }
}

/// Success also where there was nothing.
pub fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the network namespace of a container that has left this node; blocking. `others`: all other containers of the
/// node. Returns what the operator should know.
///
/// A namespace with a name may have been made by the user. It has moved along, with its addresses: left here it would
/// answer for them. So it goes too, unless another container or process is in it.
pub fn release(namespace: &str, record: &Record, others: &[Record]) -> Vec<String> {
    let mut notes = Vec::new();
    let placed = Placed::load(namespace, &record.id);
    let made_here = placed.as_ref().and_then(|p| p.netns.clone());
    if let Some(placed) = placed
        && let Err(error) = placed.remove()
    {
        notes.push(format!("{error:#}"));
    }
    let SpecNamespace::At(path) = spec::namespace(&record.spec, "network") else { return notes };
    if made_here.as_deref() == Some(&path) || !path.exists() {
        return notes;
    }
    let shared =
        others.iter().find(|o| spec::namespace(&o.spec, "network") == SpecNamespace::At(path.clone()));
    if let Some(other) = shared {
        notes.push(format!(
            "the network namespace {} stays: container {} has it too",
            path.display(),
            other.id
        ));
        return notes;
    }
    if let Some(pid) = user_of(&path) {
        notes.push(format!("the network namespace {} stays, fenced: process {pid} is in it", path.display()));
        return notes;
    }
    match net::destroy(&path) {
        Ok(()) => {
            notes.push(format!("the network namespace {} moved along and is gone here", path.display()))
        }
        Err(error) => notes.push(format!("the network namespace {} is left: {error:#}", path.display())),
    }
    notes
}

/// A process in the namespace at `path`.
fn user_of(path: &Path) -> Option<u32> {
    let wanted = fs::metadata(path).ok().map(|m| m.ino())?;
    let entries = fs::read_dir("/proc").ok()?.flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.ino() == wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_differ() {
        let (a, b) = (own_path("default", "a"), own_path("default", "b"));
        assert_ne!(a, b);
        assert_eq!(a.file_name().unwrap().len(), "transship-".len() + 12);
        assert_ne!(fifo_dir("a", "b/c"), fifo_dir("a/b", "c-"));
    }

    #[test]
    fn own_namespace_is_the_hosts() {
        assert!(is_host(std::process::id()));
        assert!(!is_host(u32::MAX));
        let own = fs::metadata("/proc/self/ns/net").unwrap();
        assert!(own.ino() > 0);
        assert!(user_of(Path::new("/proc/self/ns/net")).is_some());
    }
}
