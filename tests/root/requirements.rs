//! What a scenario cannot do without, and whether this machine has it. A scenario is never left out without a reason.

use std::path::{Path, PathBuf};

use crate::bed::Containerd;

/// What a scenario needs beyond containerd and a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Only a shim: also runs with another one (TRANSSHIP_TEST_RUNTIME), which shows that the scenario itself is right.
    Shim,
    /// Our shim and an agent on both nodes.
    Migration,
    /// The same, and what pods over CRI need.
    Pods,
}

/// The runtime under test.
pub fn runtime() -> String {
    std::env::var("TRANSSHIP_TEST_RUNTIME").unwrap_or_else(|_| OURS.to_owned())
}

/// Whether that is ours: for the few things that runc's shim does worse.
pub fn ours() -> bool {
    runtime() == OURS
}

const OURS: &str = "io.containerd.transship.v2";

/// Where our programs were built: beside the `transship` that cargo made for this test.
pub fn bin_dir() -> PathBuf {
    let beside = || Path::new(env!("CARGO_BIN_EXE_transship")).parent().map(Path::to_owned);
    std::env::var_os("TRANSSHIP_BIN_DIR").map(PathBuf::from).or_else(beside).unwrap_or_default()
}

/// Is a scenario to be run? TRANSSHIP_TEST_ONLY is more than one filter: names, separated by spaces.
pub fn chosen(name: &str) -> bool {
    let only = std::env::var("TRANSSHIP_TEST_ONLY").ok();
    only.is_none_or(|o| o.split_whitespace().any(|o| o == name))
}

/// Where `hack/setup` puts what it unpacks.
pub fn opt() -> PathBuf {
    std::env::var_os("TRANSSHIP_OPT").map_or_else(|| "/opt/transship".into(), PathBuf::from)
}

/// Why a scenario cannot run here; nothing when it can.
pub fn missing(containerd: Containerd, needs: Needs) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let have = |program: PathBuf, how: &str| {
        (!program.exists()).then(|| format!("no {} ({how})", program.display()))
    };
    let setup = opt();
    let part = format!("containerd-{}", containerd.version());
    have(setup.join(&part).join("bin/containerd"), &format!("hack/setup {part}"))
        .or_else(|| have(setup.join("criu/bin/criu"), "hack/setup criu"))
        .or_else(|| {
            let ours = runtime() == OURS;
            if needs != Needs::Shim && !ours {
                return Some(format!("it needs our shim, not {}", runtime()));
            }
            let shim = || have(bin_dir().join("containerd-shim-transship-v2"), "cargo build --workspace");
            let client = || have(bin_dir().join("ts-client"), "cargo build --workspace");
            let plugins = || have(setup.join("cni/bin/bridge"), "hack/setup cni");
            let reader = || have(setup.join("checkpointctl/bin/checkpointctl"), "hack/setup checkpointctl");
            let pods = || plugins().or_else(reader);
            ours.then(shim).flatten().or_else(client).or_else(|| (needs == Needs::Pods).then(pods).flatten())
        })
}

/// Whether CRIU can read the resource limits of processes of other users here, which takes CAP_SYS_RESOURCE (prlimit(2)).
pub fn may_read_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    set.and_then(|s| u64::from_str_radix(s.trim(), 16).ok())
        .is_some_and(|set| set >> CAP_SYS_RESOURCE & 1 == 1)
}
