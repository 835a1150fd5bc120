//! What moves a container: transship and its peers, behind one trait.

mod peer;
pub mod podman;
pub mod runc;
pub mod transship;

use serde_json::Value;

use crate::bed::Bed;
use crate::workload::Workload;

/// The container's id, its pod's name and its network namespace.
pub const ID: &str = "bench";

/// What a system says of one move.
pub struct Move {
    /// By the wall clock, from the command to the last of its memory being in place.
    pub begin: f64,
    pub end: f64,
    /// As the system itself accounts for it: no task ran. For peers that do not say: from the request to freeze to the end of the restore.
    pub freeze_ms: f64,
    /// The system's own report, or the lengths of its steps.
    pub detail: Value,
}

pub trait System {
    fn name(&self) -> &'static str;
    /// One sentence for the report.
    fn about(&self) -> &'static str;
    /// How much memory it takes of what the workload says, when it is more.
    fn memory_percent(&self) -> u64 {
        100
    }
    /// Why it cannot be measured on this machine at all.
    fn unavailable(&self) -> Option<String> {
        None
    }
    /// Runs the workload on node a, in a pod of its own.
    fn start(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String>;
    /// What is ready before a move is asked for and not measured (a daemon that waits, the peer's pod).
    fn prepare(&mut self, _bed: &mut Bed, _workload: &Workload) -> Result<(), String> {
        Ok(())
    }
    /// From node a to node b.
    fn migrate(&mut self, bed: &mut Bed, workload: &Workload) -> Result<Move, String>;
    /// Removes the container and all it left, wherever it is; never fails.
    fn clean(&mut self, bed: &mut Bed);
}

/// All systems by name.
pub fn all() -> Vec<Box<dyn System>> {
    vec![
        Box::new(transship::Transship),
        Box::new(runc::Runc::new(runc::Way::Copy)),
        Box::new(runc::Runc::new(runc::Way::PageServer)),
        Box::new(runc::Runc::new(runc::Way::Lazy)),
        Box::new(runc::Runc::new(runc::Way::PreDump)),
        Box::new(podman::Podman::default()),
    ]
}
