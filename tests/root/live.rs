//! What the scenarios about live migrations share: a container whose processes change their memory in every way and check it
//! (`ts-probe mutate`), moves in all modes, and the search for what a tracker or a page daemon may leave behind.

use std::collections::HashSet;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::moves;
use crate::traffic;
use crate::trouble;

/// Options for a move in each mode; the moves of a scenario take them in turns.
pub const MODES: [&[&str]; 3] = [&["--mode", "pre-copy"], &["--mode", "post-copy"], &["--mode", "auto"]];

/// Whether `transship migrate` has this option. Said once where it has not.
pub fn has(bed: &Bed, option: &str) -> Result<bool> {
    static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let help = bed.ok(Node::A, &["transship", "migrate", "--help"])?;
    let there = help.split_whitespace().any(|word| word == option);
    let mut said = SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !there && said.get_or_insert_default().insert(option.to_owned()) {
        eprintln!("skipped: what needs {option}: `transship migrate` does not have it");
    }
    Ok(there)
}

/// These options (an option, its value, and so on) without those that do not exist.
pub fn known<'a>(bed: &Bed, options: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut known = Vec::new();
    for pair in options.chunks(2) {
        if has(bed, pair[0])? {
            known.extend(pair);
        }
    }
    Ok(known)
}

/// Whether tests can stop a migration there. Said where they cannot.
pub fn has_point(point: &str) -> bool {
    let there = transship::migrate::fault::POINTS.contains(&point);
    if !there {
        eprintln!("skipped: what needs the fault point {point}: there is none of that name");
    }
    there
}

/// A container in which `ts-probe mutate` runs.
pub struct Mutants<'a> {
    bed: &'a Bed,
    /// The container.
    pub id: String,
    /// Where it is.
    pub at: Node,
    /// Steps at the last verification: they never become fewer.
    steps: u64,
    moves: usize,
}

impl<'a> Mutants<'a> {
    /// Starts `ts-probe mutate ARGS` on node a.
    pub fn start(bed: &'a Bed, id: &str, args: &[&str]) -> Result<Mutants<'a>> {
        let line: Vec<&str> = ["ts-probe", "mutate"].iter().chain(args).copied().collect();
        traffic::start(bed, Node::A, id, &[], &line)?;
        let mut mutants = Mutants { bed, id: id.into(), at: Node::A, steps: 0, moves: 0 };
        traffic::wait_inside(bed, id, "mutate ready")?;
        mutants.verify()?;
        Ok(mutants)
    }

    /// Has all of it checked, where it is: every byte is right, and it is not older than it was. What the controller said.
    pub fn verify(&mut self) -> Result<Value> {
        let output = container::exec(self.bed, self.at, &self.id, &["ts-probe", "ask", "verify"])?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let answer: Option<Value> = stdout.lines().last().and_then(|l| serde_json::from_str(l).ok());
        let Some(answer) = answer.filter(|a| a["ok"] == true && output.status.success()) else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{} after {} moves: {stdout}{stderr}{}", self.id, self.moves, self.wrong());
        };
        let steps = answer["steps"].as_u64().context("steps")?;
        ensure!(
            steps > self.steps && answer["pages"].as_u64() > Some(0),
            "{} has gone back from step {} to {steps}: {answer}",
            self.id,
            self.steps
        );
        self.steps = steps;
        Ok(answer)
    }

    /// What it said of wrong bytes; else its last lines.
    pub fn wrong(&self) -> String {
        let said = traffic::inside(self.bed, &self.id).unwrap_or_default();
        let wrong: Vec<&str> = said.lines().filter(|l| l.contains("WRONG")).collect();
        if wrong.is_empty() { traffic::tail(&said) } else { wrong.join("\n") }
    }

    /// Moves it to the other node, with those of the options that exist, and has it verified there. The report.
    pub fn go(&mut self, options: &[&str]) -> Result<Value> {
        let options = known(self.bed, options)?;
        let (from, to) = (self.at, self.at.other());
        let outcome = moves::attempt(self.bed, &self.id, from, to.address(), &options)?;
        let said = format!("migrate {options:?}: exit {}: {}{}", outcome.code, outcome.json, outcome.stderr);
        ensure!(outcome.code == 0, "{said}\n{}", self.wrong());
        self.at = to;
        self.moves += 1;
        let context = || format!("move {} with {options:?}", self.moves);
        let here = container::status(self.bed, from, &self.id)?;
        ensure!(here.is_none(), "{}: still on node {}: {here:?}", context(), from.name());
        let verified = self.verify();
        verified
            .with_context(|| format!("move {} with {options:?}: {}", self.moves, outcome.json["report"]))?;
        Ok(outcome.json["report"].clone())
    }

    /// As many moves, in all modes in turns, starting with a given one.
    pub fn travel(&mut self, moves: usize, first_mode: usize) -> Result<()> {
        (0..moves).try_for_each(|n| self.go(MODES[(first_mode + n) % MODES.len()]).map(drop))
    }

    /// It runs on node a as before, nothing of a migration is in it or on either node.
    pub fn untouched(&mut self) -> Result<()> {
        let status = container::status(self.bed, Node::A, &self.id)?;
        ensure!(status.as_deref() == Some("RUNNING"), "{} on node a: {status:?}", self.id);
        self.at = Node::A;
        self.verify()?;
        no_traces(self.bed, Node::A)?;
        no_traces(self.bed, Node::B)?;
        trouble::nothing_on(self.bed, Node::B)
    }

    /// It stands where it is without a trace of its moves; then it is removed.
    pub fn end(mut self) -> Result<()> {
        no_traces(self.bed, Node::A)?;
        no_traces(self.bed, Node::B)?;
        self.verify()?;
        container::delete(self.bed, self.at, &self.id)
    }
}

/// Processes on the node whose memory a userfaultfd is registered for, that hold such a descriptor, or that are being traced; one a
/// line.
pub fn traces(bed: &Bed, node: Node) -> Result<String> {
    // uw: write-protected by a userfaultfd, um: its missing pages are
    let script = r#"for p in /proc/[0-9]*; do
        c=$(tr '\0' ' ' 2> /dev/null < $p/cmdline | cut -c1-60) || continue
        if grep -qsE '^VmFlags:.* (uw|um)( |$)' $p/smaps; then echo "registered: ${p#/proc/} $c"; fi
        if ls -l $p/fd 2> /dev/null | grep -q userfaultfd; then echo "descriptor: ${p#/proc/} $c"; fi
        if grep -qsE '^TracerPid:\s+[1-9]' $p/status; then echo "traced: ${p#/proc/} $c"; fi
    done"#;
    bed.sh(node, script)
}

/// There are none (see [`traces`]), or soon none: a page daemon may still be at work.
pub fn no_traces(bed: &Bed, node: Node) -> Result<()> {
    let mut found = String::new();
    let clean = wait_for(Duration::from_secs(20), "no traces", || {
        found = traces(bed, node)?;
        Ok(found.trim().is_empty())
    });
    clean.map_err(|_| anyhow::anyhow!("left on node {}:\n{found}", node.name()))
}

/// A link that is slow in both directions while this lives.
pub struct Slow<'a>(&'a Bed);

impl<'a> Slow<'a> {
    /// As many megabits a second (tc's tbf at the switch).
    pub fn link(bed: &'a Bed, megabits: u32) -> Result<Slow<'a>> {
        let slow = Slow(bed);
        for node in Node::ALL {
            let rate = format!("{megabits}mbit");
            let tail = ["tbf", "rate", &rate, "burst", "256kb", "latency", "100ms"];
            slow.tc(&[&["replace", "dev", &format!("p{}", node.name()), "root"], &tail[..]].concat())?;
        }
        Ok(slow)
    }

    fn tc(&self, args: &[&str]) -> Result<()> {
        let switch = format!("{}-sw", trouble::prefix(self.0)?);
        let line = [&["-n", &switch, "qdisc"], args].concat();
        ensure!(Command::new("tc").args(&line).status()?.success(), "tc {line:?}");
        Ok(())
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        for node in Node::ALL {
            if let Err(e) = self.tc(&["del", "dev", &format!("p{}", node.name()), "root"]) {
                eprintln!("{e:#}");
            }
        }
    }
}
