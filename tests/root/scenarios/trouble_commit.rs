//! The moment after the commit was sent: never two, never none.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::moves::Outcome;
use crate::requirements::Needs;
use crate::trouble::{self, AGENT, Attempt, Fault, SHIM, Unplugged, Witness, failed};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "commit_answer_found_out", needs: Needs::Migration, run: answer_found_out },
    Scenario { name: "commit_aborted_there", needs: Needs::Migration, run: aborted_there },
    Scenario { name: "commit_resolved_to_run_here", needs: Needs::Migration, run: resolved_to_run_here },
    Scenario { name: "commit_resolved_as_moved", needs: Needs::Migration, run: resolved_as_moved },
    Scenario { name: "commit_sources_agent_killed", needs: Needs::Migration, run: sources_agent_killed },
    Scenario {
        name: "commit_sources_agent_restarted",
        needs: Needs::Migration,
        run: sources_agent_restarted,
    },
];

/// It is frozen on node a, and `transship ps` says so.
fn undecided(bed: &Bed, outcome: &Outcome) -> Result<()> {
    let error = failed(outcome, 9, &["answer lost", "frozen", "transship resolve"])?;
    ensure!(error["phase"] == "commit", "{error}");
    let listed = bed.ok(Node::A, &["transship", "ps"])?;
    ensure!(listed.contains("undecided") && listed.contains("--run-here"), "{listed}");
    Ok(())
}

/// Nothing of it is on node a any more.
fn left(bed: &Bed) -> Result<()> {
    wait_for(Duration::from_secs(15), "node a lets go of it", || {
        Ok(bed.ok(Node::A, &["ctr", "container", "ls", "-q"])?.trim().is_empty())
    })
}

/// A move that stands still just after the commit has reached node b.
fn committed<'b>(bed: &'b Bed, options: &[&str]) -> Result<(Witness<'b>, Fault<'b>, Attempt)> {
    let witness = Witness::start(bed, "w1")?;
    let fault = Fault::at(bed, Node::B, "committed")?;
    let attempt = Attempt::start(bed, "w1", options)?;
    fault.reached()?;
    Ok((witness, fault, attempt))
}

fn answer_found_out(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &["--silence", "2"])?;
    let cut = Unplugged::pull(bed, Node::B)?;
    drop(fault);
    undecided(bed, &attempt.finish()?)?;
    container::wait_status(bed, Node::B, "w1", "RUNNING")?;
    // the agent goes on asking
    drop(cut);
    left(bed)?;
    witness.finish(Node::B).map(drop)
}

fn aborted_there(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &["--silence", "2"])?;
    // its agent lives, undoes the rest and says so
    trouble::kill(bed, Node::B, SHIM)?;
    drop(fault);
    failed(&attempt.finish()?, 8, &["w1 runs on", "as before"])?;
    witness.finish_untouched().map(drop)
}

fn resolved_to_run_here(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &["--silence", "2"])?;
    trouble::kill(bed, Node::B, AGENT)?;
    trouble::kill(bed, Node::B, SHIM)?;
    drop(fault);
    undecided(bed, &attempt.finish()?)?;
    let unsure = bed.run(Node::A, &["transship", "resolve", "w1", "--run-here"])?;
    ensure!(unsure.status.code() == Some(2), "it must not decide without --yes: {unsure:?}");
    let said = bed.ok(Node::A, &["transship", "resolve", "w1", "--run-here", "--yes"])?;
    ensure!(said.contains("runs on"), "{said}");
    let again = bed.run(Node::A, &["transship", "resolve", "w1", "--moved", "--yes"])?;
    ensure!(!again.status.success(), "it was decided already: {again:?}");
    trouble::restart(bed, Node::B)?;
    witness.finish_untouched().map(drop)
}

fn resolved_as_moved(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &["--silence", "2"])?;
    // its agent cannot be asked; its shim goes on
    trouble::kill(bed, Node::B, AGENT)?;
    let cut = Unplugged::pull(bed, Node::B)?;
    drop(fault);
    undecided(bed, &attempt.finish()?)?;
    drop(cut);
    bed.ok(Node::A, &["transship", "resolve", "w1", "--moved", "--yes"])?;
    left(bed)?;
    // the agent finds it and finishes what the one before it began
    trouble::restart(bed, Node::B)?;
    container::wait_status(bed, Node::B, "w1", "RUNNING")?;
    witness.finish(Node::B).map(drop)
}

fn sources_agent_restarted(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &["--silence", "2"])?;
    let cut = Unplugged::pull(bed, Node::B)?;
    drop(fault);
    undecided(bed, &attempt.finish()?)?;
    trouble::kill(bed, Node::A, AGENT)?;
    trouble::restart(bed, Node::A)?;
    let listed = bed.ok(Node::A, &["transship", "ps"])?;
    ensure!(listed.contains("undecided"), "{listed}");
    drop(cut);
    left(bed)?;
    witness.finish(Node::B).map(drop)
}

fn sources_agent_killed(bed: &Bed) -> Result<()> {
    let (witness, fault, attempt) = committed(bed, &[])?;
    trouble::kill(bed, Node::A, AGENT)?;
    drop(fault);
    let outcome = attempt.finish()?;
    ensure!(outcome.code == 10, "{}", outcome.json);
    container::wait_status(bed, Node::B, "w1", "RUNNING")?;
    trouble::restart(bed, Node::A)?;
    left(bed)?;
    witness.finish(Node::B).map(drop)
}
