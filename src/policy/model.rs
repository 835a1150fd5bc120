//! An OCI spec as far as it matters to the policy. Every field that this version knows stands here, if only to be looked at for being there;
//! a field that does not stand here is an error. So is another spelling of one: Go, in which runc and containerd are written, takes
//! `"Process"` for `process`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// A field whose content does not matter here.
type Any = Option<Value>;

/// The whole spec.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Spec {
    #[serde(default, rename = "ociVersion")]
    pub oci_version: Any,
    pub process: Option<Process>,
    pub root: Option<Root>,
    pub hostname: Any,
    pub domainname: Any,
    pub mounts: Option<Vec<Mount>>,
    pub hooks: Any,
    pub annotations: Option<BTreeMap<String, String>>,
    pub linux: Option<Linux>,
}

/// `root`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Root {
    pub path: String,
    pub readonly: Option<bool>,
}

/// `process`.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Process {
    pub terminal: Option<bool>,
    pub console_size: Any,
    pub user: Any,
    pub args: Any,
    pub env: Any,
    pub cwd: Option<String>,
    pub capabilities: Option<Capabilities>,
    pub rlimits: Any,
    pub no_new_privileges: Option<bool>,
    pub apparmor_profile: Option<String>,
    pub oom_score_adj: Option<i64>,
    pub scheduler: Any,
    pub selinux_label: Option<String>,
    pub io_priority: Any,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Any,
}

/// `process.capabilities`.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Capabilities {
    pub bounding: Option<Vec<String>>,
    pub effective: Option<Vec<String>>,
    pub inheritable: Option<Vec<String>>,
    pub permitted: Option<Vec<String>>,
    pub ambient: Option<Vec<String>>,
}

impl Capabilities {
    /// The sets by name.
    pub fn sets(&self) -> [(&'static str, &[String]); 5] {
        fn of(set: &Option<Vec<String>>) -> &[String] {
            set.as_deref().unwrap_or_default()
        }
        [
            ("bounding", of(&self.bounding)),
            ("effective", of(&self.effective)),
            ("inheritable", of(&self.inheritable)),
            ("permitted", of(&self.permitted)),
            ("ambient", of(&self.ambient)),
        ]
    }
}

/// One of `mounts`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Mount {
    pub destination: String,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub source: Option<String>,
    pub options: Option<Vec<String>>,
    pub uid_mappings: Any,
    pub gid_mappings: Any,
}

impl Mount {
    /// Whether it shows something of the node's.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind") || self.options().any(|o| o == "bind" || o == "rbind")
    }

    /// Its options.
    pub fn options(&self) -> impl Iterator<Item = &str> {
        self.options.iter().flatten().map(String::as_str)
    }

    /// Whether it is read-only: the last word counts.
    pub fn is_readonly(&self) -> bool {
        let word = |o: &str| match o {
            "ro" => Some(true),
            "rw" => Some(false),
            _ => None,
        };
        self.options().filter_map(word).last().unwrap_or(false)
    }
}

/// `linux`.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Linux {
    pub uid_mappings: Option<Vec<IdMapping>>,
    pub gid_mappings: Option<Vec<IdMapping>>,
    pub sysctl: Option<BTreeMap<String, String>>,
    pub resources: Option<Resources>,
    pub cgroups_path: Option<String>,
    pub namespaces: Option<Vec<Namespace>>,
    pub devices: Option<Vec<Device>>,
    pub seccomp: Option<Seccomp>,
    pub rootfs_propagation: Option<String>,
    pub masked_paths: Option<Vec<String>>,
    pub readonly_paths: Option<Vec<String>>,
    pub mount_label: Option<String>,
    pub intel_rdt: Any,
    pub memory_policy: Any,
    pub personality: Any,
    pub time_offsets: Any,
}

/// One of `uidMappings` and `gidMappings`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

/// One of `namespaces`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: Option<String>,
}

/// One of `devices`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Device {
    pub path: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub file_mode: Any,
    pub uid: Any,
    pub gid: Any,
}

/// `resources`.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Resources {
    pub devices: Option<Vec<DeviceRule>>,
    pub memory: Any,
    pub cpu: Option<Value>,
    pub pids: Any,
    #[serde(rename = "blockIO")]
    pub block_io: Any,
    pub hugepage_limits: Any,
    pub network: Any,
    pub rdma: Any,
    pub unified: Option<BTreeMap<String, String>>,
}

/// One of `resources.devices`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct DeviceRule {
    #[serde(default)]
    pub allow: bool,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub access: Option<String>,
}

/// `seccomp`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Seccomp {
    pub default_action: String,
    pub default_errno_ret: Any,
    pub architectures: Any,
    pub flags: Any,
    pub listener_path: Option<String>,
    pub listener_metadata: Option<String>,
    pub syscalls: Option<Vec<Syscalls>>,
}

/// One of `seccomp.syscalls`.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the OCI runtime specification")]
pub struct Syscalls {
    pub names: Any,
    pub action: String,
    pub errno_ret: Any,
    pub args: Any,
}
