//! Memory that was lost in post-copy: the container ran on the destination already, and the source or the link to it went away
//! before everything had followed. Which words tell of it lives here; that it happened, the two sides find out.

use serde::{Deserialize, Serialize};

use super::protocol::Failure;
use super::tuning::OnPostCopyFailure;

/// The phase's name, in reports, events and errors.
pub const PHASE: &str = "post-copy";

/// What was lost, and what was chosen for this case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loss {
    /// The node that found out.
    pub node: String,
    /// The node that it lost.
    pub peer: String,
    /// Bytes that had not arrived.
    pub bytes: u64,
    /// What the operator chose.
    pub choice: OnPostCopyFailure,
    /// What broke.
    pub cause: String,
}

impl Loss {
    /// What was lost, one sentence.
    pub fn sentence(&self, container: &str) -> String {
        format!(
            "{} of {container}'s memory was lost on its way after the commit: {}",
            megabytes(self.bytes),
            self.cause
        )
    }

    /// What was done about it here.
    pub fn done(&self, container: &str) -> String {
        match self.choice {
            OnPostCopyFailure::Kill => {
                format!("{container} was killed on both nodes, as --on-post-copy-failure kill says")
            }
            OnPostCopyFailure::Thaw => format!(
                "{container} was killed on the destination and runs on at the source from the moment of its freeze, as --on-post-copy-failure thaw says"
            ),
        }
    }

    /// What the operator does now.
    pub fn advice(&self) -> &'static str {
        match self.choice {
            OnPostCopyFailure::Kill => "start it anew; --mode pre-copy leaves nothing behind at the commit",
            OnPostCopyFailure::Thaw => "whoever talked to it since the freeze has seen what is undone now",
        }
    }

    /// As a failure of the migration.
    pub fn failure(&self, container: &str) -> Failure {
        Failure {
            phase: PHASE.into(),
            node: self.node.clone(),
            message: self.sentence(container),
            advice: self.advice().into(),
            lost: false, // the connection is the cause, but the other side knows no better reason
            ran: true,
        }
    }
}

/// `12.3 MB`; one digit behind the point is enough for a loss, but a small one is not none.
pub fn megabytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        mb if mb < 0.1 => format!("{:.1} kB", bytes as f64 / 1e3),
        mb => format!("{mb:.1} MB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_names_node_phase_amount_and_what_was_done() {
        let loss = Loss {
            node: "node-b".into(),
            peer: "node-a".into(),
            bytes: 12_345_678,
            choice: OnPostCopyFailure::Kill,
            cause: "the connection was reset".into(),
        };
        let failure = loss.failure("redis");
        assert_eq!((failure.phase.as_str(), failure.node.as_str()), ("post-copy", "node-b"));
        assert_eq!(
            failure.message,
            "12.3 MB of redis's memory was lost on its way after the commit: the connection was reset"
        );
        assert!(loss.done("redis").contains("killed on both") && failure.advice.contains("pre-copy"));
        let thaw = Loss { choice: OnPostCopyFailure::Thaw, ..loss };
        assert!(thaw.done("redis").contains("from the moment of its freeze"));
        assert_ne!(thaw.advice(), failure.advice);
    }

    #[test]
    fn small_amounts_are_not_nothing() {
        assert_eq!(megabytes(4096), "4.1 kB");
        assert_eq!(megabytes(100_000), "0.1 MB");
    }
}
