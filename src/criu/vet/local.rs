//! A spec that was made on this node: it may say more than this version knows.

use serde_json::{Map, Value};

/// What is looked at of a spec, by place. `*` is each entry of a list; a name that ends a line is taken as it is.
const KNOWN: &[&str] = &[
    "root.path",
    "root.readonly",
    "process.user",
    "process.capabilities.bounding",
    "process.capabilities.effective",
    "process.capabilities.inheritable",
    "process.capabilities.permitted",
    "process.capabilities.ambient",
    "process.rlimits",
    "process.noNewPrivileges",
    "process.apparmorProfile",
    "process.oomScoreAdj",
    "process.scheduler",
    "process.selinuxLabel",
    "mounts.*.destination",
    "mounts.*.type",
    "mounts.*.source",
    "mounts.*.options",
    "linux.uidMappings",
    "linux.gidMappings",
    "linux.namespaces.*.type",
    "linux.namespaces.*.path",
    "linux.devices.*.path",
    "linux.devices.*.type",
    "linux.seccomp.defaultAction",
    "linux.seccomp.architectures",
    "linux.seccomp.syscalls.*.names",
    "linux.seccomp.syscalls.*.action",
    "linux.seccomp.syscalls.*.args",
    "linux.maskedPaths",
    "linux.readonlyPaths",
];

/// The fields of a spec that are looked at, without any others.
pub(super) fn known(spec: &Value) -> Value {
    let paths: Vec<Vec<&str>> = KNOWN.iter().map(|p| p.split('.').collect()).collect();
    let paths: Vec<&[&str]> = paths.iter().map(Vec::as_slice).collect();
    pick(spec, &paths)
}

fn pick(value: &Value, paths: &[&[&str]]) -> Value {
    if paths.iter().any(|p| p.is_empty()) {
        return value.clone();
    }
    let below =
        |name: &str| -> Vec<&[&str]> { paths.iter().filter(|p| p[0] == name).map(|p| &p[1..]).collect() };
    match value {
        Value::Object(fields) => {
            let keep = |(name, value): (&String, &Value)| {
                let below = below(name);
                (!below.is_empty()).then(|| (name.clone(), pick(value, &below)))
            };
            Value::Object(fields.iter().filter_map(keep).collect::<Map<_, _>>())
        }
        Value::Array(all) => Value::Array(all.iter().map(|v| pick(v, &below("*"))).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::model::Spec;
    use serde::Deserialize;

    #[test]
    fn what_is_new_in_a_spec_is_left_out() {
        let spec = serde_json::json!({
            "ociVersion": "9.9", "vm": {}, "mounts": [{"destination": "/a", "type": "tmpfs", "new": 1}],
            "process": {"capabilities": {"bounding": ["CAP_X"], "new": []}, "user": {"uid": 7, "new": 2}, "new": 3},
            "linux": {"netDevices": {"eth0": {}}, "namespaces": [{"type": "pid", "new": 4}], "maskedPaths": null}
        });
        assert!(Spec::deserialize(&spec).is_err());
        let known = known(&spec);
        assert_eq!(
            known,
            serde_json::json!({
                "mounts": [{"destination": "/a", "type": "tmpfs"}],
                "process": {"capabilities": {"bounding": ["CAP_X"]}, "user": {"uid": 7, "new": 2}},
                "linux": {"namespaces": [{"type": "pid"}], "maskedPaths": null}
            })
        );
        assert!(Spec::deserialize(&known).is_ok());
    }
}
