//! Checkpoint files that are damaged: nothing is made of them, and the same name can be used afterwards.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves::Outcome;
use crate::requirements::Needs;
use crate::trouble::{self, failed};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[Scenario { name: "files_damaged", needs: Needs::Migration, run: damaged }];

fn transship(bed: &Bed, node: Node, args: &[&str]) -> Result<Outcome> {
    let output = bed.run(node, &[&["transship"], args, &["--json"]].concat())?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(Outcome { code: output.status.code().unwrap_or(-1), json, stderr })
}

fn damaged(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "t1", "10.77.6.4")?;
    let probe = Run::new(bed, "t1", "probe").pod("t1").log()?;
    probe.args(&["ts-probe", "count", "--every", "20"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")?;
    let dir = bed.shared()?;
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let good = path("good.ts");
    let written = transship(bed, Node::A, &["checkpoint", "t1", "--output", &good])?;
    ensure!(written.code == 0, "{} {}", written.json, written.stderr);
    container::delete(bed, Node::A, "t1")?;
    container::unpod(bed, Node::A, "t1")?;
    let bytes = std::fs::read(&good)?;
    let bad = path("bad.ts");
    let refused = |what: &str, bytes: &[u8]| -> Result<()> {
        std::fs::write(&bad, bytes)?;
        let outcome = transship(bed, Node::B, &["restore", &bad])?;
        failed(&outcome, 12, &["bad.ts"]).map_err(|e| e.context(what.to_owned()))?;
        Ok(())
    };
    refused("an empty file", b"")?;
    refused("another kind of file", b"#!/bin/sh\nexit 0\n")?;
    for cut in [1, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        refused(&format!("cut at {cut}"), &bytes[..cut])?;
    }
    refused("something behind it", &[&bytes[..], b"x"].concat())?;
    for at in [0, 9, 40, bytes.len() / 3, bytes.len() / 2, bytes.len() - 5] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        refused(&format!("a bit flipped at {at}"), &bytes)?;
    }
    let gone = transship(bed, Node::B, &["restore", &path("nosuch.ts")])?;
    failed(&gone, 2, &["nosuch.ts"])?;
    trouble::nothing_on(bed, Node::B)?;
    // the good one is still good
    let restored = transship(bed, Node::B, &["restore", &good])?;
    ensure!(restored.code == 0, "{} {}", restored.json, restored.stderr);
    container::wait_status(bed, Node::B, "t1", "RUNNING")?;
    // its name is taken now
    failed(&transship(bed, Node::B, &["restore", &good])?, 5, &["t1", "already"])?;
    container::delete(bed, Node::B, "t1")
}
