//! `transship checkpoint` and `transship restore` with bad input and in trouble: a clear error, nothing left, the container runs on.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::requirements::Needs;
use crate::transship;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "checkpoint_output_unusable", needs: Needs::Migration, run: output_unusable },
    Scenario { name: "checkpoint_disk_full", needs: Needs::Migration, run: disk_full },
    Scenario { name: "checkpoint_container_unsuitable", needs: Needs::Migration, run: container_unsuitable },
    Scenario { name: "restore_of_a_bad_file", needs: Needs::Migration, run: bad_file },
];

/// A counter that is seen to go on.
fn counter(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "count", "--every", "10"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")
}

fn runs_on(bed: &Bed) -> Result<()> {
    let lines = container::log(bed, "t1")?.lines().count();
    container::wait_log(bed, "t1", &format!("out {}\n", lines + 3)).context("the container does not run on")
}

fn output_unusable(bed: &Bed) -> Result<()> {
    counter(bed)?;
    let there = bed.shared()?.join("there");
    std::fs::write(&there, "mine")?;
    let there = there.to_str().context("path")?.to_owned();
    transship::refused(bed, Node::A, &["checkpoint", "t1", "-o", &there], 2, "exists")?;
    ensure!(std::fs::read_to_string(&there)? == "mine", "an existing file was touched");
    transship::refused(bed, Node::A, &["checkpoint", "t1", "-o", "/no/such/dir/x"], 2, "No such file")?;
    transship::refused(bed, Node::A, &["checkpoint", "t1", "-o", "/proc/x"], 2, "/proc/x")?;
    bed.sh(Node::A, "mkdir -p /run/ro; mount -t tmpfs -o ro tmpfs /run/ro")?;
    let read_only =
        transship::refused(bed, Node::A, &["checkpoint", "t1", "-o", "/run/ro/x"], 2, "Read-only");
    bed.sh(Node::A, "umount /run/ro; rmdir /run/ro")?;
    read_only?;
    runs_on(bed)?;
    container::delete(bed, Node::A, "t1")
}

fn disk_full(bed: &Bed) -> Result<()> {
    counter(bed)?;
    // at several sizes, so that it ends in different parts of the file
    bed.sh(Node::A, "mkdir -p /run/small")?;
    for kib in [4, 16, 64, 100] {
        bed.sh(Node::A, &format!("mount -t tmpfs -o size={kib}k tmpfs /run/small"))?;
        let said = transship::attempt(bed, Node::A, &["checkpoint", "t1", "-o", "/run/small/x"]);
        let left = bed.sh(Node::A, "ls -A /run/small; umount /run/small")?;
        let said = said?;
        let text = said.json.to_string();
        ensure!(
            said.code != 0 && text.contains("checkpoint file: No space left"),
            "{kib} KiB: exit {}: {text}",
            said.code
        );
        ensure!(left.is_empty(), "{kib} KiB: left behind: {left}");
        runs_on(bed).with_context(|| format!("{kib} KiB"))?;
    }
    bed.sh(Node::A, "rmdir /run/small")?;
    container::delete(bed, Node::A, "t1")
}

fn container_unsuitable(bed: &Bed) -> Result<()> {
    let path = bed.shared()?.join("none.ckpt");
    let path = path.to_str().context("path")?;
    transship::refused(bed, Node::A, &["checkpoint", "nobody", "-o", path], 3, "nobody")?;
    counter(bed)?;
    transship::refused(bed, Node::A, &["checkpoint", "t1", "-n", "elsewhere", "-o", path], 3, "elsewhere")?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "KILL", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    transship::refused(bed, Node::A, &["checkpoint", "t1", "-o", path], 4, "does not run")?;
    container::delete(bed, Node::A, "t1")?;
    let runc = [
        "ctr",
        "run",
        "-d",
        "--null-io",
        "--runtime",
        "io.containerd.runc.v2",
        "localhost/probe:1",
        "t1",
        "ts-probe",
        "sleep",
    ];
    bed.ok(Node::A, &runc)?;
    let said = transship::attempt(bed, Node::A, &["checkpoint", "t1", "-o", path])?;
    ensure!(said.code != 0 && said.error().contains("transship"), "{}", said.json);
    container::delete(bed, Node::A, "t1")?;
    ensure!(!Path::new(path).exists(), "a file was left");
    Ok(())
}

fn bad_file(bed: &Bed) -> Result<()> {
    counter(bed)?;
    let dir = bed.shared()?;
    let good = dir.join("good.ckpt");
    let _ = std::fs::remove_file(&good);
    transship::ok(bed, Node::A, &["checkpoint", "t1", "-o", good.to_str().context("path")?])?;
    container::delete(bed, Node::A, "t1")?;
    let bytes = std::fs::read(&good)?;
    let bad = dir.join("bad.ckpt");
    let bad_path = bad.to_str().context("path")?;
    let mut flipped = bytes.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty", b"", "not a transship checkpoint"),
        ("something else", b"#!/bin/sh\necho hello\n", "not a transship checkpoint"),
        ("cut short", &bytes[..bytes.len() - 1], "damaged or truncated"),
        ("cut in the manifest", &bytes[..100], ""),
        ("one bit", &flipped, "damaged"),
        ("more behind it", &[bytes.as_slice(), b"x"].concat(), "follow its end"),
    ];
    for (name, content, text) in cases {
        std::fs::write(&bad, content)?;
        let said = transship::attempt(bed, Node::A, &["restore", bad_path])?;
        ensure!(
            said.code == 12 && said.json.to_string().contains(text),
            "{name}: exit {}: {}",
            said.code,
            said.json
        );
        bed.expect_clean().with_context(|| name.to_owned())?;
    }
    transship::refused(bed, Node::A, &["restore", "/no/such/file"], 2, "No such file")?;
    transship::ok(bed, Node::A, &["restore", good.to_str().context("path")?])?;
    container::delete(bed, Node::A, "t1")
}
