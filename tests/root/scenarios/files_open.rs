//! Files that are open when the container is frozen: renamed, deleted, mapped, locked, watched.

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::output;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "files_names_change", needs: Needs::Migration, run: files_names_change },
    Scenario { name: "files_mapped_and_deleted", needs: Needs::Migration, run: files_mapped_and_deleted },
    Scenario { name: "files_locked", needs: Needs::Migration, run: files_locked },
    Scenario { name: "files_watched", needs: Needs::Migration, run: files_watched },
    Scenario { name: "files_working_directory", needs: Needs::Migration, run: files_working_directory },
    Scenario { name: "files_over_the_ghost_limit", needs: Needs::Migration, run: files_over_the_ghost_limit },
];

const THERE_AND_BACK: [(Node, Node); 2] = [(Node::A, Node::B), (Node::B, Node::A)];

/// Runs these workloads side by side, moves them there and back; every round must find all as it was.
fn keep_checking(bed: &Bed, id: &str, workloads: &[(&str, &str)]) -> Result<()> {
    output::forget(bed, id)?;
    let mut script = String::from("mkdir /data/dir;");
    for (name, args) in workloads {
        script += &format!("ts-probe {name} {args} --every 20 &");
    }
    script += "wait";
    Run::new(bed, id, "probe").log()?.args(&["sh", "-c", &script]).start(Node::A)?;
    let names: Vec<&str> = workloads.iter().map(|(name, _)| *name).collect();
    for name in &names {
        container::wait_log(bed, id, &format!("{name} round=2 "))?;
    }
    for (from, to) in THERE_AND_BACK {
        moves::migrate(bed, id, from, to)?;
        output::wait_rounds(bed, to, id, 0, &names)?;
    }
    for name in &names {
        output::all_right(&container::log(bed, id)?, name)?;
        for node in Node::ALL {
            output::all_right(&output::arrived(bed, node, id)?, name)?;
        }
    }
    container::delete(bed, Node::A, id)
}

fn files_names_change(bed: &Bed) -> Result<()> {
    keep_checking(bed, "fn1", &[("names", "/data/dir")])
}

fn files_mapped_and_deleted(bed: &Bed) -> Result<()> {
    keep_checking(bed, "fm1", &[("mapped", "/data/mapped 3"), ("deleted", "/data/deleted 2")])
}

fn files_locked(bed: &Bed) -> Result<()> {
    keep_checking(bed, "fl1", &[("locks", "/data/dir")])
}

/// CRIU finds no path for a watch on overlayfs (criu issue 2854): refused, and the source goes on.
fn files_watched(bed: &Bed) -> Result<()> {
    let id = "fi1";
    output::forget(bed, id)?;
    let script = "mkdir /data/dir; exec ts-probe inotify /data/dir --every 20";
    Run::new(bed, id, "probe").log()?.args(&["sh", "-c", script]).start(Node::A)?;
    container::wait_log(bed, id, "inotify round=2 ")?;
    let outcome = moves::attempt(bed, id, Node::A, Node::B.address(), &[])?;
    let said = format!("{}{}", outcome.json, outcome.stderr);
    ensure!(outcome.code != 0 && said.contains("inotify"), "exit {}: {said}", outcome.code);
    kept_log(bed, &said, "Can't dump that handle")?;
    let so_far = container::log(bed, id)?.lines().count();
    container::wait_log(bed, id, &format!("inotify round={} ", so_far + 2))?;
    output::all_right(&container::log(bed, id)?, "inotify")?;
    container::delete(bed, Node::A, id)
}

/// CRIU's log is kept where the message says, and holds `line`. Removes it.
fn kept_log(bed: &Bed, said: &str, line: &str) -> Result<()> {
    let (_, log) = said.split_once("(log: ").context("no log is named")?;
    let log = bed.path(Node::A, log.split(')').next().unwrap_or_default())?;
    let text = std::fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    ensure!(text.contains(line), "{text}");
    Ok(std::fs::remove_file(log)?)
}

/// A shell in a directory that no longer exists, and one in a directory that was renamed.
fn files_working_directory(bed: &Bed) -> Result<()> {
    let id = "fw1";
    output::forget(bed, id)?;
    let script = "mkdir -p /data/x /data/y; cd /data/y; mv /data/y /data/z; \
                  (cd /data/x; rmdir /data/x; while sleep 0.05; do stat -c 'deleted %h' .; done) & \
                  while sleep 0.05; do echo here > f; cat /data/z/f; done";
    Run::new(bed, id, "probe").log()?.args(&["sh", "-c", script]).start(Node::A)?;
    container::wait_log(bed, id, "deleted 0\n")?;
    container::wait_log(bed, id, "here\n")?;
    for (from, to) in THERE_AND_BACK {
        moves::migrate(bed, id, from, to)?;
        output::wait_arrived(bed, to, id, "deleted 0\n")?;
        output::wait_arrived(bed, to, id, "here\n")?;
        let text = output::arrived(bed, to, id)?;
        ensure!(text.lines().all(|l| l == "here" || l == "deleted 0"), "{text}");
    }
    container::delete(bed, Node::A, id)
}

fn files_over_the_ghost_limit(bed: &Bed) -> Result<()> {
    let id = "fg1";
    output::forget(bed, id)?;
    let probe = Run::new(bed, id, "probe").log()?;
    probe.args(&["ts-probe", "deleted", "/data/deleted", "3", "--every", "20"]).start(Node::A)?;
    container::wait_log(bed, id, "deleted round=2 ")?;
    // the file has 3 MiB
    let outcome = moves::attempt(bed, id, Node::A, Node::B.address(), &["--ghost-limit", "2000000"])?;
    let said = format!("{}{}", outcome.json, outcome.stderr);
    ensure!(outcome.code != 0 && said.contains("ghost"), "exit {}: {said}", outcome.code);
    ensure!(container::status(bed, Node::A, id)?.as_deref() == Some("RUNNING"), "the source does not run");
    kept_log(bed, &said, "Can't dump ghost file")?;
    let so_far = container::log(bed, id)?.lines().count();
    container::wait_log(bed, id, &format!("deleted round={} ", so_far + 2))?;
    moves::migrate(bed, id, Node::A, Node::B)?;
    output::wait_rounds(bed, Node::B, id, 0, &["deleted"])?;
    output::all_right(&container::log(bed, id)?, "deleted")?;
    output::all_right(&output::arrived(bed, Node::B, id)?, "deleted")?;
    container::delete(bed, Node::B, id)
}
