//! Is this node fit, and what to do about it.
//!
//! Each file is one subject: its `Facts` (plain data), `gather()` (the only place that touches the machine, by the real system
//! call rather than by a configuration file) and `verdict()`, a pure function from facts to [`Finding`]s that the tests feed by
//! hand. How findings are shown is [`crate::cli::doctor`]'s matter; nothing here prints.
//!
//! | file | subject |
//! |---|---|
//! | [`kernel`] | version, system calls and namespaces that CRIU and we need, TCP repair |
//! | [`overlay`] | overlayfs and its whiteouts |
//! | [`tracker`] | how dirty memory can be tracked: `uffd-wp`, `soft-dirty` or by comparing; how mappings are read |
//! | [`capabilities`] | CAP_* of this process |
//! | [`cgroup`] | version and freezer |
//! | [`containerd`] | socket, version, the shim on its PATH, the runtime handler in its configuration |
//! | [`checkpoint`] | CRIU: version, and a dump of a process with a connected socket |
//! | [`runtime`] | runc and crun |
//! | [`room`] | tmpfs for images, free memory |
//! | [`cpu`] | the features that processes may be using |
//! | [`fence`] | nf_tables in a network namespace |
//! | [`node`] | the agent, its certificates, the bridge |

pub mod capabilities;
pub mod cgroup;
pub mod checkpoint;
pub mod containerd;
pub mod cpu;
pub mod fence;
pub mod kernel;
pub mod node;
pub mod overlay;
pub mod room;
pub mod runtime;
pub mod tracker;

use std::path::PathBuf;

use serde::Serialize;

/// How a finding bears on migrations from or to this node.
#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, with the consequence that the advice names.
    Warn,
    /// Migrations from or to this node will fail.
    Fail,
}

impl Level {
    /// The word shown in the table and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// One line of the doctor's table.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at; stable, for scripts.
    pub check: &'static str,
    /// How it bears on migrations.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it; always present unless the level is [`Level::Ok`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    /// A finding that needs no advice.
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: None }
    }

    /// A finding that works with a consequence.
    pub fn warn(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    /// A finding that makes migrations fail.
    pub fn fail(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Where to look; the defaults are the stock paths.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's configuration file.
    pub config: PathBuf,
    /// The agent's unix socket; `None`: as the agent's configuration says.
    pub agent_socket: Option<PathBuf>,
    /// containerd's gRPC socket; `None`: as the agent's configuration says.
    pub containerd: Option<PathBuf>,
}

/// All findings, in the order of the table in this module's head.
///
/// `during` hears the name of each subject before it is looked at: the probes take about a second in all.
pub fn examine(options: &Options, mut during: impl FnMut(&'static str)) -> Vec<Finding> {
    let node = node::gather(&options.config, options.agent_socket.as_deref());
    let caps = capabilities::gather();
    let lacks_resource = capabilities::lacks(&caps, "CAP_SYS_RESOURCE");
    during("kernel");
    let mut all = kernel::verdict(&kernel::gather());
    all.push(overlay::verdict(&overlay::gather()));
    all.push(tracker::verdict(&tracker::gather()));
    all.push(tracker::mappings(tracker::spared()));
    all.extend(capabilities::verdict(&caps));
    during("cgroup");
    let cgroup = cgroup::gather();
    all.extend(cgroup::verdict(&cgroup));
    during("containerd");
    let socket = options.containerd.as_ref().unwrap_or(&node.config.containerd);
    let containerd = containerd::gather(socket);
    all.extend(containerd::verdict(&containerd, lacks_resource));
    // What the shim starts it finds on containerd's PATH, which may be another than this process'.
    let shim_path = containerd.daemon_path.as_deref();
    during("criu");
    all.extend(checkpoint::verdict(&checkpoint::gather(node.config.criu.as_deref(), shim_path)));
    during("runtimes");
    all.extend(runtime::verdict(&runtime::gather(shim_path), cgroup.version == cgroup::Version::V1));
    during("node");
    all.extend(room::verdict(&room::gather(&node.config.images_dir)));
    all.push(cpu::verdict(&cpu::gather()));
    all.push(fence::verdict(&fence::gather()));
    all.extend(node::verdict(&node));
    all
}

/// Fit: nothing failed.
pub fn fit(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.level != Level::Fail)
}

/// Numbers `major.minor[.patch]` at the first digit of `text`; anything after them is left alone.
///
/// Serves `uname -r` ("6.18.44-fc"), runc ("runc version 1.1.15+ds1") and containerd ("v2.1.9", "1.7.24~ds1").
pub fn version_in(text: &str) -> Option<(u32, u32, u32)> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let tail = &text[start..];
    let end = tail.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(tail.len());
    let mut parts = tail[..end].split('.').map(|p| p.parse::<u32>().ok());
    let major = parts.next()??;
    let minor = parts.next()??;
    Some((major, minor, parts.next().flatten().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_out_of_what_programs_print() {
        assert_eq!(version_in("6.18.44-fc-v595"), Some((6, 18, 44)));
        assert_eq!(version_in("runc version 1.1.15+ds1"), Some((1, 1, 15)));
        assert_eq!(version_in("v2.1.9"), Some((2, 1, 9)));
        assert_eq!(version_in("1.7.24~ds1"), Some((1, 7, 24)));
        assert_eq!(version_in("crun version 1.21"), Some((1, 21, 0)));
        assert_eq!(version_in("6"), None);
        assert_eq!(version_in("unknown"), None);
        assert_eq!(version_in("99999999999.1"), None);
    }

    #[test]
    fn a_warning_leaves_a_node_fit_and_a_failure_does_not() {
        let warn = Finding::warn("x", "f", "a");
        assert!(fit(&[Finding::ok("x", "f"), warn.clone()]));
        assert!(!fit(&[warn, Finding::fail("y", "f", "a")]));
    }
}
