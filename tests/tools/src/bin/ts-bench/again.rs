//! Earlier runs, as `--out` wrote them: read back, to be shown again or together.

use serde_json::Value;

use crate::cell::Figures;
use crate::summary::Row;
use crate::{systems, workload};

/// The rows of all files, in the order of the workloads; of what is in several the last one's. With the first one's machine.
pub fn read(paths: &[String]) -> Result<(Value, Vec<Row>), String> {
    let (mut machine, mut rows) = (None, Vec::new());
    for path in paths {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
        let run: Value = serde_json::from_str(&text).map_err(|e| format!("{path}: {e}"))?;
        for value in run["rows"].as_array().ok_or_else(|| format!("{path}: no run of hack/bench"))? {
            let new = row(value).map_err(|what| format!("{path}: {what}"))?;
            rows.retain(|old: &Row| (old.workload, old.system) != (new.workload, new.system));
            rows.push(new);
        }
        machine.get_or_insert(run["machine"].clone());
    }
    rows.sort_by_key(|row| workload::ALL.iter().position(|w| w.name == row.workload));
    Ok((machine.ok_or("no file to read")?, rows))
}

fn row(value: &Value) -> Result<Row, String> {
    let known = |what: &str, mut all: Box<dyn Iterator<Item = &'static str>>| {
        let name = value[what].as_str().unwrap_or_default().to_owned();
        all.find(|known| *known == name).ok_or_else(|| format!("no {what} {name:?}"))
    };
    let texts = |list: &Value| {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(String::from).collect()
    };
    Ok(Row {
        workload: known("workload", Box::new(workload::ALL.iter().map(|w| w.name)))?,
        system: known("system", Box::new(systems::all().into_iter().map(|s| s.name())))?,
        runs: value["runs"].as_array().into_iter().flatten().map(figures).collect(),
        errors: texts(&value["errors"]),
        skipped: value["skipped"].as_str().map(String::from),
    })
}

fn figures(run: &Value) -> Figures {
    let number = |name: &str| run[name].as_f64().unwrap_or(f64::NAN);
    let count = |name: &str| run[name].as_u64().unwrap_or_default();
    Figures {
        freeze_ms: number("freeze_ms"),
        gap_ms: number("gap_ms"),
        p99_ms: run["p99_after_ms"].as_f64(),
        total_ms: number("total_ms"),
        bytes: count("bytes"),
        slowdown_pct: run["slowdown_pct"].as_f64(),
        write_cost_pct: run["write_cost_pct"].as_f64(),
        lost_time_pct: run["lost_time_pct"].as_f64(),
        extra_bytes: count("extra_bytes"),
        wrong: count("wrong"),
        detail: run["detail"].clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary;
    use serde_json::json;

    fn file(gap_ms: f64, workload: &'static str, system: &'static str) -> String {
        let run = Figures {
            gap_ms,
            freeze_ms: 1.5,
            bytes: 7,
            slowdown_pct: Some(3.0),
            lost_time_pct: Some(2.5),
            ..Figures::default()
        };
        let errors = vec!["once".to_owned(), "twice".to_owned()];
        let rows = [Row { workload, system, runs: vec![run.clone(), run], errors, skipped: None }];
        let path = std::env::temp_dir().join(format!("ts-bench-again.{}.{gap_ms}", std::process::id()));
        let text = json!({"machine": {"cores": gap_ms}, "rows": summary::json(&rows, true)}).to_string();
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn what_was_written_is_read_and_the_last_word_counts() {
        let files = [file(1.0, "tree", "runc"), file(2.0, "shell", "transship"), file(3.0, "tree", "runc")];
        let (machine, rows) = read(&files).unwrap();
        files.iter().for_each(|f| std::fs::remove_file(f).unwrap());
        let names: Vec<_> = rows.iter().map(|r| (r.workload, r.system, r.gap_ms(), r.runs.len())).collect();
        assert_eq!(names, [("shell", "transship", Some(2.0), 2), ("tree", "runc", Some(3.0), 2)]);
        assert_eq!((rows[1].errors.len(), rows[1].runs[0].bytes), (2, 7));
        assert_eq!((rows[1].runs[0].slowdown_pct, machine["cores"].as_f64()), (Some(3.0), Some(1.0)));
        assert_eq!(rows[1].runs[0].lost_time_pct, Some(2.5));
        assert!(read(&["/nowhere".into()]).err().unwrap().contains("/nowhere"));
        assert!(row(&json!({"workload": "shell", "system": "x"})).err().unwrap().contains("no system"));
    }
}
