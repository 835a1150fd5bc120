//! Network namespaces of containers that come and go.

use std::{
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{
    placed::Placed,
    spec::{self, SpecNamespace},
};
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
    let attach = Attach { bridge: bridge.map(str::to_string) };
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

/// A short name for a container, for files.
pub fn key(namespace: &str, id: &str) -> String {
    let hash = Sha256::digest(format!("{namespace}/{id}"));
    hash[..16].iter().map(|b| format!("{b:02x}")).collect()
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
            "the network namespace {} stays, fenced: container {} has it too",
            path.display(),
            other.id
        ));
        return notes;
    }
    // tasks whose shim has died may need a moment to go
    let mut user = user_of(&path);
    for _ in 0..30 {
        if user.is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        user = user_of(&path);
    }
    if let Some(pid) = user {
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
    user_besides(path, &[])
}

/// A process in the network namespace of `pid` that is not one of `own`: fencing or moving the namespace would cut it off.
pub fn shared_with(pid: u32, own: &[u32]) -> Option<u32> {
    user_besides(Path::new(&format!("/proc/{pid}/ns/net")), own)
}

fn user_besides(path: &Path, own: &[u32]) -> Option<u32> {
    let wanted = fs::metadata(path).ok().map(|m| m.ino())?;
    let entries = fs::read_dir("/proc").ok()?.flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| !own.contains(pid))
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
        let me = std::process::id();
        assert_ne!(shared_with(me, &[me]), Some(me));
    }
}
