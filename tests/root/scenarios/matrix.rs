//! The fault matrix, in two parts: what is killed, and what happens around; and many moves. See [`crate::matrix`].

use anyhow::Result;

use crate::Scenario;
use crate::bed::Bed;
use crate::matrix::{self, fault::FAULTS, fault::Fault};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "matrix_killed", needs: Needs::Migration, run: killed },
    // the cable, what is silent, want of room, time
    Scenario { name: "matrix_around", needs: Needs::Migration, run: around },
    Scenario { name: "load_crossing", needs: Needs::Migration, run: matrix::soak::crossing },
    Scenario { name: "load_soak", needs: Needs::Migration, run: soak },
];

/// A few moves, unless TRANSSHIP_TEST_MINUTES asks for more (`hack/soak`).
fn soak(bed: &Bed) -> Result<()> {
    let minutes = std::env::var("TRANSSHIP_TEST_MINUTES").ok().and_then(|m| m.parse().ok());
    matrix::soak::soak(bed, minutes.unwrap_or(0.0))
}

fn killed(bed: &Bed) -> Result<()> {
    matrix::run(bed, FAULTS.into_iter().filter(|f| matches!(f, Fault::Killed(..))))
}

fn around(bed: &Bed) -> Result<()> {
    matrix::run(bed, FAULTS.into_iter().filter(|f| !matches!(f, Fault::Killed(..))))
}
