//! The tables of docs/benchmarks.md: what stands between the two marks is ours, the rest is written by hand.

use std::fmt::Write;

use serde_json::Value;

use crate::summary::{Row, ratio};
use crate::workload::Workload;

const BEGIN: &str = "<!-- begin: written by hack/bench -->";
const END: &str = "<!-- end: written by hack/bench -->";

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if v.abs() < 100.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.0}"),
    }
}

fn megabytes(bytes: Option<f64>) -> String {
    bytes.map_or("-".into(), |b| format!("{:.0}", b / 1e6))
}

/// By its pace, and in brackets by its own time where that is known.
fn slower(row: &Row) -> String {
    let own = row.median_some(|f| f.lost_time_pct).map_or(String::new(), |lost| format!(" ({lost:.1})"));
    number(row.median_some(|f| f.slowdown_pct)) + &own
}

/// The machine, then a table for each workload.
pub fn tables(rows: &[Row], workloads: &[&Workload], machine: &Value) -> String {
    let text = |name: &str| machine[name].as_str().unwrap_or("?").to_owned();
    let mut out = format!(
        "{}: {} cores of {}, {} GiB, {}, kernel {}, cgroups {}, {}; load before the run {}.",
        text("date"),
        machine["cores"],
        text("cpu"),
        machine["memory_gib"],
        text("system"),
        text("kernel"),
        text("cgroups"),
        if machine["soft_dirty"] == true { "soft-dirty" } else { "no soft-dirty" },
        machine["load"],
    );
    for (name, version) in machine["programs"].as_object().into_iter().flatten() {
        let _ = write!(out, " {name}: {}.", version.as_str().unwrap_or("?"));
    }
    out.push('\n');
    for workload in workloads {
        let _ = write!(
            out,
            "\n### {}: {}\n\n| system | runs | gap ms (range) | gap / transship's | freeze ms | p99 after, ms | total ms | MB on the wire | slow-down % (own time) | extra MB at the destination | wrong |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
            workload.name, workload.about,
        );
        let mut notes = String::new();
        for row in rows.iter().filter(|r| r.workload == workload.name) {
            let range = row
                .gap_range()
                .map_or(String::new(), |(a, b)| format!(" ({}-{})", number(Some(a)), number(Some(b))));
            let _ = writeln!(
                out,
                "| {} | {} | {}{range} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.system,
                row.runs.len(),
                number(row.gap_ms()),
                number(ratio(rows, row)),
                number(row.median(|f| f.freeze_ms)),
                number(row.median_some(|f| f.p99_ms)),
                number(row.median(|f| f.total_ms)),
                megabytes(row.median(|f| f.bytes as f64)),
                slower(row),
                megabytes(row.median(|f| f.extra_bytes as f64)),
                row.wrong(),
            );
            if let Some(reason) = &row.skipped {
                let _ = writeln!(notes, "\n{}: not measured here: {reason}.", row.system);
            }
            if let Some(error) = row.errors.last() {
                let _ = writeln!(
                    notes,
                    "\n{} failed {} time(s); the last:\n\n    {}",
                    row.system,
                    row.errors.len(),
                    error.trim().replace('\n', "\n    ")
                );
            }
        }
        out += &notes;
    }
    out
}

/// `page` with new tables between the marks, or behind it when it has none.
pub fn insert(page: &str, tables: &str) -> String {
    let (head, tail) = match (page.find(BEGIN), page.find(END)) {
        (Some(begin), Some(end)) if begin < end => (&page[..begin], &page[end + END.len()..]),
        _ => (page, "\n"),
    };
    format!("{head}{BEGIN}\n\n{tables}\n{END}{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = insert("# Title\n\n", "one\n");
        let again = insert(&page, "two\n");
        assert!(
            again.starts_with("# Title\n\n<!-- begin") && again.contains("\ntwo\n") && !again.contains("one")
        );
        assert_eq!(insert(&again, "two\n"), again);
        assert_eq!(insert(&format!("{again}tail\n"), "3\n").lines().last(), Some("tail"));
    }
}
