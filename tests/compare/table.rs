//! What is printed at the end: scenario, runc's shim, ours, the same or not; then the differences that are meant, with their reasons.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::bed::Containerd;
use crate::meant::LIST;
use crate::record::Difference;

/// One scenario's result.
pub struct Row {
    /// On which containerd.
    pub containerd: Containerd,
    /// Its name.
    pub scenario: &'static str,
    /// How many observations there were with runc's shim, and with ours.
    pub seen: [usize; 2],
    /// What differed as it is meant to, by the place in the list.
    pub meant: Vec<(usize, Difference)>,
    /// What differed otherwise.
    pub real: usize,
    /// How long both sides took.
    pub took: Duration,
}

/// Prints the table.
pub fn print(rows: &[Row]) {
    let width = rows.iter().map(|r| r.scenario.len() + 5).max().unwrap_or(8).max(8);
    println!("\n{:<width$}  {:>9}  {:>9}  {:>6}  result", "scenario", "runc shim", "transship", "time");
    let mut reasons: BTreeMap<(usize, &str), Vec<String>> = BTreeMap::new();
    for row in rows {
        let name = format!("{}::{}", row.containerd, row.scenario);
        let verdict = match (row.real, row.meant.len()) {
            (0, 0) => "same".to_owned(),
            (0, n) => format!("same, but for {n} meant"),
            (n, _) => format!("DIFFERENT in {n}"),
        };
        let took = row.took.as_secs_f64();
        println!("{name:<width$}  {:>9}  {:>9}  {took:>5.1}s  {verdict}", row.seen[0], row.seen[1]);
        for (place, difference) in &row.meant {
            let names = reasons.entry((*place, LIST[*place].reason)).or_default();
            names.push(format!("{name}, {difference}"));
        }
    }
    if reasons.is_empty() {
        return;
    }
    println!("\ndifferences that are meant (tests/compare/meant.rs):");
    for ((_, reason), places) in reasons {
        let more = if places.len() > 1 { format!(" (and {} more)", places.len() - 1) } else { String::new() };
        println!("- {reason}\n  {}{more}", places[0]);
    }
}
