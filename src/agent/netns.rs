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
    identity(Path::new("/proc/self/ns/net")).is_some_and(|host| is_in(pid, host))
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
    users_of(path).first().copied()
}

fn users_of(path: &Path) -> Vec<u32> {
    let Some(namespace) = identity(path) else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_in(*pid, namespace)).collect()
}

/// What tells a namespace from others: its device and inode (namespaces(7)).
type Identity = (u64, u64);

fn identity(path: &Path) -> Option<Identity> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn is_in(pid: u32, namespace: Identity) -> bool {
    identity(Path::new(&format!("/proc/{pid}/ns/net"))) == Some(namespace)
}

/// The processes in a network namespace at one moment. Those of them that are accounted for, or have ended, are struck off; who comes later is
/// not looked for. So a list of a task's processes that was read *after* that moment accounts for all that were the task's by then, however many
/// it forks meanwhile.
pub struct Users {
    path: PathBuf,
    pids: Vec<u32>,
}

impl Users {
    /// Those in the network namespace of `pid`, which goes on living.
    pub fn now(pid: u32) -> Users {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        Users { pids: users_of(&path), path }
    }

    /// The first who is not one of `known`, and is in there still.
    pub fn besides(&mut self, known: &[u32]) -> Option<u32> {
        let namespace = identity(&self.path)?;
        self.pids.retain(|pid| !known.contains(pid) && is_in(*pid, namespace));
        self.pids.first().copied()
    }
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
        assert!(user_of(Path::new("/proc/self/ns/net")).is_some());
    }

    /// What a task that forks without end looks like: there is always somebody who is in no list.
    #[test]
    fn who_was_there_first_is_a_stranger_who_came_later_is_not() {
        let sleeper = || std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let mut stranger = sleeper();
        let mut users = Users::now(std::process::id());
        let mut later = sleeper();
        // all others there are known, whatever they are
        let known: Vec<u32> = users.pids.iter().copied().filter(|pid| *pid != stranger.id()).collect();
        assert!(known.contains(&std::process::id()) && !known.contains(&later.id()));
        assert_eq!(users.besides(&known), Some(stranger.id()));
        // it is remembered who was known
        assert_eq!(users.besides(&[]), Some(stranger.id()));
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert_eq!(users.besides(&[]), None);
        later.kill().unwrap();
        later.wait().unwrap();
    }
}
