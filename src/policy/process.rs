//! The process: capabilities, labels of security modules, scheduling.

use super::config::Required;
use super::model::Process;
use super::{Found, Policy};

/// The capabilities by number (capabilities(7), linux/capability.h).
pub const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Those that containerd and Docker give to every container.
pub const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A capability's number.
pub fn number_of(name: &str) -> Option<u32> {
    ALL.iter().position(|n| *n == name).map(|n| n as u32)
}

/// A process of which nothing is said.
pub(super) fn nothing() -> Process {
    Process::default()
}

pub(super) fn check(policy: &Policy, process: &Process, found: &mut Found) {
    capabilities(policy, process, found);
    if policy.requires(Required::NoNewPrivileges) && process.no_new_privileges != Some(true) {
        found.unless("require", "may gain privileges by setuid programs (noNewPrivileges is off)");
    }
    let profile = process.apparmor_profile.as_deref().unwrap_or_default();
    if policy.requires(Required::Apparmor) && matches!(profile, "" | "unconfined") {
        found.unless("require", "has no AppArmor profile");
    }
    selinux(policy, process.selinux_label.as_deref(), found);
    if let Some(adjust) = process.oom_score_adj.filter(|a| *a < policy.min_oom_score_adj) {
        found.unless("min_oom_score_adj", format!("is spared when memory runs out (oomScoreAdj {adjust})"));
    }
    let cwd = process.cwd.as_deref().unwrap_or("/");
    if !cwd.starts_with('/')
        || cwd == "/proc"
        || cwd.starts_with("/proc/")
        || cwd.split('/').any(|p| p == "..")
    {
        found.never(format!("has the working directory {cwd:?}"));
    }
    for (set, what) in [
        (&process.scheduler, "a scheduling policy"),
        (&process.io_priority, "an I/O priority"),
        (&process.exec_cpu_affinity, "an affinity to CPUs"),
    ] {
        if set.as_ref().is_some_and(|s| !super::spec::is_empty(s)) && !policy.realtime {
            found.unless("realtime", format!("has {what} of its own"));
        }
    }
    // 20 is nice 0: above it a task may put itself before others without a capability
    for (name, most) in [("RLIMIT_NICE", 20), ("RLIMIT_RTPRIO", 0)] {
        let limits = process.rlimits.as_ref().and_then(serde_json::Value::as_array).into_iter().flatten();
        let high = |l: &&serde_json::Value| l["type"] == name && l["hard"].as_u64().is_none_or(|h| h > most);
        if limits.clone().any(|l| high(&l)) && !policy.realtime {
            found.unless("realtime", format!("may put itself before others ({name})"));
        }
    }
}

fn capabilities(policy: &Policy, process: &Process, found: &mut Found) {
    let Some(capabilities) = &process.capabilities else { return };
    if policy.privileged {
        return;
    }
    let mut more: Vec<(&str, &str)> = Vec::new();
    for (set, names) in capabilities.sets() {
        for name in names {
            let allowed = DEFAULT.contains(&name.as_str()) || policy.capabilities.contains(name);
            if !allowed && more.iter().all(|(n, _)| n != name) {
                more.push((name, set));
            }
        }
    }
    if let Some((_, set)) = more.first() {
        let names: Vec<&str> = more.iter().map(|(name, _)| *name).collect();
        found.unless("capabilities", format!("has the capabilities {} ({set})", names.join(", ")));
    }
}

/// `USER:ROLE:TYPE:LEVEL`.
pub(super) fn selinux(policy: &Policy, label: Option<&str>, found: &mut Found) {
    let Some(label) = label.filter(|l| !l.is_empty()) else { return };
    let kind = label.split(':').nth(2).unwrap_or_default();
    if !policy.selinux_types.iter().any(|t| t == kind) {
        found.unless("selinux_types", format!("has the SELinux label {label}"));
    }
}
