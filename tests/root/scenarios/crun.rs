//! crun in runc's place (`BinaryName`).

use crate::Scenario;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[];
