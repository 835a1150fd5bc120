//! `transship migrate`, as an operator would type it.

use serde_json::Value;

use super::{ID, Move, System};
use crate::bed::{Bed, address};
use crate::workload::{IP, MAC, Workload};

pub struct Transship;

impl System for Transship {
    fn name(&self) -> &'static str {
        "transship"
    }

    fn about(&self) -> &'static str {
        "`transship migrate`, TLS 1.3 between the nodes"
    }

    fn start(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        bed.nodes(&["pod", "a", ID, IP, MAC])?;
        let (image, netns) = (format!("localhost/{}:1", workload.image), format!("network:/run/netns/{ID}"));
        let mut line = vec!["ctr", "run", "-d", "--null-io", "--runtime", "io.containerd.transship.v2"];
        line.extend(["--with-ns", &netns, &image, ID]);
        line.extend(workload.command);
        bed.a.run(&line, 30).map(drop)
    }

    fn migrate(&mut self, bed: &mut Bed, _: &Workload) -> Result<Move, String> {
        let answer = bed.a.run(&["transship", "migrate", ID, "--to", address("b"), "--json"], 550)?;
        let output = answer["output"].as_str().unwrap_or_default();
        let line = output.lines().rev().find(|l| l.starts_with('{')).ok_or("transship said nothing")?;
        let result: Value = serde_json::from_str(line).map_err(|e| format!("{line}: {e}"))?;
        let report = &result["report"];
        let freeze_ms = report["freeze_ms"].as_f64().ok_or_else(|| format!("no freeze_ms in {line}"))?;
        let time = |name: &str| answer[name].as_f64().unwrap_or_default();
        Ok(Move { begin: time("begin"), end: time("end"), freeze_ms, detail: report.clone() })
    }

    fn clean(&mut self, bed: &mut Bed) {
        for node in [&mut bed.a, &mut bed.b] {
            node.try_sh(&format!(
                "ctr t kill -s KILL {ID}; for i in 1 2 3 4 5 6 7 8 9 10; do ctr t rm -f {ID} && break; sleep 0.1; done; ctr c rm {ID}"
            ));
        }
        for node in ["a", "b"] {
            let _ = bed.nodes(&["unpod", node, ID]);
        }
    }
}
