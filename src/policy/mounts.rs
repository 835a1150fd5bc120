//! Mounts. Folders of the node are only told here to be such; whether they are listed, and where they lead, is [`super::host`]'s.

use super::model::Mount;
use super::{Found, Policy};

/// A file system of its own that may be anywhere.
const ANYWHERE: [&str; 3] = ["tmpfs", "devpts", "mqueue"];

/// `/proc` and `/sys` are mounted once: masks lie on one of two, and the other might be seen.
pub(super) fn twice(mounts: &[Mount], found: &mut Found) {
    for place in ["/proc", "/sys"] {
        let is = |m: &&Mount| {
            std::path::Path::new(&m.destination).components().eq(std::path::Path::new(place).components())
        };
        if mounts.iter().filter(is).count() > 1 {
            found.never(format!("mounts something at {place} twice"));
        }
    }
}

pub(super) fn check(policy: &Policy, mount: &Mount, found: &mut Found) {
    let at = mount.destination.as_str();
    if !at.starts_with('/') || at.split('/').any(|part| part == "..") {
        return found.never(format!("mounts something at {at:?}"));
    }
    let given = |m: &Option<serde_json::Value>| m.as_ref().is_some_and(|m| !super::spec::is_empty(m));
    if given(&mount.uid_mappings)
        || given(&mount.gid_mappings)
        || mount.options().any(|o| o.ends_with("idmap"))
    {
        found.unless("privileged", format!("maps the owners of {at}"));
    }
    if mount.options().any(|o| matches!(o, "shared" | "rshared")) && !policy.shared_mounts {
        found.unless("shared_mounts", format!("hands what it mounts below {at} back to the node"));
    }
    if mount.is_bind() {
        return;
    }
    let kind = mount.kind.as_deref().unwrap_or_default();
    let own_place = match kind {
        "proc" => "/proc",
        "sysfs" => "/sys",
        "cgroup" | "cgroup2" => "/sys/fs/cgroup",
        kind if ANYWHERE.contains(&kind) => at,
        kind => {
            if !policy.mount_types.iter().any(|t| t == kind) {
                found.unless("mount_types", format!("mounts a file system of type {kind:?} at {at}"));
            }
            return;
        }
    };
    if policy.privileged {
        return;
    }
    // masks lie on the usual place alone
    if at != own_place {
        found.unless("privileged", format!("mounts {kind} at {at} and not at {own_place}"));
    }
    if matches!(kind, "sysfs" | "cgroup" | "cgroup2") && !mount.is_readonly() {
        found.unless("privileged", format!("can write to {at} ({kind})"));
    }
}
