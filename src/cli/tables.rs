//! A migration's report as tables: phases, rounds, what the freeze was spent on. Pure; the terminal and the page show them.

use super::table::{Align, render};
use super::units;
use crate::migrate::report::{Report, Round, Side, fused};

/// Columns and rows, not yet laid out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Headings.
    pub columns: Vec<(&'static str, Align)>,
    /// Cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// For a terminal; nothing if it has no rows.
    pub fn text(&self) -> String {
        if self.rows.is_empty() { String::new() } else { render(&self.columns, &self.rows) }
    }
}

/// The phases of both shims.
pub fn phases(report: &Report) -> Table {
    let mut rows = Vec::new();
    for (side, phases) in [("source", &report.phases), ("dest", &report.destination_phases)] {
        for phase in fused(phases) {
            rows.push(vec![
                format!("{side}: {}", phase.name),
                format!("{:.0}", phase.start_ms),
                format!("{:.1}", phase.ms),
            ]);
        }
    }
    Table { columns: vec![("phase", Align::Left), ("start", Align::Right), ("ms", Align::Right)], rows }
}

/// The rounds; of more than `most` the first and the last ones. `files` are those of the writable layer and of tmpfs.
pub fn rounds(report: &Report, most: usize) -> Table {
    let all = &report.rounds;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let half = most / 2;
    let shown = |n: usize| all.len() <= most || n < half || n >= all.len() - half;
    for (n, round) in all.iter().enumerate() {
        if shown(n) {
            rows.push(row(round));
        } else if n == half {
            rows.push(vec!["…".into()]);
        }
    }
    let right = ["ms", "copied", "sent", "zero pages", "MB/s", "written again", "written/s", "files"];
    let columns = std::iter::once(("round", Align::Right)).chain(right.map(|c| (c, Align::Right))).collect();
    Table { columns, rows }
}

fn row(round: &Round) -> Vec<String> {
    let files = round.layer_bytes + round.tmpfs_bytes;
    let rate = units::per_second(round.wire_bytes + files, round.ms);
    vec![
        round.n.to_string(),
        format!("{:.1}", round.ms),
        units::bytes(round.bytes),
        units::bytes(round.wire_bytes),
        round.zero_pages.to_string(),
        rate.map_or("-".into(), |r| format!("{:.1}", r as f64 / 1e6)),
        units::bytes(round.dirty_after_bytes),
        units::bytes(round.dirty_rate),
        units::bytes(files),
    ]
}

/// What the freeze was spent on.
pub fn freeze(report: &Report) -> Table {
    let rows = report.freeze_items().into_iter().map(|item| {
        let side = match item.side {
            Side::Source => "source",
            Side::Destination => "dest",
        };
        vec![item.name, side.into(), format!("{:.1}", item.start_ms), format!("{:.1}", item.ms)]
    });
    let columns =
        vec![("freeze", Align::Left), ("on", Align::Left), ("start", Align::Right), ("ms", Align::Right)];
    Table { columns, rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::report::Item;

    #[test]
    fn rounds_on_fixed_input() {
        let round = |n| Round {
            n,
            ms: 500.0,
            bytes: 268_435_456,
            wire_bytes: 100_000_000,
            zero_pages: 12,
            dirty_after_bytes: 20_000_000,
            dirty_rate: 40_000_000,
            layer_bytes: 1_000_000,
            tmpfs_bytes: 2_000_000,
            ..Round::default()
        };
        let mut report = Report { rounds: vec![round(1)], ..Report::default() };
        assert_eq!(
            rounds(&report, 10).text(),
            "\
round     ms    copied      sent  zero pages   MB/s  written again  written/s   files
    1  500.0  268.4 MB  100.0 MB          12  206.0        20.0 MB    40.0 MB  3.0 MB
"
        );
        report.rounds = (1..=100).map(round).collect();
        let table = rounds(&report, 10);
        let first: Vec<&str> = table.rows.iter().map(|r| r[0].as_str()).collect();
        assert_eq!(first, ["1", "2", "3", "4", "5", "…", "96", "97", "98", "99", "100"]);
        assert_eq!(rounds(&report, usize::MAX).rows.len(), 100);
        assert_eq!(rounds(&Report::default(), 10).text(), "");
    }

    #[test]
    fn the_freeze_on_fixed_input() {
        let item = |name: &str, start_ms, ms, side| Item { name: name.into(), start_ms, ms, side };
        let report = Report {
            freeze: vec![
                item("CRIU restore", 30.04, 20.0, Side::Destination),
                item("CRIU dump", 3.0, 25.5, Side::Source),
            ],
            ..Report::default()
        };
        assert_eq!(
            freeze(&report).text(),
            "\
freeze        on      start    ms
CRIU dump     source    3.0  25.5
CRIU restore  dest     30.0  20.0
"
        );
    }
}
