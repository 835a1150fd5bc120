//! Files that are being written when the container is frozen: nothing is lost, nothing is there twice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};
use crate::moves;
use crate::output;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "files_appended", needs: Needs::Migration, run: files_appended }];

const WRITERS: usize = 3;

fn files_appended(bed: &Bed) -> Result<()> {
    let id = "fa1";
    output::forget(bed, id)?;
    let script = format!(
        "ts-probe append /data/one --every 1 & ts-probe appenders /data/many {WRITERS} --every 20 & wait; exec sleep 1000"
    );
    Run::new(bed, id, "probe").log()?.args(&["sh", "-c", &script]).start(Node::A)?;
    container::wait_log(bed, id, "append round=3")?;
    container::wait_log(bed, id, "appenders round=2")?;
    let mut before = 0;
    for (from, to) in [(Node::A, Node::B), (Node::B, Node::A), (Node::A, Node::B)] {
        let seen = output::arrived(bed, to, id)?.len();
        moves::migrate(bed, id, from, to)?;
        output::wait_rounds(bed, to, id, seen, &["append", "appenders"])?;
        let now = lines(bed, to, id)?;
        ensure!(now > before, "nothing was written on node {}", to.name());
        before = now;
    }
    // the writers end after a whole line
    container::exec(bed, Node::B, id, &["killall", "-TERM", "ts-probe"])?;
    wait_for(Duration::from_secs(10), "the writers' end", || {
        Ok(bed.ok(Node::B, &["ctr", "task", "ps", id])?.lines().count() == 2)
    })?;
    let checked = container::exec(bed, Node::B, id, &["ts-probe", "check-append", "/data/one"])?;
    ensure!(checked.status.success(), "{checked:?}");
    // what was reported is what is in the file: neither less nor more
    let said = rounds(bed, id, "append ")?;
    let there: u64 = String::from_utf8_lossy(&checked.stdout).trim().parse().context("check-append")?;
    ensure!(there == said, "{there} lines in the file, {said} were reported");
    let each = many(&container::file(bed, Node::B, id, "/data/many")?)?;
    ensure!(each.iter().all(|n| *n > 100), "{each:?}");
    let log = container::log(bed, id)? + &output::arrived(bed, Node::B, id)?;
    output::all_right(&log, "appenders")?;
    container::delete(bed, Node::B, id)
}

/// How many lines both files have; they must be whole up to the last but one (it is being written).
fn lines(bed: &Bed, node: Node, id: &str) -> Result<u64> {
    let text = String::from_utf8(container::file(bed, node, id, "/data/many")?).context("not text")?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    Ok(many(&text.as_bytes()[..whole])?.iter().sum())
}

/// The last number of each writer; fails unless each wrote 1, 2, 3 ...
fn many(bytes: &[u8]) -> Result<[u64; WRITERS]> {
    let mut last = [0; WRITERS];
    for (at, line) in std::str::from_utf8(bytes).context("not text")?.lines().enumerate() {
        let (writer, n) = line.split_once(' ').with_context(|| format!("line {at}: {line:?}"))?;
        let (writer, n): (usize, u64) = (writer.parse()?, n.parse()?);
        let of = last.get_mut(writer).with_context(|| format!("line {at}: {line:?}"))?;
        ensure!(n == *of + 1, "line {at}: after {of} writer {writer} wrote {n}");
        *of = n;
    }
    Ok(last)
}

/// The highest round that a workload has reported, wherever it was.
fn rounds(bed: &Bed, id: &str, workload: &str) -> Result<u64> {
    let mut all = container::log(bed, id)?;
    for node in Node::ALL {
        all += &output::arrived(bed, node, id)?;
    }
    let start = format!("{workload}round=");
    let number = |l: &str| l.strip_prefix(&start)?.split(' ').next()?.parse().ok();
    all.lines().filter_map(number).max().context("no round was reported")
}
