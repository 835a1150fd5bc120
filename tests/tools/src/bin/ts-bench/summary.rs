//! From single moves to rows: medians, ranges and ratios.

use serde_json::{Value, json};

use crate::cell::Figures;

/// All runs of one workload under one system.
pub struct Row {
    pub workload: &'static str,
    pub system: &'static str,
    pub runs: Vec<Figures>,
    pub errors: Vec<String>,
    /// Why it is not measured on this machine at all.
    pub skipped: Option<String>,
}

/// The middle one, or the mean of the two in the middle; nothing of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (n > 0).then(|| (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0)
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

impl Row {
    pub fn median(&self, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.runs.iter().map(of)).map(tenth)
    }

    pub fn median_some(&self, of: impl Fn(&Figures) -> Option<f64>) -> Option<f64> {
        median(self.runs.iter().filter_map(of)).map(tenth)
    }

    pub fn gap_ms(&self) -> Option<f64> {
        self.median(|f| f.gap_ms)
    }

    /// Shortest and longest gap.
    pub fn gap_range(&self) -> Option<(f64, f64)> {
        let gaps = || self.runs.iter().map(|f| f.gap_ms);
        (!self.runs.is_empty())
            .then(|| (tenth(gaps().fold(f64::MAX, f64::min)), tenth(gaps().fold(0.0, f64::max))))
    }

    pub fn wrong(&self) -> u64 {
        self.runs.iter().map(|f| f.wrong).sum()
    }
}

/// How many times the gap of transship in the same workload this row's is: 1 for transship itself.
pub fn ratio(rows: &[Row], row: &Row) -> Option<f64> {
    let ours = rows.iter().find(|r| r.workload == row.workload && r.system == "transship")?.gap_ms()?;
    let ratio = row.gap_ms()? / ours;
    ratio.is_finite().then(|| (ratio * 100.0).round() / 100.0)
}

/// The rows of `--json`.
pub fn json(rows: &[Row], full: bool) -> Value {
    let one = |row: &Row| {
        let mut value = json!({
            "workload": row.workload, "system": row.system,
            "freeze_ms": row.median(|f| f.freeze_ms), "gap_ms": row.gap_ms(), "total_ms": row.median(|f| f.total_ms),
            "bytes": row.median(|f| f.bytes as f64).map(|b| b as u64), "ratio_gap": ratio(rows, row),
        });
        if row.wrong() > 0 || full {
            value["wrong"] = json!(row.wrong());
        }
        if row.skipped.is_some() {
            value["skipped"] = json!(row.skipped);
        }
        if !row.errors.is_empty() {
            value["error"] = json!(row.errors.last());
        }
        if full {
            value["gap_range_ms"] = json!(row.gap_range().map(|(a, b)| [a, b]));
            value["p99_after_ms"] = json!(row.median_some(|f| f.p99_ms));
            value["slowdown_pct"] = json!(row.median_some(|f| f.slowdown_pct));
            value["write_cost_pct"] = json!(row.median_some(|f| f.write_cost_pct));
            value["lost_time_pct"] = json!(row.median_some(|f| f.lost_time_pct));
            value["extra_bytes"] = json!(row.median(|f| f.extra_bytes as f64).map(|b| b as u64));
            value["errors"] = json!(row.errors);
            value["runs"] = row.runs.iter().map(Figures::json).collect();
        }
        value
    };
    rows.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: &'static str, gaps: &[f64]) -> Row {
        let runs = gaps.iter().map(|g| Figures { gap_ms: *g, bytes: 10, ..Figures::default() }).collect();
        Row { workload: "w", system, runs, errors: vec![], skipped: None }
    }

    #[test]
    fn medians_and_ratios() {
        let rows = [row("transship", &[60.0, 40.0, 50.0]), row("runc", &[1000.0, 1100.0]), row("lazy", &[])];
        assert_eq!(rows[1].gap_ms(), Some(1050.0));
        assert_eq!(rows[0].gap_range(), Some((40.0, 60.0)));
        let ratios: Vec<_> = rows.iter().map(|r| ratio(&rows, r)).collect();
        assert_eq!(ratios, [Some(1.0), Some(21.0), None]);
        let json = json(&rows, false);
        assert_eq!(
            (&json[1]["ratio_gap"], &json[1]["bytes"], &json[2]["gap_ms"]),
            (&json!(21.0), &json!(10), &Value::Null)
        );
    }
}
