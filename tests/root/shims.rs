//! The shim's process in a node: which it is, and what it holds.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::bed::{Bed, Node};

/// A shim that serves, as this machine sees its process.
pub struct Shim {
    proc: PathBuf,
    /// In the node's numbers.
    pub pid: u32,
}

/// What a shim holds at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
    /// Memory of its own (RssAnon), in KiB.
    pub memory: u64,
    /// Children that have ended and were not waited for.
    pub zombies: usize,
}

impl Shim {
    /// The shim that was started for the container `id`.
    pub fn of(bed: &Bed, node: Node, id: &str) -> Result<Shim> {
        let script = format!("pgrep -f 'containerd-shim-[^ ]* .*-id {id}( |$)'");
        let text = bed.sh(node, &script)?;
        let pid: u32 = text.lines().next().context("no shim")?.trim().parse().context("its pid")?;
        Ok(Shim { proc: bed.path(node, &format!("/proc/{pid}"))?, pid })
    }

    /// What it holds now.
    pub fn held(&self) -> Result<Held> {
        let status = std::fs::read_to_string(self.proc.join("status")).context("a shim's status")?;
        let number = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).with_context(|| name.to_owned())?;
            line.split_whitespace().next().context("a number")?.parse().context("a number")
        };
        let children = std::fs::read_to_string(self.proc.join(format!("task/{}/children", self.pid)))?;
        let zombie = |pid: &str| {
            let stat = std::fs::read_to_string(self.proc.with_file_name(pid).join("stat"));
            stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
        };
        Ok(Held {
            descriptors: std::fs::read_dir(self.proc.join("fd"))?.count(),
            threads: number("Threads:")?,
            memory: number("RssAnon:")?,
            zombies: children.split_whitespace().filter(|pid| zombie(pid)).count(),
        })
    }
}

/// The limits of open files of a process of a node, soft and hard.
pub fn descriptor_limits(bed: &Bed, node: Node, pid: u32) -> Result<[u64; 2]> {
    let limits = std::fs::read_to_string(bed.path(node, &format!("/proc/{pid}/limits"))?)?;
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files")).context("its open files")?;
    let mut words = line.split_whitespace().map(str::parse);
    Ok([words.next().context("soft")??, words.next().context("hard")??])
}
