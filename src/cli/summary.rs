//! What `transship migrate` prints when it is done: phases, rounds, the freeze item by item, and the sums. Pure.

use super::table::{Align, render};
use super::{tables, units};
use crate::agent::api::Report;
use crate::migrate::report::{Report as ShimReport, fused};

/// Rounds that are shown on a terminal.
const ROUNDS: usize = 16;

/// The shim's part of a report; `None` for a cold move and for a shape that this version does not know.
pub fn of_shim(report: &Report) -> Option<ShimReport> {
    report.shim.as_ref().and_then(|v| serde_json::from_value::<ShimReport>(v.clone()).ok())
}

/// All of it. `began`: phases with the millisecond in which this command heard of them.
pub fn summary(report: &Report, began: &[(String, u64)], warnings: &[String]) -> String {
    let shim = of_shim(report);
    let mut text = phases(report, shim.as_ref(), began);
    if let Some(shim) = &shim {
        for table in [tables::rounds(shim, ROUNDS), tables::freeze(shim)] {
            if !table.rows.is_empty() {
                text.push_str(&(table.text() + "\n"));
            }
        }
    }
    // Bytes flow between the shims: their own time says how fast, not the agent's preparations.
    let sending = shim.as_ref().map_or(report.total_ms, |s| s.total_ms);
    let rate = units::per_second(report.bytes_sent, sending)
        .map(|r| format!(" ({}/s)", units::bytes(r)))
        .unwrap_or_default();
    if report.cold {
        text.push_str(&format!("sent    {}{rate}, cold\n", units::bytes(report.bytes_sent)));
    } else {
        text.push_str(&format!("freeze  {}\n", units::ms(report.freeze_ms)));
        text.push_str(&format!("sent    {}{rate}\n", units::bytes(report.bytes_sent)));
    }
    if let Some(shim) = &shim {
        text.push_str(&memory(shim));
    }
    if report.blob_bytes > 0 {
        text.push_str(&format!("image   {}\n", units::bytes(report.blob_bytes)));
    }
    for warning in warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    let what = if report.cold { "lies" } else { "runs" };
    text.push_str(&format!(
        "{} {what} on {} now (from {}, {})\n",
        report.container,
        report.to,
        report.from,
        units::ms(report.total_ms)
    ));
    text
}

fn phases(report: &Report, shim: Option<&ShimReport>, began: &[(String, u64)]) -> String {
    let mut rows = Vec::new();
    let mut sum = 0.0;
    let own: Vec<_> = report
        .phases
        .iter()
        .map(|phase| {
            // What was heard is exact; without it (a name that was not announced) the phases follow each other.
            let start = began.iter().find(|(n, _)| *n == phase.name).map_or(sum, |(_, at)| *at as f64);
            sum = start + phase.ms;
            crate::migrate::report::Phase { name: phase.name.clone(), start_ms: start, ms: phase.ms }
        })
        .collect();
    for phase in fused(&own) {
        rows.push(vec![phase.name, format!("{:.0}", phase.start_ms), format!("{:.1}", phase.ms)]);
    }
    for mut row in shim.map(|s| tables::phases(s).rows).unwrap_or_default() {
        row[0].insert_str(0, "  ");
        rows.push(row);
    }
    let columns = [("phase", Align::Left), ("start", Align::Right), ("ms", Align::Right)];
    if rows.is_empty() { String::new() } else { render(&columns, &rows) + "\n" }
}

/// How memory moved.
fn memory(shim: &ShimReport) -> String {
    let mut how: Vec<String> = shim.mode.iter().cloned().collect();
    if let Some(rate) = shim.dirty_rate() {
        let rounds =
            if shim.rounds.len() == 1 { "1 round".into() } else { format!("{} rounds", shim.rounds.len()) };
        how.push(rounds);
        how.push(format!("{}/s written meanwhile", units::bytes(rate)));
    }
    how.extend(shim.tracker.iter().map(|t| format!("tracker {t}")));
    how.extend(shim.compression.iter().map(|c| format!("compression {c}")));
    let mut text = String::new();
    let mut line = |label: &str, parts: &[String]| {
        if !parts.is_empty() {
            text.push_str(&format!("{label:<7} {}\n", parts.join(", ")));
        }
    };
    line("memory", &how);
    let mut there = Vec::new();
    let faults = &shim.faults;
    if faults.total() > 0 {
        there.push(format!("{} faults served there", faults.local));
        let took = match faults.remote_us {
            (0, _) => String::new(),
            (median, p99) => {
                let ms = |us: u64| units::ms(us as f64 / 1e3);
                format!(" ({} median, {} p99)", ms(median), ms(p99))
            }
        };
        there.push(format!("{} asked of the source{took}", faults.remote));
        there.push(format!("{} of zero pages", faults.zero));
    }
    line("faults", &there);
    let mut after = Vec::new();
    if let Some(post) = &shim.post_copy {
        after.push(format!("{} followed in {}", units::bytes(post.bytes), units::ms(post.ms)));
        if post.lost > 0 {
            after.push(format!("{} lost", units::bytes(post.lost)));
        }
    }
    if shim.fill_ms > 0.0 {
        after.push(format!(
            "{} put into place in {}",
            units::bytes(shim.fill_bytes),
            units::ms(shim.fill_ms)
        ));
    }
    if shim.store_peak_bytes > 0 {
        after.push(format!("page store up to {}", units::bytes(shim.store_peak_bytes)));
    }
    line("after", &after);
    text
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;
    use crate::agent::api::PhaseTime;

    /// A move as the agent reports it.
    pub fn report() -> Report {
        let phase = |name: &str, ms| PhaseTime { name: name.into(), ms };
        Report {
            container: "redis".into(),
            from: "node-a".into(),
            to: "node-b".into(),
            total_ms: 812.0,
            freeze_ms: 231.4,
            bytes_sent: 268_435_456,
            phases: vec![phase("preflight", 12.0), phase("prepare", 300.0), phase("transfer", 500.0)],
            ..Report::default()
        }
    }

    #[test]
    fn the_table_on_fixed_input() {
        let began =
            [("preflight".to_string(), 0), ("prepare".to_string(), 12), ("transfer".to_string(), 312)];
        assert_eq!(
            summary(&report(), &began, &["the clock jumped".into()]),
            "\
phase      start     ms
preflight      0   12.0
prepare       12  300.0
transfer     312  500.0

freeze  231.4 ms
sent    268.4 MB (330.6 MB/s)
warning: the clock jumped
redis runs on node-b now (from node-a, 812.0 ms)
"
        );
    }

    #[test]
    fn without_events_phases_follow_each_other_and_the_shims_are_shown() {
        let mut report = report();
        report.shim = Some(json!({
            "migration_id": "m", "freeze_ms": 231.4, "total_ms": 400.0, "bytes_sent": 1,
            "phases": [{ "name": "dump", "start_ms": 1.0, "ms": 58.0 }],
            "destination_phases": [{ "name": "restore", "start_ms": 60.0, "ms": 20.0 }],
        }));
        let text = summary(&report, &[], &[]);
        assert!(text.contains("transfer           312  500.0\n"), "{text}");
        assert!(text.contains("  source: dump       1   58.0\n"), "{text}");
        assert!(text.contains("  dest: restore     60   20.0\n"), "{text}");
        assert!(text.contains("(671.1 MB/s)"), "{text}");
    }

    #[test]
    fn a_report_of_an_unknown_shape_is_no_obstacle() {
        let report = Report { shim: Some(json!("?")), phases: vec![], cold: true, ..report() };
        let text = summary(&report, &[], &[]);
        assert!(
            text.starts_with("sent ") && text.contains("cold") && text.contains("lies on node-b"),
            "{text}"
        );
    }

    #[test]
    fn how_memory_moved_is_said_in_words() {
        let mut report = report();
        report.phases = ["round 1", "round 2"].map(|n| PhaseTime { name: n.into(), ms: 5.0 }).to_vec();
        report.shim = Some(json!({
            "migration_id": "m", "freeze_ms": 68.0, "total_ms": 400.0, "bytes_sent": 1, "phases": [],
            "mode": "post-copy", "tracker": "uffd-wp", "compression": "lz4",
            "rounds": [{ "n": 1, "ms": 100.0, "bytes": 1_000_000, "dirty_rate": 5_000_000 }],
            "freeze": [{ "name": "CRIU dump", "start_ms": 1.0, "ms": 20.0, "side": "source" }],
            "faults": { "local": 7, "remote": 3, "zero": 1 },
            "post_copy": { "ms": 1200.0, "pages": 10, "bytes": 120_000_000 },
            "fill_ms": 50.0, "fill_bytes": 64_000_000, "store_peak_bytes": 300_000_000,
        }));
        let text = summary(&report, &[], &[]);
        for line in [
            "rounds      0  10.0\n",
            "CRIU dump  source    1.0  20.0\n",
            "memory  post-copy, 1 round, 5.0 MB/s written meanwhile, tracker uffd-wp, compression lz4\n",
            "faults  7 faults served there, 3 asked of the source, 1 of zero pages\n",
            "after   120.0 MB followed in 1.20 s, 64.0 MB put into place in 50.0 ms, page store up to 300.0 MB\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
