//! CAP_* of this process: what lacks, and what follows from it. The agent and the shim run with the same set under systemd.

use std::collections::BTreeSet;

use super::Finding;

/// Capabilities that matter, whether their lack is fatal, and the consequence of lacking them.
const NEEDED: [(&str, bool, &str); 6] = [
    ("CAP_SYS_ADMIN", true, "mounts, namespaces and CRIU need it: run as root on the host"),
    ("CAP_NET_ADMIN", true, "the network namespace cannot be rebuilt or fenced: run as root on the host"),
    ("CAP_SYS_PTRACE", true, "CRIU cannot seize the container's tasks: run as root on the host"),
    ("CAP_MKNOD", true, "devices and whiteouts of the writable layer cannot be made"),
    ("CAP_CHECKPOINT_RESTORE", false, "process ids are then set through CAP_SYS_ADMIN, which works as well"),
    (
        "CAP_SYS_RESOURCE",
        false,
        "oom scores cannot be lowered (CRI pods need restrict_oom_score_adj = true in containerd's CRI configuration), \
         rlimits cannot be raised on restore, pipes stop at fs.pipe-max-size, and CRIU cannot dump containers whose \
         processes run as another user than root",
    ),
];

/// Names of the effective capabilities (`CAP_...`).
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Held and effective.
    pub effective: BTreeSet<String>,
    /// Why they could not be read.
    pub error: Option<String>,
}

/// Reads this process' effective set.
pub fn gather() -> Facts {
    match caps::read(None, caps::CapSet::Effective) {
        Ok(set) => Facts { effective: set.iter().map(|c| c.to_string()).collect(), error: None },
        Err(e) => Facts { error: Some(e.to_string()), ..Facts::default() },
    }
}

/// Is this capability missing?
pub fn lacks(facts: &Facts, name: &str) -> bool {
    !facts.effective.contains(name)
}

/// One finding when all is there, else one for each capability that lacks.
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    if let Some(e) = &facts.error {
        return vec![Finding::fail("capabilities", e.clone(), "capabilities must be readable: mount /proc")];
    }
    let missing: Vec<_> = NEEDED.iter().filter(|(name, ..)| lacks(facts, name)).collect();
    if missing.is_empty() {
        return vec![Finding::ok("capabilities", format!("all {} that matter", NEEDED.len()))];
    }
    missing
        .into_iter()
        .map(|(name, fatal, consequence)| {
            let found = format!("{name} is missing");
            if *fatal {
                Finding::fail("capabilities", found, *consequence)
            } else {
                Finding::warn("capabilities", found, *consequence)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn without(names: &[&str]) -> Facts {
        let effective =
            NEEDED.iter().map(|(n, ..)| n.to_string()).filter(|n| !names.contains(&n.as_str())).collect();
        Facts { effective, error: None }
    }

    #[test]
    fn each_lack_is_its_own_finding_with_its_consequence() {
        assert_eq!(verdict(&without(&[])).len(), 1);
        let out = verdict(&without(&["CAP_SYS_RESOURCE", "CAP_SYS_ADMIN"]));
        assert_eq!(out.len(), 2);
        assert_eq!(out[0].level, Level::Fail);
        assert_eq!(out[1].level, Level::Warn);
        assert!(out[1].advice.as_deref().unwrap().contains("restrict_oom_score_adj"));
    }

    #[test]
    fn unreadable_capabilities_fail() {
        let facts = Facts { error: Some("x".into()), ..Facts::default() };
        assert_eq!(verdict(&facts)[0].level, Level::Fail);
    }
}
