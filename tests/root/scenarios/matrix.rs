//! The fault matrix, in parts: what is killed, the cable, what is silent, want of room and time; and many moves. See [`crate::matrix`].

use anyhow::Result;

use crate::Scenario;
use crate::bed::Bed;
use crate::matrix::{self, fault::FAULTS, fault::Fault};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "matrix_killed", needs: Needs::Migration, run: killed },
    Scenario { name: "matrix_cable", needs: Needs::Migration, run: cable },
    Scenario { name: "matrix_silent", needs: Needs::Migration, run: silent },
    Scenario { name: "matrix_other", needs: Needs::Migration, run: other },
    Scenario { name: "load_crossing", needs: Needs::Migration, run: matrix::soak::crossing },
    Scenario { name: "load_soak", needs: Needs::Migration, run: soak },
];

/// A few moves, unless TRANSSHIP_TEST_MINUTES asks for more (`hack/soak`).
fn soak(bed: &Bed) -> Result<()> {
    let minutes = std::env::var("TRANSSHIP_TEST_MINUTES").ok().and_then(|m| m.parse().ok());
    matrix::soak::soak(bed, minutes.unwrap_or(0.0))
}

fn part(bed: &Bed, wanted: fn(&Fault) -> bool) -> Result<()> {
    matrix::run(bed, FAULTS.into_iter().filter(wanted))
}

fn killed(bed: &Bed) -> Result<()> {
    part(bed, |f| matches!(f, Fault::Killed(..)))
}

fn cable(bed: &Bed) -> Result<()> {
    part(bed, |f| matches!(f, Fault::Flutter(_) | Fault::Cut(_)))
}

fn silent(bed: &Bed) -> Result<()> {
    part(bed, |f| matches!(f, Fault::Silent(..)))
}

fn other(bed: &Bed) -> Result<()> {
    part(bed, |f| matches!(f, Fault::Full(_) | Fault::MemoryLimit(_) | Fault::Clock | Fault::CommandLine))
}
