//! CRIU's images from another node or from a file, looked at before CRIU restores from them.
//!
//! CRIU believes its images: it is made to bring back what it has dumped itself. It runs as root, and gives the tasks the credentials,
//! namespaces and mounts that the images name, whatever runc's spec says. So the images must not say more than the spec, which
//! [`crate::policy`] has judged.
//!
//! | file | what lives there |
//! |---|---|
//! | `image` | an image's entries |
//! | `tasks` | namespaces, credentials, filters, scheduling of every task and thread |
//! | `mounts` | the mount table |
//! | `files` | kinds of open files |
//! | `cgroups` | where tasks are to be put |
//!
//! # What is looked at
//!
//! - Only files that a dump of ours has, by name. Not taken: `apparmor.img` (CRIU would load policies into the kernel), `binfmt-misc*`
//!   (programs that the kernel starts for the whole node), firewall rules and links (fed to programs), the per-kind files of old versions
//!   (what they say would stand beside `files.img`).
//! - Every task is in mount, pid, ipc and uts namespaces of its own, and in a network that is not the node's; the first is pid 1 in them. CRIU
//!   makes a namespace when a task's number differs from its own in `inventory.img`; an image in which they are equal would have restored the
//!   tasks in the node's namespaces. IDs are mapped as in the spec.
//! - No capability beyond the spec's, in any set of any thread. A seccomp filter where the spec has one. The AppArmor profile or SELinux
//!   label of the spec, and no policy data. No real-time scheduling, no `oom_score_adj` below the policy's.
//! - The mount table: file systems of the spec at the places of the spec; no bind mount of any other place (its source is a path that CRIU
//!   follows outside of the container, links included); read-only what the spec wants read-only; every masked path of the spec that exists on this
//!   node is masked, and not under another mount; no link of the writable layer on a mount's way. Not for a container to which the policy gives
//!   `CAP_SYS_ADMIN`: it may have made mounts of its own.
//! - Kinds of open files that a container without certain capabilities cannot have made: packet and raw sockets, BPF maps, fanotify,
//!   tunnels; and never descriptors from outside.
//! - No cgroup paths, but for a container with a cgroup namespace of its own; there none that leads up, and no release agent.
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
//! - Of a seccomp filter only its being there is checked, not what it says.
//! - Limits (rlimits), nice values, timers and pending signals are as the image has them.
//! - CRIU's own decoders run as root over all of it.

mod cgroups;
mod files;
mod image;
mod mounts;
mod tasks;
#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize as _;

use crate::policy::{Policy, model::Spec, process};

/// A container about to be restored.
pub struct Subject<'a> {
    /// The directory of images.
    pub images: &'a Path,
    /// The bundle, with config.json; its `rootfs` is mounted.
    pub bundle: &'a Path,
    /// This node's policy.
    pub policy: &'a Policy,
    /// CRIU restores inside the container's network namespace.
    pub in_netns: bool,
}

/// Names of images, without numbers.
const NAMES: [&str; 45] = [
    "cgroup.img",
    "core-#.img",
    "cpuinfo.img",
    "descriptors.json",
    "eventpoll-tfd.img",
    "fanotify-mark.img",
    "fdinfo-#.img",
    "fifo-data.img",
    "filelocks.img",
    "files.img",
    "fs-#.img",
    "ghost-file-#.img",
    "ids-#.img",
    "inotify-wd.img",
    "inventory.img",
    "ipcns-msg-#.img",
    "ipcns-sem-#.img",
    "ipcns-shm-#.img",
    "ipcns-var-#.img",
    "itimers-#.img",
    "memfd.img",
    "mm-#.img",
    "mountpoints-#.img",
    "netns-#.img",
    "pagemap-#.img",
    "pagemap-shmem-#.img",
    "pages-#.img",
    "pidns-#.img",
    "pipes-data.img",
    "posix-timers-#.img",
    "pstree.img",
    "remap-fpath.img",
    "rlimit-#.img",
    "seccomp.img",
    "sigacts-#.img",
    "signal-p-#.img",
    "signal-s-#.img",
    "sk-queues.img",
    "tcp-stream-#.img",
    "timens-#.img",
    "tmpfs-#.tar.gz.img",
    "tmpfs-dev-#.tar.gz.img",
    "tty-data.img",
    "tty-info.img",
    "utsns-#.img",
];

/// More of them, that only some containers have.
const RARE: [&str; 5] =
    ["userns-#.img", "bpfmap-data.img", "bpfmap-file.img", "stats-dump", "pages-shmem-#.img"];

/// A bundle's spec.
pub fn spec(bundle: &Path) -> Result<serde_json::Value> {
    let config = bundle.join("config.json");
    let text = std::fs::read(&config).with_context(|| format!("reading {}", config.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("reading {}", config.display()))
}

/// Looks at the images; for a container whose spec the policy allows.
///
/// # Errors
/// What they say that the spec does not, and which key of the policy would allow it.
pub fn check(subject: &Subject<'_>) -> Result<()> {
    let json = spec(subject.bundle)?;
    let spec = Spec::deserialize(&json).context("the container's spec")?;
    names(subject.images)?;
    let caps = Caps::of(&spec);
    tasks::check(subject, &spec, caps)?;
    files::check(subject.images, caps)?;
    cgroups::check(subject.images, &spec)?;
    if !caps.has("CAP_SYS_ADMIN") {
        mounts::check(subject, &spec)?;
    }
    Ok(())
}

/// The name of an image with `#` in place of a number.
fn kind_of(name: &str) -> String {
    let Some((start, end)) = name.rsplit_once('-').and_then(|(start, rest)| {
        let (number, end) = rest.split_once('.')?;
        // no word among the names is made of such digits alone
        let fine = !number.is_empty() && number.bytes().all(|b| b.is_ascii_hexdigit());
        fine.then_some((start, end))
    }) else {
        return name.into();
    };
    format!("{start}-#.{end}")
}

fn names(images: &Path) -> Result<()> {
    for entry in std::fs::read_dir(images).with_context(|| format!("reading {}", images.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let kind = entry.file_type()?;
        // content of tmpfs files, which was put there by ourselves
        if kind.is_dir() && name == "staged" {
            continue;
        }
        let known = kind_of(&name.to_string_lossy());
        let fine = kind.is_file() && (NAMES.contains(&known.as_str()) || RARE.contains(&known.as_str()));
        ensure!(fine, "the checkpoint has an image {name:?}, which a container's has not");
    }
    Ok(())
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
