//! Processes that are killed, a cable that is cut, a second request: before the commit all of it ends with the source running.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container;
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::{self, AGENT, Attempt, Fault, SHIM, Unplugged, Witness, failed, refused};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "dies_destinations_shim", needs: Needs::Migration, run: destinations_shim },
    Scenario { name: "dies_destinations_agent", needs: Needs::Migration, run: destinations_agent },
    Scenario { name: "dies_sources_agent", needs: Needs::Migration, run: sources_agent },
    Scenario { name: "dies_cable", needs: Needs::Migration, run: cable },
    Scenario { name: "dies_cable_before_the_commit", needs: Needs::Migration, run: cable_before_the_commit },
    Scenario { name: "dies_command_line", needs: Needs::Migration, run: command_line },
    Scenario { name: "two_at_once", needs: Needs::Migration, run: two_at_once },
];

fn destinations_shim(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    for point in ["receive", "restoring", "held"] {
        let fault = Fault::at(bed, Node::B, point)?;
        let attempt = Attempt::start(bed, "w1", &[])?;
        fault.reached()?;
        trouble::kill(bed, Node::B, SHIM)?;
        drop(fault);
        let outcome = attempt.finish()?;
        ensure!([1, 6, 8].contains(&outcome.code), "{point}: {}", outcome.json);
        let code = outcome.code as u8;
        failed(&outcome, code, &["w1"])?;
        witness.untouched().map_err(|e| e.context(point))?;
    }
    witness.finish_untouched().map(drop)
}

fn destinations_agent(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    for point in ["receive", "held"] {
        let fault = Fault::at(bed, Node::B, point)?;
        let attempt = Attempt::start(bed, "w1", &[])?;
        fault.reached()?;
        trouble::kill(bed, Node::B, AGENT)?;
        failed(&attempt.finish()?, 6, &["w1", "-b"])?;
        drop(fault);
        // what it left there goes when it is started again
        trouble::restart(bed, Node::B)?;
        witness.untouched().map_err(|e| e.context(point))?;
    }
    witness.finish_untouched().map(drop)
}

fn sources_agent(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    for point in ["receive", "held"] {
        let fault = Fault::at(bed, Node::B, point)?;
        let attempt = Attempt::start(bed, "w1", &[])?;
        fault.reached()?;
        trouble::kill(bed, Node::A, AGENT)?;
        let outcome = attempt.finish()?;
        ensure!(
            outcome.code == 10 && outcome.json["error"]["message"].to_string().contains("agent"),
            "{}",
            outcome.json
        );
        drop(fault);
        trouble::restart(bed, Node::A)?;
        witness.untouched().map_err(|e| e.context(point))?;
    }
    witness.finish_untouched().map(drop)
}

fn cable(bed: &Bed) -> Result<()> {
    let witness = Witness::with_data(bed, "w1", 16)?;
    let fault = Fault::at(bed, Node::A, "frozen")?;
    let attempt = Attempt::start(bed, "w1", &["--silence", "2"])?;
    fault.reached()?;
    let cut = Unplugged::pull(bed, Node::B)?;
    let start = Instant::now();
    drop(fault);
    let error = failed(&attempt.finish()?, 6, &["silent", "undoes its part"])?;
    ensure!(start.elapsed().as_secs() < 8, "silence of 2 s took {:?}: {error}", start.elapsed());
    // the other node cannot know yet; it finds out by the same silence
    drop(cut);
    witness.finish_untouched().map(drop)
}

fn cable_before_the_commit(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let fault = Fault::at(bed, Node::B, "held")?;
    let attempt = Attempt::start(bed, "w1", &["--silence", "2"])?;
    fault.reached()?;
    let cut = Unplugged::pull(bed, Node::B)?;
    drop(fault);
    failed(&attempt.finish()?, 6, &["silent"])?;
    drop(cut);
    witness.finish_untouched().map(drop)
}

fn command_line(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let fault = Fault::at(bed, Node::B, "receive")?;
    let attempt = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    trouble::kill(bed, Node::A, "transship migrate")?;
    drop(fault);
    drop(attempt);
    // the migration is the agents' affair: it goes on
    container::wait_status(bed, Node::B, "w1", "RUNNING")?;
    crate::bed::wait_for(std::time::Duration::from_secs(10), "the end of the clean-up", || {
        Ok(bed.ok(Node::A, &["ctr", "container", "ls", "-q"])?.trim().is_empty())
    })?;
    witness.finish(Node::B).map(drop)
}

fn two_at_once(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let fault = Fault::at(bed, Node::B, "receive")?;
    let first = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    refused(bed, "w1", Node::B.address(), &[], 13, &["busy", "transship ps"])?;
    let listed = bed.ok(Node::A, &["transship", "ps"])?;
    ensure!(listed.contains("w1") && listed.contains("migrating-out"), "{listed}");
    drop(fault);
    let outcome = first.finish()?;
    ensure!(outcome.code == 0, "{} {}", outcome.json, outcome.stderr);
    // and there it is an ordinary container, which can come back
    moves::migrate(bed, "w1", Node::B, Node::A)?;
    witness.finish(Node::A).map(drop)
}
