//! Which containers share one shim process: those whose annotations name the same group or the same pod sandbox.

use std::{collections::HashMap, fs, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;

/// The annotations that group, in the order in which they count (containerd's runc shim uses the same).
const LABELS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// The group of the container `id` whose bundle is at `bundle`: its own id when no annotation says otherwise.
pub fn of_bundle(bundle: &Path, id: &str) -> Result<String> {
    // Only the annotations: the rest of config.json is skipped by the parser.
    #[derive(Deserialize)]
    struct Spec {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let json = fs::read(&path).with_context(|| format!("open {}", path.display()))?;
    let spec: Spec = serde_json::from_slice(&json).with_context(|| format!("read {}", path.display()))?;
    let annotations = spec.annotations.unwrap_or_default();
    Ok(LABELS.iter().find_map(|l| annotations.get(*l)).cloned().unwrap_or_else(|| id.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(config: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        of_bundle(dir.path(), "me").unwrap()
    }

    #[test]
    fn labels_in_their_order_else_the_id() {
        assert_eq!(group(r#"{"process":{"args":["a"]}}"#), "me");
        assert_eq!(group(r#"{"annotations":null}"#), "me");
        assert_eq!(group(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#), "pod");
        assert_eq!(
            group(
                r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#
            ),
            "g"
        );
    }
}
