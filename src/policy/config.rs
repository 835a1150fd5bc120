//! The section `[policy]` of agent.toml.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// What must be there, whatever a request asks for.
#[derive(Deserialize, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Required {
    /// A seccomp filter.
    Seccomp,
    /// A profile of AppArmor other than `unconfined`.
    Apparmor,
    /// `noNewPrivileges`.
    NoNewPrivileges,
    /// A user namespace.
    UserNamespace,
}

/// What containers from elsewhere may be. The default is what `ctr run` gives without being asked for more.
#[derive(Deserialize, Serialize, Clone, Debug, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Capabilities beyond the default ones.
    pub capabilities: Vec<String>,
    /// `ctr run --privileged`: all capabilities, all devices, nothing masked, `/sys` writable.
    pub privileged: bool,
    /// Device nodes of this node that a container may have.
    pub devices: Vec<PathBuf>,
    /// File system types beyond the default ones.
    pub mount_types: Vec<String>,
    /// Mounts that are handed back to the node.
    pub shared_mounts: bool,
    /// Paths below `/proc` and `/sys` that need be neither masked nor read-only.
    pub unmasked_paths: Vec<String>,
    /// `ipc`, `uts`: the node's own may be used.
    pub host_namespaces: Vec<String>,
    /// Ranges of the node's user and group IDs that a map may lead to: `FIRST:COUNT`.
    pub host_ids: Vec<IdRange>,
    /// Cgroups in which a container's own may lie, besides the one of its containerd namespace.
    pub cgroup_parents: Vec<String>,
    /// The lowest `oomScoreAdj`.
    pub min_oom_score_adj: i64,
    /// Scheduling that can keep others from the CPU or the disk.
    pub realtime: bool,
    /// Types of SELinux labels.
    pub selinux_types: Vec<String>,
    /// What must be there.
    pub require: Vec<Required>,
    /// Annotations; `*` at the end means anything.
    pub annotations: Vec<String>,
    /// Labels that programs of the node act on, likewise.
    pub labels: Vec<String>,
    /// Extensions of containerd's records, likewise.
    pub extensions: Vec<String>,
    /// containerd's names of runtimes.
    pub runtimes: Vec<String>,
    /// OCI runtimes by name or path.
    pub oci_runtimes: Vec<String>,
    /// Files with a runtime's options.
    pub runtime_configs: Vec<PathBuf>,
    /// Names that an image which comes along may have; `*` at the end means anything.
    pub image_names: Vec<String>,
}

impl Default for Policy {
    fn default() -> Self {
        let words = |list: &[&str]| list.iter().map(|w| w.to_string()).collect();
        Policy {
            capabilities: Vec::new(),
            privileged: false,
            devices: Vec::new(),
            mount_types: Vec::new(),
            shared_mounts: false,
            unmasked_paths: Vec::new(),
            host_namespaces: Vec::new(),
            host_ids: vec![IdRange { first: 1 << 16, count: u32::MAX - (1 << 16) }],
            cgroup_parents: Vec::new(),
            min_oom_score_adj: 0,
            realtime: false,
            selinux_types: words(&["container_t", "container_init_t"]),
            require: Vec::new(),
            annotations: Vec::new(),
            labels: Vec::new(),
            extensions: Vec::new(),
            runtimes: words(&["io.containerd.transship.v2", "io.containerd.runc.v2"]),
            oci_runtimes: words(&["runc", "crun"]),
            runtime_configs: Vec::new(),
            image_names: Vec::new(),
        }
    }
}

impl Policy {
    /// Is this required?
    pub fn requires(&self, what: Required) -> bool {
        self.require.contains(&what)
    }

    /// Checks what the section says.
    ///
    /// # Errors
    /// A word that means nothing.
    pub fn validate(&self) -> Result<()> {
        for cap in &self.capabilities {
            let fine = super::process::number_of(cap).is_some();
            ensure!(fine, "policy.capabilities: {cap:?} is no capability (CAP_NET_ADMIN is one)");
        }
        for namespace in &self.host_namespaces {
            let fine = matches!(namespace.as_str(), "ipc" | "uts");
            ensure!(fine, "policy.host_namespaces: {namespace:?}: only \"ipc\" and \"uts\" can be shared");
        }
        for path in self.devices.iter().chain(&self.runtime_configs) {
            ensure!(path.is_absolute(), "policy: {}: not an absolute path", path.display());
        }
        for parent in &self.cgroup_parents {
            let fine = parent.starts_with('/') && !parent.split('/').any(|p| p == "..");
            ensure!(fine, "policy.cgroup_parents: {parent:?} is no absolute path of a cgroup");
        }
        for path in &self.unmasked_paths {
            if !path.starts_with("/proc/") && !path.starts_with("/sys/") {
                bail!("policy.unmasked_paths: {path:?} is neither below /proc nor below /sys");
            }
        }
        Ok(())
    }
}

/// `FIRST:COUNT`.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct IdRange {
    /// The first ID.
    pub first: u32,
    /// So many of them.
    pub count: u32,
}

impl IdRange {
    /// Are these IDs all in it?
    pub fn holds(&self, first: u64, count: u64) -> bool {
        let end = u64::from(self.first) + u64::from(self.count);
        first >= self.first.into() && first.checked_add(count).is_some_and(|last| last <= end)
    }
}

impl std::fmt::Debug for IdRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.first, self.count)
    }
}

impl TryFrom<String> for IdRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.split_once(':').and_then(|(first, count)| {
            Some(IdRange { first: first.parse().ok()?, count: count.parse().ok()? })
        });
        parsed.ok_or_else(|| format!("{text:?} is no range of IDs: FIRST:COUNT, as in /etc/subuid"))
    }
}

impl From<IdRange> for String {
    fn from(range: IdRange) -> Self {
        format!("{}:{}", range.first, range.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_nothing_are_named() {
        for (text, word) in [
            ("capabilities = ['net_admin']", "net_admin"),
            ("host_namespaces = ['pid']", "pid"),
            ("devices = ['fuse']", "fuse"),
            ("cgroup_parents = ['/a/../b']", "/a/../b"),
            ("unmasked_paths = ['/etc']", "/etc"),
        ] {
            let policy: Policy = toml::from_str(text).unwrap();
            let said = policy.validate().unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
        assert!(toml::from_str::<Policy>("capabilites = []").is_err());
        assert!(toml::from_str::<Policy>("host_ids = ['5']").is_err());
        assert!(toml::from_str::<Policy>("require = ['selinux']").is_err());
        toml::from_str::<Policy>("").unwrap().validate().unwrap();
    }

    #[test]
    fn ranges_of_ids() {
        let range = IdRange::try_from("100000:65536".to_string()).unwrap();
        assert!(range.holds(100_000, 65_536) && range.holds(165_535, 1));
        assert!(!range.holds(99_999, 1) && !range.holds(100_000, 65_537) && !range.holds(100_000, u64::MAX));
    }
}
