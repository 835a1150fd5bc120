//! The part `linux`: namespaces, IDs, devices, cgroups, sysctls, masks.

use serde_json::Value;

use super::config::Required;
use super::model::{DeviceRule, Linux, Seccomp};
use super::{Found, Policy, process};
use crate::agent::spec::safe_netns;

/// What containerd masks, in all the versions that there are; what newer ones add is not demanded of a container made by an older one.
pub const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What it makes read-only.
pub const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices that runc puts into every container, and lets every container use: major and minor numbers of character devices, none for any.
const DEVICES: [(i64, Option<i64>); 10] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
    (10, Some(200)),
];

/// So many devices are named.
const SHOWN: usize = 3;

pub(super) fn check(policy: &Policy, linux: &Linux, found: &mut Found) {
    namespaces(policy, linux, found);
    ids(policy, linux, found);
    devices(policy, linux, found);
    masks(policy, linux, found);
    sysctls(linux, found);
    seccomp(policy, linux.seccomp.as_ref(), found);
    process::selinux(policy, linux.mount_label.as_deref(), found);
    let propagation = linux.rootfs_propagation.as_deref().unwrap_or_default();
    if matches!(propagation, "shared" | "rshared") && !policy.shared_mounts {
        found.unless(
            "shared_mounts",
            format!("hands its mounts back to the node (rootfsPropagation {propagation})"),
        );
    }
    let given = |v: &Option<Value>| v.as_ref().is_some_and(|v| !super::spec::is_empty(v));
    for (there, what) in
        [(given(&linux.intel_rdt), "intelRdt"), (given(&linux.memory_policy), "memoryPolicy")]
    {
        if there && !policy.realtime {
            found.unless("realtime", format!("has a share of the CPU or memory of its own ({what})"));
        }
    }
    let Some(resources) = &linux.resources else { return };
    for name in resources.unified.iter().flatten().map(|(name, _)| name) {
        let limit = ["cpu.", "cpuset.", "hugetlb.", "io.", "memory.", "misc.", "pids.", "rdma."];
        if !limit.iter().any(|l| name.starts_with(l)) || name.contains('/') {
            found.never(format!("writes to {name:?} of its cgroup"));
        }
    }
    let cpu = resources.cpu.as_ref().and_then(Value::as_object);
    // Go takes any spelling
    if cpu
        .into_iter()
        .flatten()
        .any(|(k, v)| k.to_lowercase().starts_with("realtime") && !super::spec::is_empty(v))
        && !policy.realtime
    {
        found.unless("realtime", "has real-time shares of the CPU");
    }
}

fn namespaces(policy: &Policy, linux: &Linux, found: &mut Found) {
    let all = linux.namespaces.as_deref().unwrap_or_default();
    let has = |kind: &str| all.iter().any(|n| n.kind == kind);
    for kind in ["mount", "pid", "network"] {
        if !has(kind) {
            found.never(format!("has no {kind} namespace of its own"));
        }
    }
    for kind in ["ipc", "uts"] {
        if !has(kind) && !policy.host_namespaces.iter().any(|n| n == kind) {
            found.unless("host_namespaces", format!("has no {kind} namespace of its own"));
        }
    }
    if policy.requires(Required::UserNamespace) && !has("user") {
        found.unless("require", "has no user namespace of its own");
    }
    for (at, namespace) in all.iter().enumerate() {
        let kind = namespace.kind.as_str();
        if !matches!(kind, "mount" | "pid" | "network" | "ipc" | "uts" | "user" | "cgroup" | "time") {
            found.never(format!("has a namespace of the unknown kind {kind:?}"));
        }
        if all[..at].iter().any(|n| n.kind == kind) {
            found.never(format!("names two {kind} namespaces"));
        }
        let path = namespace.path.as_deref().unwrap_or_default();
        // that of the network is made here, or is made by whoever starts a container that came cold
        if !path.is_empty() && (kind != "network" || safe_netns(path.as_ref()).is_none()) {
            found.never(format!("joins the {kind} namespace {path}"));
        }
    }
}

fn ids(policy: &Policy, linux: &Linux, found: &mut Found) {
    for (kind, map) in [("user", &linux.uid_mappings), ("group", &linux.gid_mappings)] {
        for ids in map.iter().flatten() {
            if !policy.host_ids.iter().any(|r| r.holds(ids.host_id.into(), ids.size.into())) {
                let (first, last) =
                    (ids.host_id, u64::from(ids.host_id) + u64::from(ids.size).saturating_sub(1));
                found.unless("host_ids", format!("is mapped to this node's {kind} IDs {first} to {last}"));
            }
        }
    }
}

fn devices(policy: &Policy, linux: &Linux, found: &mut Found) {
    if policy.privileged {
        return;
    }
    let number = |path: &std::path::PathBuf| super::host::device(path);
    let allowed: Vec<(char, u64, u64)> = policy.devices.iter().filter_map(number).collect();
    let is_allowed = |kind: &str, major: i64, minor: i64| {
        let kind = if kind == "b" { 'b' } else { 'c' };
        allowed.iter().any(|(k, a, b)| (*k, *a as i64, *b as i64) == (kind, major, minor))
    };
    let mut more = Vec::new();
    for device in linux.devices.iter().flatten() {
        let (kind, path) = (device.kind.as_str(), &device.path);
        let (major, minor) = (device.major.unwrap_or(0), device.minor.unwrap_or(0));
        let plain = path.starts_with("/dev/") && !path.split('/').any(|p| p == "..");
        let fine = kind == "p" || is_default(kind, major, minor) || is_allowed(kind, major, minor);
        if !plain || !fine {
            more.push(format!("{path} ({kind} {major}:{minor})"));
        }
    }
    if !more.is_empty() {
        let rest =
            if more.len() > SHOWN { format!(" and {} more", more.len() - SHOWN) } else { String::new() };
        more.truncate(SHOWN);
        found.unless("devices", format!("has the devices {}{rest}", more.join(", ")));
    }
    let rules = || linux.resources.iter().flat_map(|r| r.devices.iter().flatten());
    let all = |n: Option<i64>| n.is_none_or(|n| n < 0);
    let denies_all = |r: &DeviceRule| {
        !r.allow && matches!(r.kind.as_deref(), None | Some("" | "a")) && all(r.major) && all(r.minor)
    };
    if !rules().any(denies_all) {
        found.unless("devices", "has no rule that denies the devices that it does not name");
    }
    for rule in rules().filter(|r| r.allow) {
        let kind = rule.kind.as_deref().unwrap_or_default();
        let listed = matches!((rule.major, rule.minor), (Some(a), Some(b)) if is_allowed(kind, a, b));
        if !is_harmless(rule) && !listed {
            let number = |n: Option<i64>| n.filter(|n| *n >= 0).map_or("*".to_string(), |n| n.to_string());
            let kind = rule.kind.as_deref().unwrap_or("a");
            let (major, minor) = (number(rule.major), number(rule.minor));
            found.unless("devices", format!("may use the devices {kind} {major}:{minor}"));
        }
    }
}

/// What every container may use: the devices above; and making nodes, which lets nobody open them.
fn is_harmless(rule: &DeviceRule) -> bool {
    let kind = rule.kind.as_deref().unwrap_or("a");
    match (rule.access.as_deref(), rule.major, rule.minor) {
        (Some("m"), _, _) => matches!(kind, "c" | "b"),
        (_, Some(major), minor) => is_default_rule(kind, major, minor.filter(|m| *m >= 0)),
        _ => false,
    }
}

fn is_default_rule(kind: &str, major: i64, minor: Option<i64>) -> bool {
    let any = |(a, b): &(i64, Option<i64>)| *a == major && (b.is_none() || minor.is_some() && *b == minor);
    kind == "c" && DEVICES.iter().any(any)
}

impl Policy {
    /// Which device nodes the writable layer of a container with this spec may have: block device or not, major and minor number.
    ///
    /// One with `CAP_MKNOD`, which is among the default capabilities, can make any node itself: what it can open is what its device rules say.
    pub fn nodes(&self, spec: &Value) -> crate::rootfs::apply::Nodes {
        let sets = spec.pointer("/process/capabilities").and_then(Value::as_object);
        let mut names =
            sets.into_iter().flat_map(|s| s.values()).flat_map(|set| set.as_array().into_iter().flatten());
        if self.privileged || names.any(|n| n == "CAP_MKNOD") {
            return Box::new(|_, _, _| true);
        }
        let listed: Vec<_> = self.devices.iter().filter_map(|path| super::host::device(path)).collect();
        Box::new(move |block, major, minor| {
            let (kind, numbers) = (if block { "b" } else { "c" }, (u64::from(major), u64::from(minor)));
            is_default(kind, major.into(), minor.into())
                || listed.iter().any(|(k, a, b)| (*k == 'b') == block && (*a, *b) == numbers)
        })
    }
}

/// Is it one of the devices that every container has?
fn is_default(kind: &str, major: i64, minor: i64) -> bool {
    matches!(kind, "c" | "u") && is_default_rule("c", major, Some(minor))
}

fn masks(policy: &Policy, linux: &Linux, found: &mut Found) {
    if policy.privileged {
        return;
    }
    let masked = linux.masked_paths.as_deref().unwrap_or_default();
    let readonly = linux.readonly_paths.as_deref().unwrap_or_default();
    let listed = |path: &&str| policy.unmasked_paths.iter().any(|p| p == path);
    for path in MASKED.iter().filter(|p| !masked.iter().any(|m| m == *p) && !listed(p)) {
        found.unless("unmasked_paths", format!("can read {path}, which is not masked"));
    }
    let covered = |p: &str| readonly.iter().chain(masked).any(|m| m == p);
    for path in READONLY.iter().filter(|p| !covered(p) && !listed(p)) {
        found.unless("unmasked_paths", format!("can write to {path}, which is not read-only"));
    }
}

/// runc's own rule, so that it also holds where another runtime is used.
fn sysctls(linux: &Linux, found: &mut Found) {
    let has = |kind: &str| linux.namespaces.iter().flatten().any(|n| n.kind == kind);
    for name in linux.sysctl.iter().flatten().map(|(name, _)| name) {
        let dotted = name.replace('/', ".");
        let plain = !dotted.split('.').any(|p| p.is_empty());
        let ipc =
            ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."].iter().any(|p| dotted.starts_with(p));
        let own = match dotted.as_str() {
            "kernel.domainname" => has("uts"),
            d if d.starts_with("net.") => has("network"),
            d if d.starts_with("user.") => has("user"),
            _ => ipc && has("ipc"),
        };
        if !plain || !own {
            found.never(format!("sets the sysctl {name:?}, which is the whole node's"));
        }
    }
}

fn seccomp(policy: &Policy, seccomp: Option<&Seccomp>, found: &mut Found) {
    let strict = |s: &&Seccomp| {
        matches!(
            &*s.default_action,
            "SCMP_ACT_ERRNO"
                | "SCMP_ACT_KILL"
                | "SCMP_ACT_KILL_THREAD"
                | "SCMP_ACT_KILL_PROCESS"
                | "SCMP_ACT_TRAP"
        )
    };
    if policy.requires(Required::Seccomp) && seccomp.filter(strict).is_none() {
        found.unless("require", "has no seccomp filter that refuses what it does not name");
    }
    let Some(seccomp) = seccomp else { return };
    let empty = |s: &Option<String>| s.as_ref().is_none_or(String::is_empty);
    if !empty(&seccomp.listener_path) || !empty(&seccomp.listener_metadata) {
        found.never("has its system calls answered through a socket of this node (seccomp's listenerPath)");
    }
    let notify = |action: &str| action == "SCMP_ACT_NOTIFY";
    if notify(&seccomp.default_action) || seccomp.syscalls.iter().flatten().any(|s| notify(&s.action)) {
        found.never("has system calls answered by a program of this node (SCMP_ACT_NOTIFY)");
    }
}

/// Where its cgroup is.
pub(super) fn cgroup(policy: &Policy, namespace: &str, id: &str, path: Option<&str>, found: &mut Found) {
    let Some(path) = path.filter(|p| !p.is_empty()) else { return };
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains('/');
    // systemd: SLICE:PREFIX:NAME
    if !path.contains('/')
        && let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..]
    {
        let own = plain(name) && name == id && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let listed = policy.cgroup_parents.iter().any(|p| p.trim_start_matches('/') == slice);
        if !own || !(matches!(slice, "" | "system.slice") || listed) {
            found.unless("cgroup_parents", format!("has the systemd scope {path:?}"));
        }
        return;
    }
    let own = path.rsplit_once('/').is_some_and(|(parent, name)| {
        let listed = policy.cgroup_parents.iter().any(|p| p.trim_end_matches('/') == parent);
        name == id && plain(name) && (parent == format!("/{namespace}") || listed)
    });
    if !own {
        found.unless("cgroup_parents", format!("has the cgroup {path:?} and not one of its own"));
    }
}
