//! Namespaces as the spec has them.

use std::os::unix::fs::MetadataExt;

use crate::policy::model::{Namespace, Spec};

/// All of them.
pub(super) fn all(spec: &Spec) -> impl Iterator<Item = &Namespace> {
    spec.linux.iter().flat_map(|l| l.namespaces.iter().flatten())
}

/// A namespace that is made for the container, not one by path.
pub(super) fn has_own(spec: &Spec, kind: &str) -> bool {
    all(spec).any(|n| n.kind == kind && n.path.as_deref().unwrap_or_default().is_empty())
}

/// Not in this node's own namespace, by which a path may lead as well.
pub(super) fn is_apart(spec: &Spec, kind: &str) -> bool {
    let Some(namespace) = all(spec).find(|n| n.kind == kind) else { return false };
    let file = match kind {
        "network" => "net",
        "mount" => "mnt",
        other => other,
    };
    let inode = |path: &str| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let there = namespace.path.as_deref().filter(|p| !p.is_empty()).and_then(inode);
    there.is_none() || there != inode(&format!("/proc/self/ns/{file}"))
}
