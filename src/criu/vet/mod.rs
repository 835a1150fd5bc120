//! CRIU's images from another node, a file or containerd, looked at before CRIU restores from them.
//!
//! CRIU believes its images: it is made to bring back what it has dumped itself. It runs as root, and gives the tasks the credentials,
//! namespaces and mounts that the images name, whatever runc's spec says. So the images must not say more than the spec: one from elsewhere,
//! which [`crate::policy`] has judged, or one that containerd has made here ([`Measure`]).
//!
//! | file | what lives there |
//! |---|---|
//! | `names` | which files may be there, and what runc reads itself |
//! | `local` | a spec of this node's, which may have fields that are new |
//! | `image` | an image's entries |
//! | `tasks`, `namespaces` | namespaces, users, credentials of every task and thread |
//! | `seccomp`, `bpf`, `syscalls` | what their filters let through |
//! | `limits` | their rlimits and priorities |
//! | `mounts` | the mount table |
//! | `files` | kinds of open files |
//! | `cgroups` | where tasks are to be put |
//! | `network` | firewall rules, which programs of the node read |
//!
//! # What is looked at
//!
//! - Only files that a dump has, by name. Not taken: `apparmor.img` (CRIU would load policies into the kernel), `binfmt-misc*` (programs that the
//!   kernel starts for the whole node), `autofs-*`, the per-kind files of CRIU before 3.0 (what they say would stand beside `files.img`). No
//!   links: CRIU follows them, and would restore any file of the node as the container's memory or files.
//! - `descriptors.json` has three entries: for a fourth that names a pipe runc would have CRIU pass its own descriptor 3 to the tasks, and so
//!   on; the folder of images is among them, and `..` leads from there to all of the node.
//! - Every task is in mount, pid, ipc and uts namespaces of its own, and in a network that is not the node's; the first is pid 1 in them. CRIU
//!   makes a namespace when a task's number differs from its own in `inventory.img`; an image in which they are equal would have restored the
//!   tasks in the node's namespaces. IDs are mapped as in the spec.
//! - No capability beyond the spec's, in any set of any thread. With `noNewPrivileges` in the spec no task without it, and without
//!   `CAP_SETUID` and `CAP_SETGID` no user or group but the spec's. The AppArmor profile or SELinux
//!   label of the spec, and no policy data. No `oom_score_adj` below the policy's.
//! - A seccomp filter where the spec has one, which lets no system call through that the spec refuses, in no ABI of the processor: its program is
//!   run for each number, both ways where an argument decides. Shown for containerd's default profile as runc's and crun's libseccomp
//!   make it. A name that the source's libseccomp did not know yet is refused there by a list of what is allowed, but let through by a list of
//!   what is not: such a container is refused here, and has to be started anew.
//! - No rlimit above the spec's, no real-time scheduling, no nice value below 0 (or this node's own): unless by a capability, a limit or a
//!   scheduler of the spec's, or the policy.
//! - The mount table: file systems of the spec at the places of the spec; no bind mount of any other place (its source is a path that CRIU
//!   follows outside of the container, links included); read-only what the spec wants read-only, the root included; folders of the node with
//!   the spec's `nosuid`, `nodev`, `noexec`; every masked path of the spec that exists on this node is masked, and not under another mount; no
//!   link of the writable layer on a mount's way. Not for a container with `CAP_SYS_ADMIN`: it may have made mounts of its own.
//! - Kinds of open files that a container without certain capabilities cannot have made: packet and raw sockets, BPF maps, fanotify,
//!   tunnels; and never descriptors from outside.
//! - Cgroups: none in a dump of ours, but for a container with a cgroup namespace of its own. Elsewhere none that ends up beside the
//!   container's own, no release agent, no names of hierarchies that are options of a mount.
//!
//! # Two kinds of dumps
//!
//! Ours ([`Measure::Policy`]) have what [`crate::criu::options`] asks for: no network, no links, mostly no cgroups. A runtime's
//! ([`Measure::Spec`], what containerd gives the shim for `ctr c restore` or CRI's checkpoint images) have more, and come for specs that our
//! policy would not take from elsewhere: the node's namespaces, a pod's pid namespace, privileges, any file system. Then nothing but the
//! spec counts, because whoever made it here may. Compared with images of runc 1.1, 1.3 and crun 1.28 (CRIU 4.2, cgroup v1) of containers with each
//! of these. What they have and is refused all the same, unless the node's administrator lets it pass: what somebody has changed from outside
//! (`renice`, `prlimit`, mounts); nice values and `oom_score_adj` below 0 that another node's containerd hands down and this one's does not;
//! several cgroups of which none lies above the others; masked paths that this node's kernel has got since.
//!
//! # What confines CRIU anyway
//!
//! runc has put CRIU into the container's cgroup before it restores, device rules included, and gives it the root and the places of bind
//! mounts from the spec, not from the images. Paths of open files, ghost files, sockets and the content of tmpfs are opened after CRIU has
//! pivoted into the container's root: `..` and links end there. A network namespace is entered before it starts.
//!
//! # What remains
//!
//! - CRIU opens the tasks' files with all capabilities. What only a capability guards at the time of opening, and no mount, device rule or
//!   owner, a hostile image can have opened: the kernel's log (`/proc/kmsg`) and addresses (`/proc/kallsyms`). A text check would not do,
//!   as the path may lead through a link of the container's.
//! - Of a seccomp filter the conditions on arguments are not compared: what the spec allows with some, it may allow with any. Processors other
//!   than x86-64 and 64-bit ARM have no tables here: there only the filter's being there is checked.
//! - Timers and pending signals are as the image has them; so are properties of cgroups below the container's own, which are made anew, and
//!   addresses and routes in a network namespace that crun makes anew.
//! - `ctr c restore` takes the spec itself out of the checkpoint: it is then no measure, and containerd does what it says.
//! - CRIU's own decoders run as root over all of it.

mod bpf;
mod cgroups;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod image;
mod limits;
mod local;
mod mounts;
mod names;
mod namespaces;
mod network;
mod seccomp;
mod syscalls;
mod tasks;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_spec;

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize as _;

use crate::policy::{Policy, model::Spec, process};

/// A container about to be restored.
pub struct Subject<'a> {
    /// The directory of images.
    pub images: &'a Path,
    /// The bundle, with config.json; its `rootfs` is mounted.
    pub bundle: &'a Path,
    /// By what they are judged.
    pub measure: Measure<'a>,
}

/// By what images are judged besides the container's spec, and whose dump they should be.
#[derive(Clone, Copy, Debug)]
pub enum Measure<'a> {
    /// A dump of ours, from another node or a file, as the spec is.
    Policy {
        /// This node's policy, which allows the spec.
        policy: &'a Policy,
        /// CRIU restores inside the container's network namespace.
        in_netns: bool,
    },
    /// A dump by an OCI runtime, which containerd passes to a shim. The spec was made here, and is all that counts.
    Spec {
        /// Images of an earlier dump, to which these may refer; or empty.
        parent: &'a str,
    },
}

impl Measure<'_> {
    fn policy(&self) -> Option<&Policy> {
        match self {
            Measure::Policy { policy, .. } => Some(policy),
            Measure::Spec { .. } => None,
        }
    }

    /// The end of a sentence: what would allow it.
    fn allowed_by(&self, key: &str) -> String {
        match self {
            Measure::Policy { .. } => {
                format!("`{key}` in the section [policy] of this node's agent.toml would allow it")
            }
            Measure::Spec { .. } => "the container's spec does not say so".into(),
        }
    }
}

/// A bundle's spec.
pub fn spec(bundle: &Path) -> Result<serde_json::Value> {
    let config = bundle.join("config.json");
    let text = std::fs::read(&config).with_context(|| format!("reading {}", config.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("reading {}", config.display()))
}

/// Looks at the images; for a container whose spec is allowed here.
///
/// # Errors
/// What they say that the spec does not, and which key of the policy would allow it.
pub fn check(subject: &Subject<'_>) -> Result<()> {
    let json = spec(subject.bundle)?;
    let spec = match subject.measure {
        Measure::Policy { .. } => Spec::deserialize(&json),
        // what is new in it is the business of whoever made it here
        Measure::Spec { .. } => Spec::deserialize(local::known(&json)),
    };
    let spec = spec.context("the container's spec")?;
    names::check(subject.images, &subject.measure, &spec)?;
    let caps = Caps::of(&spec);
    tasks::check(subject, &spec, caps)?;
    files::check(subject, &spec, caps)?;
    cgroups::check(subject, &spec, caps)?;
    network::check(subject.images)?;
    mounts::check(subject, &spec, caps)
}

/// Every capability that the spec names, as a mask.
#[derive(Clone, Copy, Debug, Default)]
struct Caps(u64);

impl Caps {
    fn of(spec: &Spec) -> Caps {
        let sets = spec.process.iter().flat_map(|p| &p.capabilities).flat_map(|c| c.sets());
        let names = sets.flat_map(|(_, names)| names);
        Caps(names.filter_map(|n| process::number_of(n)).fold(0, |mask, n| mask | 1 << n))
    }

    fn has(self, name: &str) -> bool {
        process::number_of(name).is_some_and(|n| self.0 & (1 << n) != 0)
    }

    /// The names of those in `mask` that are not here.
    fn missing(self, mask: u64) -> Vec<String> {
        let name = |n: u32| {
            process::ALL.get(n as usize).map_or_else(|| format!("capability {n}"), |n| n.to_string())
        };
        (0..64).filter(|n| mask & !self.0 & (1 << n) != 0).map(name).collect()
    }
}
