//! `hack/bench`'s own program: workloads times systems on the same two nodes, medians, ratios.
//!
//! Here: options and the order of things. `bed.rs` and `node.rs` are the two nodes as seen from outside and inside, `workload.rs` what
//! is moved, `systems/` who moves it, `cell.rs` one measurement, `summary.rs` what comes of many, `picture.rs` and `page.rs` show it,
//! `again.rs` brings back what was measured before.

mod again;
mod bed;
mod cell;
mod copy;
mod machine;
mod memory;
mod node;
mod page;
mod picture;
mod summary;
mod systems;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};
use transship_testtools::args::Args;

use bed::Bed;
use summary::Row;
use systems::System;
use workload::Workload;

const HELP: &str = "ts-bench run [options]   (by hack/bench, which makes what is needed)
  --nodes FILE          hack/nodes
  --workloads A,B       only these; --systems A,B: only these; --list: says which there are
  --link RATE           the nodes' links shaped to this (as tc writes it) for all workloads
  --runs N              moves of each (default 5)
  --quick               redis-1g and writer-1g-100, transship and runc, 3 runs
  --seconds S           no further round is begun that would not end by then (at least one is run)
  --json                the last line is one JSON array
  --out FILE            the machine, and every figure of every run, as JSON
  --picture FILE        the gaps as SVG
  --page FILE           the tables, into a Markdown file between its marks
ts-bench show FILE...    what runs wrote with --out, into --picture and --page again; of what is in several the last one's
ts-bench node            the helper inside a node";

const QUICK: (&[&str], &[&str]) = (&["redis-1g", "writer-1g-100"], &["transship", "runc"]);

fn say(text: &str) {
    eprintln!("bench: {text}");
}

/// Those of `all` whose names were asked for.
fn choose<T>(
    all: Vec<T>,
    name: impl Fn(&T) -> &'static str,
    wanted: Option<Vec<&str>>,
) -> Result<Vec<T>, String> {
    let Some(wanted) = wanted else { return Ok(all) };
    let known: Vec<&str> = all.iter().map(&name).collect();
    if let Some(unknown) = wanted.iter().find(|w| !known.contains(w)) {
        return Err(format!("{unknown:?} is not one of {}", known.join(", ")));
    }
    Ok(all.into_iter().filter(|t| wanted.contains(&name(t))).collect())
}

fn available_mb() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// The bed of all measurements, and where its things are.
struct Bench<'a> {
    nodes: PathBuf,
    images: Vec<&'a str>,
    /// Overrides the workloads' own.
    link: Option<&'a str>,
    dir: PathBuf,
    bed: Option<Bed>,
}

impl Bench<'_> {
    /// The bed; a new one when there is none.
    fn bed(&mut self) -> Result<&mut Bed, String> {
        let bed = match self.bed.take() {
            Some(bed) => bed,
            None => Bed::up(&self.nodes, &self.images)?,
        };
        Ok(self.bed.insert(bed))
    }

    /// Why this cannot be measured on this machine.
    fn obstacle(workload: &Workload, system: &dyn System) -> Option<String> {
        let (needs, has) = (workload.needs_mb * system.memory_percent() / 100, available_mb());
        system.unavailable().or_else(|| {
            (has < needs).then(|| format!("needs {needs} MB of memory, the machine has {has} MB available"))
        })
    }

    /// One measurement; a bed on which something failed is made anew.
    fn measure(&mut self, workload: &Workload, system: &mut dyn System) -> Result<cell::Figures, String> {
        let (link, dir) = (self.link.or(workload.link), self.dir.clone());
        let result = cell::run(self.bed()?, workload, link, system, &dir);
        if result.is_err() {
            self.bed = None;
        }
        result
    }
}

/// What runs in the nodes.
fn programs(bed: &mut Bed) -> Vec<(&'static str, String)> {
    let mut line =
        |script: &str| bed.a.sh(script).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
    vec![
        ("transship", line("transship --version")),
        ("runc", line("runc --version")),
        ("containerd", line("containerd --version")),
        ("CRIU", line("criu --version")),
    ]
}

fn write(path: &str, content: &str) -> Result<(), String> {
    std::fs::write(path, content).map_err(|e| format!("{path}: {e}"))
}

/// The picture and the page, if they are asked for.
fn show(args: &Args, machine: &Value, rows: &[Row]) -> Result<(), String> {
    if let Some(path) = args.option("picture") {
        let about = ["date", "cpu", "kernel"].map(|n| machine[n].as_str().unwrap_or("?")).join(", ");
        write(path, &picture::svg(rows, &about))?;
    }
    if let Some(path) = args.option("page") {
        let measured = workload::ALL.iter().filter(|w| rows.iter().any(|r| r.workload == w.name));
        let page = std::fs::read_to_string(path).unwrap_or_default();
        write(path, &page::insert(&page, &page::tables(rows, &measured.collect::<Vec<_>>(), machine)))?;
    }
    Ok(())
}

/// Earlier runs.
fn show_again(args: &mut Args) -> Result<bool, String> {
    let files: Vec<String> = std::iter::from_fn(|| args.position("FILE").ok()).collect();
    let (machine, rows) = again::read(&files)?;
    show(args, &machine, &rows).map(|()| true)
}

fn run(args: &Args) -> Result<bool, String> {
    let quick = args.flag("quick");
    let list = |name: &str| args.option(name).map(|text| text.split(',').collect::<Vec<_>>());
    let quickly = |wanted: Option<Vec<&'static str>>, these: &[&'static str]| {
        if quick && wanted.is_none() { Some(these.to_vec()) } else { wanted }
    };
    // options outlive the run: they are few
    let leak = |names: Option<Vec<&str>>| {
        names.map(|n| {
            n.into_iter().map(|s| &*Box::leak(s.to_owned().into_boxed_str())).collect::<Vec<&'static str>>()
        })
    };
    let workloads = choose(
        workload::ALL.iter().collect(),
        |w: &&Workload| w.name,
        quickly(leak(list("workloads")), QUICK.0),
    )?;
    let mut systems = choose(systems::all(), |s| s.name(), quickly(leak(list("systems")), QUICK.1))?;
    if args.flag("list") {
        workloads.iter().for_each(|w| println!("{:<18}{}", w.name, w.about));
        systems.iter().for_each(|s| println!("{:<18}{}", s.name(), s.about()));
        return Ok(true);
    }
    let runs = args.option_number("runs", if quick { 3 } else { 5 })?.max(1) as usize;
    let budget = args.option_number("seconds", u64::MAX)?;
    let nodes = PathBuf::from(args.option("nodes").ok_or("--nodes is missing")?);
    let link = args.option("link");
    let mut images: Vec<&str> = workloads.iter().map(|w| w.image).collect();
    images.sort_unstable();
    images.dedup();
    let dir = std::env::temp_dir().join(format!("ts-bench.{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;

    let mut rows: Vec<Row> = Vec::new();
    for workload in &workloads {
        for system in &systems {
            rows.push(Row {
                workload: workload.name,
                system: system.name(),
                runs: vec![],
                errors: vec![],
                skipped: None,
            });
        }
    }
    let start = Instant::now();
    let mut bench = Bench { nodes, images, link, dir, bed: None };
    let machine = machine::describe(&programs(bench.bed()?));
    let mut longest = 0;
    for round in 0..runs {
        let begin = start.elapsed().as_secs();
        if round > 0 && begin + longest > budget {
            say(&format!("no time for more than {round} of {runs} rounds"));
            break;
        }
        let mut row = rows.iter_mut();
        for workload in &workloads {
            for system in &mut systems {
                let Some(row) = row.next() else { break };
                // what failed twice, or never worked, is not tried for ever
                if round >= workload.max_runs || row.errors.len() >= 2 {
                    continue;
                }
                if let Some(reason) = Bench::obstacle(workload, system.as_ref()) {
                    if row.skipped.is_none() {
                        say(&format!("{} {} is not measured: {reason}", workload.name, system.name()));
                    }
                    row.skipped = Some(reason);
                    continue;
                }
                match bench.measure(workload, system.as_mut()) {
                    Ok(f) => {
                        say(&format!(
                            "{}/{runs} {} {}: freeze {:.0} ms, gap {:.0} ms, total {:.0} ms, {:.1} MB{}",
                            round + 1,
                            workload.name,
                            system.name(),
                            f.freeze_ms,
                            f.gap_ms,
                            f.total_ms,
                            f.bytes as f64 / 1e6,
                            if f.wrong > 0 {
                                format!(", {} WRONG: {}", f.wrong, f.detail["wrong"])
                            } else {
                                String::new()
                            },
                        ));
                        row.runs.push(f);
                    }
                    Err(e) => {
                        say(&format!("{}/{runs} {} {} failed: {e}", round + 1, workload.name, system.name()));
                        row.errors.push(e);
                    }
                }
            }
        }
        longest = longest.max(start.elapsed().as_secs() - begin);
    }
    bench.bed = None;
    let _ = std::fs::remove_dir_all(&bench.dir);
    if let Some(path) = args.option("out") {
        write(path, &format!("{:#}\n", json!({"machine": machine, "rows": summary::json(&rows, true)})))?;
    }
    show(args, &machine, &rows)?;
    if args.flag("json") {
        println!("{}", summary::json(&rows, false));
    }
    Ok(rows.iter().all(|r| r.wrong() == 0 && (r.system != "transship" || r.errors.is_empty())))
}

fn main() -> ExitCode {
    let mut args = Args::new(std::env::args().skip(1), &["help", "quick", "json", "list"]);
    let result = match args.position("run, show or node").as_deref() {
        Ok("node") => node::run().map(|()| true),
        Ok("run") => run(&args),
        Ok("show") => show_again(&mut args),
        _ => Err(HELP.into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}
