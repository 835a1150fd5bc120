//! Does the destination want this container? Every reason against it is found before anything is made. Pure. Which
//! features of a CPU count is said in [`cpu`].

mod cpu;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::PathBuf};

use super::{
    host::HostFacts,
    message::{Offer, Refusal},
    pod,
    spec::{self, SpecNamespace},
};
use crate::{
    containerd::content::check_digest,
    migrate::stream,
    policy::{self, Policy, Violation, host::Source},
};

pub use cpu::missing_features;

/// The most blobs that one image may bring.
const BLOBS: usize = 4096;
/// More memory than this is never restored eagerly.
const EAGER: u64 = stream::EAGER.eager_max + stream::EAGER.hot_max;
/// So many things against a spec are named; the rest is counted.
const NAMED: usize = 5;

/// What the destination looked up before it decides.
#[derive(Clone, Debug, Default)]
pub struct Situation {
    /// This node.
    pub host: HostFacts,
    /// A container, task or snapshot of that name is there; in words.
    pub taken: Option<String>,
    /// Free bytes where images are kept.
    pub images_free: u64,
    /// Images are kept in memory.
    pub images_in_memory: bool,
    /// Memory that can be had, in bytes.
    pub memory_available: u64,
    /// The snapshotter's complaint, if it does not work.
    pub snapshotter: Option<String>,
    /// The configured bridge; `Err`: its name, but it does not exist.
    pub bridge: Option<Result<String, String>>,
    /// What containers may be here.
    pub policy: Policy,
    /// What the folders are that the spec mounts.
    pub mounts: BTreeMap<PathBuf, Source>,
    /// The place for the network namespace is taken.
    pub netns_taken: Option<PathBuf>,
}

impl Situation {
    /// Bytes of memory that a container may bring along, whatever its offer said of them. `by_pages`: they are given to the processes page by
    /// page; a part is left for what else it needs.
    pub fn memory_cap(&self, by_pages: bool) -> u64 {
        let available = self.memory_available;
        self.images_free.min(match by_pages {
            true => available / 11 * 10,
            false if self.images_in_memory => available / 2,
            false => available,
        })
    }
}

/// Decides.
///
/// # Errors
/// The first reason against it.
pub fn check(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    if let Some(taken) = &now.taken {
        return no("name", taken.clone(), "delete it, or move to another node");
    }
    check_spec(offer, now)?;
    let (host, there) = (&now.host, &offer.host);
    if host.arch != there.arch {
        return no(
            "cpu",
            format!("this node is {}, the container runs on {}", host.arch, there.arch),
            "move to a node of the same architecture",
        );
    }
    if let Some(complaint) = &now.snapshotter {
        return no(
            "snapshotter",
            format!("the snapshotter {} does not work here: {complaint}", offer.record.snapshotter),
            "configure it in this node's containerd",
        );
    }
    if offer.cold {
        return Ok(());
    }
    check_live(offer, now)
}

/// Whether a version's major and minor numbers are lower than another's. What is no version is not older.
fn older(version: &str, than: &str) -> bool {
    let numbers = |v: &str| {
        let mut parts = v.split('.').map(|p| p.parse::<u32>().ok());
        Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
    };
    match (numbers(version), numbers(than)) {
        (Some(version), Some(than)) => version < than,
        _ => false,
    }
}

fn check_live(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    let (host, there) = (&now.host, &offer.host);
    if host.page_size != there.page_size {
        return no(
            "cpu",
            format!("pages have {} bytes here and {} there", host.page_size, there.page_size),
            "",
        );
    }
    let missing = missing_features(&host.arch, &there.cpu, &host.cpu);
    if !offer.ignore_cpu && !missing.is_empty() {
        return no(
            "cpu",
            format!("this node's CPU lacks {}, which the processes could be using", missing.join(", ")),
            "move to a node with these features, or take the risk with --ignore-cpu",
        );
    }
    if host.criu.is_empty() {
        return no("criu", "CRIU was not found on this node".into(), "run `transship doctor` there");
    }
    if older(&host.criu, &there.criu) {
        return no(
            "criu",
            format!(
                "CRIU {} of this node is older than {} of the other, whose images it may not understand",
                host.criu, there.criu
            ),
            "install the same CRIU on both nodes",
        );
    }
    if host.runc.is_empty() {
        return no(
            "runtime",
            format!("the runtime {} was not found on this node", offer.runtime),
            "install it, or put it into the PATH of the agent",
        );
    }
    if host.cgroup != there.cgroup {
        return no(
            "cgroup",
            format!("this node has cgroup {}, the other {}", host.cgroup, there.cgroup),
            "boot both nodes with the same cgroup mode",
        );
    }
    match (&now.bridge, &offer.net) {
        (Some(Err(name)), _) => {
            return no(
                "bridge",
                format!("the bridge {name} does not exist on this node"),
                "make it, or correct `bridge` in agent.toml",
            );
        }
        (None, Some(net)) if super::netns::has_links(net) => {
            return no(
                "bridge",
                "this node has no bridge for the container's network".into(),
                "set `bridge` in agent.toml",
            );
        }
        _ => {}
    }
    let images = room(offer.memory, 1);
    if now.images_free < images {
        return no(
            "room",
            format!("the images need about {} where {} are free", mib(images), mib(now.images_free)),
            "make room, or set `images_dir` in agent.toml to a larger tmpfs",
        );
    }
    let memory = memory_needed(offer, now.images_in_memory);
    if now.memory_available < memory {
        return no(
            "memory",
            format!("it needs about {} of memory, {} are available", mib(memory), mib(now.memory_available)),
            "make room on this node, or move to another one",
        );
    }
    Ok(())
}

fn check_spec(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    pod::check(&offer.record)?;
    check_movable(&offer.record.spec)?;
    let against = policy::check(&now.policy, &offer.namespace, &offer.record);
    if !against.is_empty() {
        return Err(refusal(&against));
    }
    check_blobs(offer)?;
    for mount in spec::host_mounts(&offer.record.spec) {
        let what = format!("it mounts {} of the node", mount.display());
        match now.mounts.get(&mount).unwrap_or(&Source::Unlisted) {
            Source::Fine => {}
            Source::Unlisted => {
                return no(
                    "mounts",
                    format!("{what}, which is not allowed on this one"),
                    "list it under `host_mounts` in this node's agent.toml if its content is the same on both",
                );
            }
            Source::Missing => {
                return no(
                    "mounts",
                    format!("{what}, which does not exist on this one"),
                    "make it available here (a shared filesystem, or a copy)",
                );
            }
            Source::Astray(why) => {
                return no(
                    "mounts",
                    format!("{what}, on whose way here is a link below the listed folder ({why})"),
                    "list the folder itself that is meant",
                );
            }
        }
    }
    if offer.net.is_none() && !offer.cold {
        return no("network", "the other node does not say what its network is".into(), "");
    }
    if let Some(path) = &now.netns_taken {
        return no(
            "netns",
            format!("a network namespace {} is there already", path.display()),
            "if nothing uses it, remove it with `ip netns delete`",
        );
    }
    Ok(())
}

/// What the other side is told of things that the policy does not allow.
fn refusal(against: &[Violation]) -> Refusal {
    let mut message: Vec<String> = against.iter().take(NAMED).map(|v| format!("it {}", v.what)).collect();
    if against.len() > NAMED {
        message.push(format!("and {} more", against.len() - NAMED));
    }
    let mut advice: Vec<String> = Vec::new();
    for one in against.iter().take(NAMED).map(Violation::advice) {
        if !advice.contains(&one) {
            advice.push(one);
        }
    }
    Refusal {
        code: "policy".into(),
        message: format!(
            "this node's policy does not allow what the container asks for: {}",
            message.join("; ")
        ),
        advice: advice.join("; "),
    }
}

fn check_blobs(offer: &Offer) -> Result<(), Refusal> {
    let no = |message: String| Err(Refusal { code: "image".into(), message, advice: String::new() });
    if offer.blobs.len() > BLOBS {
        return no(format!("its image has {} blobs", offer.blobs.len()));
    }
    let mut total = 0u64;
    for blob in &offer.blobs {
        if check_digest(&blob.digest).is_err() {
            return no(format!("its image has a blob {:?}", blob.digest));
        }
        match total.checked_add(blob.size).filter(|t| *t <= i64::MAX as u64) {
            Some(sum) => total = sum,
            None => return no(format!("its image has a blob of {} bytes", blob.size)),
        }
    }
    Ok(())
}

/// What no move can do, whatever the destination; the source asks this too, before it dials.
///
/// # Errors
/// The reason.
pub fn check_movable(spec: &serde_json::Value) -> Result<(), Refusal> {
    let no = |code: &str, message: &str, advice: &str| {
        Err(Refusal { code: code.into(), message: message.into(), advice: advice.into() })
    };
    if spec::namespace(spec, "network") == SpecNamespace::Host {
        return no(
            "network",
            "it uses the node's network, whose addresses cannot move",
            "give it a network namespace of its own",
        );
    }
    if spec::namespace(spec, "pid") != SpecNamespace::Own {
        return no(
            "pid",
            "it has no PID namespace of its own, and its PIDs may be taken on another node",
            "give it a PID namespace of its own",
        );
    }
    Ok(())
}

/// Bytes to have free for `memory` bytes, held so many times: a tenth and 16 MiB more, for what else images hold and for
/// what the processes allocate until the freeze.
fn room(memory: u64, times: u64) -> u64 {
    memory.saturating_mul(times).saturating_add(memory / 10).saturating_add(16 << 20)
}

/// Bytes of memory that a container needs here at most. What is restored from images exists beside them until the restore is complete. What
/// is given to the processes page by page leaves the page store as it comes to its place, and never was in an image.
fn memory_needed(offer: &Offer, images_in_memory: bool) -> u64 {
    let images = if images_in_memory { 2 } else { 1 };
    if offer.paged_memory == 0 {
        return room(offer.memory, images);
    }
    // the little that is restored from images nevertheless, because it is so little
    let eager = offer.paged_memory.min(EAGER);
    room(offer.paged_memory.saturating_add(offer.shared_memory), 1)
        .saturating_add(eager)
        .saturating_add(offer.shared_memory.saturating_mul(images - 1))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
