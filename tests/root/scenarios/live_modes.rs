//! What the operator chooses of a live migration, and what the report says of it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::live::{self, Mutants};
use crate::requirements::Needs;
use crate::transship;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "live_compression", needs: Needs::Migration, run: compression },
    Scenario { name: "live_faster_than_the_link", needs: Needs::Migration, run: faster_than_the_link },
    Scenario { name: "live_report", needs: Needs::Migration, run: report },
    Scenario { name: "live_doctor_names_the_tracker", needs: Needs::Migration, run: doctor },
];

/// The shim's own report.
fn measured(report: &Value) -> Result<&Value> {
    let shim = &report["shim"];
    ensure!(shim.is_object(), "no report of the shim in {report}");
    Ok(shim)
}

fn compression(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--compress")? {
        return Ok(());
    }
    let mut mutants = Mutants::start(bed, "live", &["writes,thp,shared-anon,files", "--mb", "16"])?;
    for how in ["none", "lz4", "zstd", "auto"] {
        let report = mutants.go(&["--compress", how])?;
        let said = &measured(&report)?["compression"];
        ensure!(how == "auto" && said.is_string() || *said == how, "{how} was asked for: {report}");
    }
    mutants.end()
}

/// Writes more in a second than may be sent: rounds would never end. What is left follows after it runs there, and is right.
fn faster_than_the_link(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--bandwidth")? {
        return Ok(());
    }
    let line = ["writes,mmap", "--mb", "48", "--rate", "100", "--threads", "1"];
    let mut mutants = Mutants::start(bed, "live", &line)?;
    let options = ["--mode", "auto", "--bandwidth", "25MB/s", "--max-downtime", "100ms"];
    let report = mutants.go(&options)?;
    let measured = measured(&report)?;
    ensure!(measured["mode"] == "post-copy", "it should have gone post-copy: {report}");
    ensure!(measured["post_copy"]["bytes"].as_u64() > Some(0), "nothing followed: {report}");
    ensure!(measured["post_copy"]["lost"].as_u64() == Some(0), "something was lost: {report}");
    // and in a mode that leaves nothing behind it arrives as well, whatever it costs
    let options = ["--mode", "pre-copy", "--bandwidth", "50MB/s", "--max-downtime", "100ms"];
    let report = mutants.go(&options)?;
    ensure!(self::measured(&report)?["mode"] == "pre-copy", "{report}");
    mutants.end()
}

/// Milliseconds of `0..whole` in which at least one of the items was at work.
fn covered(items: &[Value], whole: f64) -> f64 {
    let mut spans: Vec<(f64, f64)> = items
        .iter()
        .filter_map(|i| Some((i["start_ms"].as_f64()?, i["start_ms"].as_f64()? + i["ms"].as_f64()?)))
        .map(|(from, to)| (from.max(0.0), to.min(whole)))
        .collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut covered, mut until) = (0.0, 0.0_f64);
    for (from, to) in spans {
        covered += (to - from.max(until)).max(0.0);
        until = until.max(to);
    }
    covered
}

fn report(bed: &Bed) -> Result<()> {
    if !live::has(bed, "--mode")? {
        return Ok(());
    }
    let mut mutants = Mutants::start(bed, "live", &["writes,fork,files", "--mb", "32"])?;
    for mode in ["pre-copy", "post-copy"] {
        let report = mutants.go(&["--mode", mode])?;
        let shim = measured(&report)?;
        ensure!(shim["mode"] == mode, "{mode} was asked for: {report}");
        let freeze = shim["freeze_ms"].as_f64().context("freeze_ms")?;
        ensure!(report["freeze_ms"].as_f64() == Some(freeze) && freeze > 0.0, "{report}");
        let items = shim["freeze"].as_array().context("no items of the freeze")?;
        for name in ["freeze", "CRIU dump", "CRIU restore"] {
            ensure!(items.iter().any(|i| i["name"] == name), "no {name:?} among {items:?}");
        }
        let covered = covered(items, freeze);
        ensure!(covered > freeze / 2.0, "the items explain {covered} of {freeze} ms: {items:?}");
        let late = items.iter().find(|i| i["start_ms"].as_f64() > Some(freeze * 1.5 + 50.0));
        ensure!(late.is_none(), "after the freeze of {freeze} ms: {late:?}");
        let rounds = shim["rounds"].as_array().context("rounds")?;
        let memory = 32 << 20;
        if mode == "pre-copy" {
            ensure!(!rounds.is_empty(), "no round: {report}");
            ensure!(rounds[0]["bytes"].as_u64() >= Some(memory), "the first round has all: {rounds:?}");
            let numbers: Vec<_> = rounds.iter().filter_map(|r| r["n"].as_u64()).collect();
            ensure!(numbers == (1..=rounds.len() as u64).collect::<Vec<_>>(), "{rounds:?}");
            ensure!(
                shim["bytes_sent"].as_u64()
                    >= rounds.iter().map(|r| r["wire_bytes"].as_u64()).sum::<Option<u64>>(),
                "{report}"
            );
            ensure!(shim["post_copy"].is_null() || shim["post_copy"]["bytes"] == 0, "{report}");
        } else {
            ensure!(shim["post_copy"]["bytes"].as_u64() >= Some(memory / 2), "little followed: {report}");
            let faults: u64 =
                ["local", "remote", "zero"].iter().filter_map(|k| shim["faults"][k].as_u64()).sum();
            ensure!(faults > 0, "nobody waited for a page: {report}");
        }
    }
    mutants.end()
}

/// The tracker that doctor names is the one that a migration uses.
fn doctor(bed: &Bed) -> Result<()> {
    let said = transship::attempt(bed, Node::A, &["doctor"])?.json.to_string();
    let named = ["uffd-wp", "soft-dirty", "hash"].into_iter().find(|t| said.contains(&format!("\"{t} (")));
    let named = named.with_context(|| format!("no tracker in {said}"))?;
    if live::has(bed, "--mode")? {
        let mut mutants = Mutants::start(bed, "live", &["writes"])?;
        let report = mutants.go(&["--mode", "pre-copy"])?;
        ensure!(measured(&report)?["tracker"] == named, "doctor says {named}: {report}");
        mutants.end()?;
    }
    Ok(())
}
