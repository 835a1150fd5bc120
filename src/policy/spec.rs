//! The spec as a whole.

use serde::Deserialize as _;
use serde_json::Value;

use super::model::Spec;
use super::{Found, Policy, linux, listed, mounts, process};

/// Annotations that no program acts on.
const HARMLESS: [&str; 1] = ["org.opencontainers.image.*"];

/// Looks at all of it.
pub fn check(policy: &Policy, namespace: &str, id: &str, spec: &Value, found: &mut Found) {
    let spec = match Spec::deserialize(spec) {
        Ok(spec) => spec,
        Err(e) => return found.never(format!("has a spec that this version does not understand ({e})")),
    };
    match &spec.root {
        Some(root) if root.path == "rootfs" => {}
        Some(root) => found.never(format!("has its root at {:?} and not in its bundle", root.path)),
        None => found.never("has no root"),
    }
    if spec.hooks.as_ref().is_some_and(|h| !is_empty(h)) {
        found.never("has hooks, which would run programs of this node");
    }
    for (name, _) in spec.annotations.iter().flatten() {
        if !listed(&HARMLESS, name) && !listed(&policy.annotations, name) {
            found.unless("annotations", format!("has the annotation {name}"));
        }
    }
    let nothing = process::nothing();
    process::check(policy, spec.process.as_ref().unwrap_or(&nothing), found);
    for mount in spec.mounts.iter().flatten() {
        mounts::check(policy, mount, found);
    }
    mounts::twice(spec.mounts.as_deref().unwrap_or_default(), found);
    match &spec.linux {
        Some(linux) => {
            linux::check(policy, linux, found);
            linux::cgroup(policy, namespace, id, linux.cgroups_path.as_deref(), found);
        }
        None => found.never("has no `linux` part, and so no namespaces of its own"),
    }
}

/// Nothing at all, in any of the ways in which JSON says so.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(all) => all.iter().all(is_empty),
        Value::Object(all) => all.values().all(is_empty),
        _ => false,
    }
}
