//! What a container from another node (or from a checkpoint file) may be on this one: the section `[policy]` of agent.toml, and the checks.
//!
//! The source is believed nothing beyond its container. What it sends is not the container's own doing: a node that somebody has taken over
//! writes records, specs and images as it likes. Whatever would give a container more than the same image and request would get here by
//! `ctr run` without asking for privileges is refused, before anything is made, with the key that would allow it.
//!
//! | file | what lives there |
//! |---|---|
//! | [`config`] | the section `[policy]` and its defaults |
//! | [`model`] | an OCI spec with every field that this version knows; one that it does not know is refused |
//! | [`spec`] | the spec as a whole: root, hooks, annotations, network |
//! | [`process`] | capabilities, labels of LSMs, scheduling, what has to be there |
//! | [`mounts`] | types, options, the node's own folders |
//! | [`linux`] | namespaces, ID maps, devices, cgroups, sysctls, masked paths |
//! | [`record`] | runtime and its options, labels, extensions, names of images and snapshots |
//! | [`host`] | folders of this node, looked at without following anything that a container could have put there |
//!
//! All but [`host`] is pure. Who may connect and offer at all is the agent's business ([`crate::agent`]); what CRIU's images say is looked at in
//! [`crate::criu::vet`], entries of a writable layer in [`crate::rootfs::entry`], a network's description in `net::build`.
//!
//! # What a hostile source could use, and what becomes of it
//!
//! "Never" means that no key allows it.
//!
//! | item | what is allowed by default | key |
//! |---|---|---|
//! | hooks (they run programs of the node) | nothing | never |
//! | fields of the spec that this version does not know, in any spelling (`netDevices`, `Process`) | nothing | never |
//! | `root.path` | `rootfs`, in the bundle | never |
//! | capabilities, all five sets | the 14 of containerd and Docker | `capabilities` |
//! | `noNewPrivileges` off | yes: nothing above the capabilities is won by it | `require` |
//! | seccomp missing or laxer | yes, as with `ctr run` | `require` |
//! | seccomp's `listenerPath`, `SCMP_ACT_NOTIFY` (a socket of the node gets the system calls) | nothing | never |
//! | AppArmor's profile | any that is loaded here; none | `require` |
//! | SELinux labels | `container_t` and `container_init_t` | `selinux_types` |
//! | `oomScoreAdj` below 0 | nothing | `min_oom_score_adj` |
//! | real-time scheduling and I/O; `RLIMIT_NICE`, `RLIMIT_RTPRIO` that allow it | nothing | `realtime` |
//! | other rlimits, cgroup limits missing | yes, as with `ctr run` | |
//! | working directory below /proc (CVE-2024-21626) | nothing | never |
//! | mount types | proc, sysfs, cgroup at their places, sysfs and cgroup read-only; devpts, mqueue, tmpfs | `mount_types`, `privileged` |
//! | folders of the node | those under `host_mounts`; no link below the listed folder is followed | `host_mounts` |
//! | mounts that hand mounts back (`shared`), `rootfsPropagation` | nothing | `shared_mounts` |
//! | `maskedPaths`, `readonlyPaths` removed | nothing | `unmasked_paths` |
//! | namespaces of the node: mount, pid, network | nothing | never |
//! | ipc, uts | nothing | `host_namespaces` |
//! | user, cgroup, time | the node's, as with `ctr run` | `require` |
//! | namespaces by path | network alone: below /run/netns, and made for it here | never |
//! | ID maps | IDs of the node from 65536 on | `host_ids` |
//! | devices and device rules | those that runc gives every container | `devices` |
//! | device nodes in the writable layer | those; any, with `CAP_MKNOD`: the device rules say what can be opened | `devices` |
//! | `cgroupsPath` | `/NAMESPACE/ID`, or a scope of its own under systemd | `cgroup_parents` |
//! | `unified` | limits; not `cgroup.procs` and the like | never |
//! | sysctls | those of namespaces that it has of its own | never |
//! | `intelRdt`, `memoryPolicy`, `execCPUAffinity` | nothing | `realtime` |
//! | annotations (`org.criu.config` names a file that can run programs, `run.oci.*`, `cdi.k8s.io/*`, `org.systemd.property.*`, groups of shims) | `org.opencontainers.image.*` | `annotations` |
//! | labels (`containerd.io/restart.loguri` runs a program: CVE-2026-53488) | all but those that programs of the node act on | `labels` |
//! | extensions of the record, its sandbox | nothing | `extensions`; never |
//! | runtime (a path would be any program) | `io.containerd.transship.v2`, `io.containerd.runc.v2` | `runtimes` |
//! | `BinaryName` (likewise) | `runc`, `crun` | `oci_runtimes` |
//! | `Root`, `CriuPath`, `CriuImagePath`, `CriuWorkPath`, `ShimCgroup`, `IoUid`, `TaskApiAddress`, `NoPivotRoot` | nothing | never |
//! | a file with the runtime's options | nothing | `runtime_configs` |
//! | the image's name (CVE-2026-50195: what others later start under that name would be the source's) | one that is here with the same digest; else `NAME@DIGEST` | `image_names` |
//! | the image's labels | none are taken over | never |
//! | stdio (`binary://` runs a program, `file://` writes anywhere) | only whether a stream is there is taken over | never |
//!
//! # Known holes of others, and we
//!
//! - CVE-2026-50195 (containerd: a checkpoint puts its image under any name): we were open to the same; see the image's name above.
//! - CVE-2026-53488 (containerd: labels of an image reach the restart monitor, which runs `binary://` loggers): we were open to the same.
//! - CVE-2026-53492 (containerd: a checkpoint's annotations `cdi.k8s.io/*` bring devices): annotations, above.
//! - CVE-2026-53489 (containerd follows a link `container.log` in a checkpoint): images are regular files that are made here with `O_EXCL`,
//!   links cannot be sent; the log is the destination's own file.
//! - CVE-2025-31133, -52565, -52881 (runc: masked paths, the console and LSM labels through links in the root): a restore has CRIU make those
//!   mounts, not runc; [`crate::criu::vet`] demands the masks, and that no link of the layer lies on a mount's way. A cold move is started by
//!   whoever starts it, with the same runc as everything else there.
//! - CVE-2026-41579 (runc: `/dev` as a link): the same, and not in a restore.
//!
//! # What remains
//!
//! - The container's own content is the source's: its files, its memory, what it says in its own name. It may take the addresses that it
//!   claims on the segment that the bridge is part of, as any container with `CAP_NET_RAW` can.
//! - A spec that the policy allows need not be the one that the container had on its source. Whoever can offer a container can offer any
//!   that fits the policy.
//! - Between the look at a folder below `host_mounts` and its mount, another container that may write to that folder could replace it by a link.
//!   List folders that containers cannot write to, or whose parents they cannot.
//! - CRIU and runc parse what the source sends, as root. Faults of theirs are not covered by any of this; [`crate::criu::vet`] says what CRIU is
//!   kept from and what it is not.

pub mod config;
pub mod host;
pub mod linux;
pub mod model;
pub mod mounts;
pub mod process;
pub mod record;
pub mod spec;
#[cfg(test)]
pub(crate) mod tests;

pub use config::Policy;

/// One thing that the policy does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What is asked for, as the end of a sentence that begins with "it".
    pub what: String,
    /// The key of `[policy]` that would allow it.
    pub key: Option<&'static str>,
}

impl Violation {
    /// What to do about it.
    pub fn advice(&self) -> String {
        match self.key {
            Some("host_mounts") => "list the folder under `host_mounts` in this node's agent.toml".into(),
            Some(key) => format!("`{key}` in the section [policy] of this node's agent.toml would allow it"),
            None => "no key of this node's policy allows it: make the container without it".into(),
        }
    }
}

/// All that a check has found.
#[derive(Debug, Default)]
pub struct Found(Vec<Violation>);

impl Found {
    /// Not allowed, but `key` would allow it.
    pub(crate) fn unless(&mut self, key: &'static str, what: impl Into<String>) {
        self.0.push(Violation { what: what.into(), key: Some(key) });
    }

    /// Not allowed at all.
    pub(crate) fn never(&mut self, what: impl Into<String>) {
        self.0.push(Violation { what: what.into(), key: None });
    }

    /// What was found, in order.
    pub fn list(self) -> Vec<Violation> {
        self.0
    }
}

/// Everything against a record (with its spec) in this containerd namespace.
pub fn check(policy: &Policy, namespace: &str, record: &crate::containerd::record::Record) -> Vec<Violation> {
    let mut found = Found::default();
    record::check(policy, record, &mut found);
    if record.spec.is_null() {
        found.never("has no spec");
    } else {
        spec::check(policy, namespace, &record.id, &record.spec, &mut found);
    }
    found.list()
}

/// Does a pattern mean this name? `*` at its end means anything.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

/// Is the name in the list?
pub(crate) fn listed<P: AsRef<str>>(list: &[P], name: &str) -> bool {
    list.iter().any(|p| matches(p.as_ref(), name))
}
