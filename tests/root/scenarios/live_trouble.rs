//! Live migrations that break: in a round nothing is left of them and the container never notices; after the commit, while memory still
//! follows, the operator is told what was lost, and gets what was chosen for that.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::live::{self, Mutants, Slow};
use crate::requirements::Needs;
use crate::trouble::{self, AGENT, Attempt, Fault, SHIM, Unplugged, failed};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "live_dies_in_a_round", needs: Needs::Migration, run: dies_in_a_round },
    Scenario { name: "live_ends_in_a_round", needs: Needs::Migration, run: ends_in_a_round },
    Scenario { name: "live_lost_and_killed", needs: Needs::Migration, run: lost_and_killed },
    Scenario { name: "live_lost_and_thawed", needs: Needs::Migration, run: lost_and_thawed },
    Scenario { name: "live_source_dies_after_the_commit", needs: Needs::Migration, run: source_dies },
];

/// What the moved container does: memory of many kinds, some of it written all the time.
const WORK: [&str; 5] = ["writes,fork,mmap,shared-anon", "--mb", "32", "--rate", "10"];

/// A migration that stands still in its second round, when all memory is being watched.
fn in_the_second_round<'a>(bed: &'a Bed) -> Result<(Attempt, Fault<'a>)> {
    let first = Fault::at(bed, Node::A, "round")?;
    let mut options = live::known(bed, &["--mode", "pre-copy"])?;
    options.extend(["--silence", "3"]);
    let attempt = Attempt::start(bed, "live", &options)?;
    first.reached()?;
    drop(first);
    // the first round takes seconds over the slow link
    std::thread::sleep(Duration::from_millis(200));
    let second = Fault::at(bed, Node::A, "later-round")?;
    second.reached()?;
    Ok((attempt, second))
}

/// The destination's shim, its agent, the cable.
fn dies_in_a_round(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--mode")? || !live::has_point("round") {
        return Ok(());
    }
    let mut mutants = Mutants::start(bed, "live", &WORK)?;
    for what in ["shim", "agent", "cable"] {
        let slow = Slow::link(bed, 100)?;
        let (attempt, fault) = in_the_second_round(bed)?;
        let watched = live::traces(bed, Node::A)?;
        let tracked = bed.ok(Node::A, &["transship", "doctor"]).unwrap_or_default();
        ensure!(
            !tracked.contains("uffd-wp (") || watched.contains("registered"),
            "{what}: nothing is watched"
        );
        let mut cut = None;
        match what {
            "shim" => trouble::kill(bed, Node::B, SHIM)?,
            "agent" => trouble::kill(bed, Node::B, AGENT)?,
            _ => cut = Some(Unplugged::pull(bed, Node::B)?),
        }
        drop(fault);
        drop(slow);
        let outcome = attempt.finish()?;
        ensure!([1, 6, 8].contains(&outcome.code), "{what}: exit {}: {}", outcome.code, outcome.json);
        failed(&outcome, outcome.code as u8, &["live"]).context(what)?;
        drop(cut);
        if what == "agent" {
            trouble::restart(bed, Node::B)?;
        }
        mutants.untouched().context(what)?;
    }
    // and then it moves
    mutants.go(&["--mode", "pre-copy"])?;
    mutants.end()
}

/// The container itself ends while it is being copied.
fn ends_in_a_round(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--mode")? || !live::has_point("round") {
        return Ok(());
    }
    let _mutants = Mutants::start(bed, "live", &WORK)?;
    let slow = Slow::link(bed, 100)?;
    let (attempt, fault) = in_the_second_round(bed)?;
    // ctr is told that the container is being moved; whoever kills the process itself, or the kernel for want of memory, asks nobody
    let pid = container::pid(bed, Node::A, "live")?;
    bed.ok(Node::A, &["kill", "-KILL", &pid.to_string()])?;
    drop(fault);
    drop(slow);
    let outcome = attempt.finish()?;
    ensure!(outcome.code != 0 && outcome.json["ok"] == false, "{}", outcome.json);
    container::wait_status(bed, Node::A, "live", "STOPPED")?;
    trouble::nothing_on(bed, Node::B)?;
    container::delete(bed, Node::A, "live")
}

/// A migration whose container runs on node b while its memory is still on node a; the link is slow.
fn following<'a>(bed: &'a Bed, options: &[&str]) -> Result<(Attempt, Slow<'a>)> {
    let slow = Slow::link(bed, 40)?;
    let options = [&["--mode", "post-copy", "--silence", "3"], options].concat();
    let attempt = Attempt::start(bed, "live", &options)?;
    // containerd on node b already calls a container running that waits behind the gate: the source says when it was committed
    wait_for(Duration::from_secs(60), "memory that follows", || {
        Ok(bed.ok(Node::A, &["transship", "ps"])?.contains("post-copy"))
    })?;
    Ok((attempt, slow))
}

/// Runs on none of the nodes (soon), then it is removed from both.
fn gone(bed: &Bed) -> Result<()> {
    for node in Node::ALL {
        wait_for(Duration::from_secs(40), "its end", || {
            Ok(container::status(bed, node, "live")?.is_none_or(|s| s == "STOPPED"))
        })
        .with_context(|| format!("on node {}", node.name()))?;
    }
    remove(bed)
}

fn remove(bed: &Bed) -> Result<()> {
    for node in Node::ALL {
        if bed.ok(node, &["ctr", "container", "ls", "-q"])?.lines().any(|id| id == "live") {
            container::delete(bed, node, "live")?;
        }
        live::no_traces(bed, node)?;
    }
    Ok(())
}

/// What was lost is said: how much of it, of what, and what was done.
fn told(outcome: &crate::moves::Outcome) -> Result<()> {
    let all = format!("exit {}: {} {}", outcome.code, outcome.json, outcome.stderr);
    let error = &outcome.json["error"];
    ensure!(outcome.code != 0 && error["phase"] == "post-copy", "{all}");
    let message = error["message"].as_str().unwrap_or_default();
    ensure!(message.contains("lost") && message.contains("memory"), "{all}");
    ensure!(error["state"].as_str().is_some_and(|s| s.contains("live")), "{all}");
    Ok(())
}

fn lost_and_killed(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--on-post-copy-failure")? {
        return Ok(());
    }
    let _mutants = Mutants::start(bed, "live", &WORK)?;
    let (attempt, slow) = following(bed, &["--on-post-copy-failure", "kill"])?;
    let cut = Unplugged::pull(bed, Node::A)?;
    // longer than the silence that ends it
    std::thread::sleep(Duration::from_secs(6));
    drop((cut, slow));
    told(&attempt.finish()?)?;
    gone(bed)
}

fn lost_and_thawed(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--on-post-copy-failure")? {
        return Ok(());
    }
    let mut mutants = Mutants::start(bed, "live", &WORK)?;
    let (attempt, slow) = following(bed, &["--on-post-copy-failure", "thaw"])?;
    let cut = Unplugged::pull(bed, Node::A)?;
    std::thread::sleep(Duration::from_secs(6));
    drop((cut, slow));
    told(&attempt.finish()?)?;
    wait_for(Duration::from_secs(40), "it runs on node a again", || {
        Ok(container::status(bed, Node::A, "live")?.as_deref() == Some("RUNNING")
            && container::status(bed, Node::B, "live")?.as_deref() != Some("RUNNING"))
    })?;
    // it is thawed only when it is certain that the other node has killed it
    wait_for(Duration::from_secs(40), "it is thawed", || {
        Ok(container::exec(bed, Node::A, "live", &["true"])?.status.success())
    })?;
    // from the moment of its freeze, and whole
    mutants.verify()?;
    remove(bed)
}

fn source_dies(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--on-post-copy-failure")? {
        return Ok(());
    }
    let _mutants = Mutants::start(bed, "live", &WORK)?;
    let (attempt, slow) = following(bed, &[])?;
    // the shim, not what it has started
    let shims = trouble::processes(bed, Node::A, SHIM)?;
    let shim = shims.into_iter().min().context("no shim on node a")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL)?;
    drop(slow);
    told(&attempt.finish()?)?;
    gone(bed)
}
