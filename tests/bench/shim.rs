//! `hack/bench shim`: the cost of our shim beside runc's own, on one containerd, in interleaved runs. Two figures: how long a
//! container takes to start (Tasks.Create and Tasks.Start, as containerd sees them), and the memory of the idle shim.
//!
//! Not a test: nothing here fails because of a number. The bed (`hack/nodes`) is made by `hack/bench`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use transship::containerd::task::Stdio;
use transship::containerd::{Containerd, Namespace};

const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.transship.v2"];
const NAMESPACE: &str = "default";
/// How long a shim is left alone before it counts as idle.
const IDLE: Duration = Duration::from_secs(4);

/// One start of one container.
struct Run {
    create_ms: f64,
    start_ms: f64,
    /// In KiB, by the kernel's names: VmRSS, RssAnon, RssFile, RssShmem, Pss, Threads (a count).
    memory: BTreeMap<String, u64>,
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 { f64::NAN } else { (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0 }
}

/// A command in node a.
fn node(args: &[&str]) -> Result<String> {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/nodes"));
    let output = command.args(["exec", "a"]).args(args).output().context("hack/nodes")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

/// The server of this container, by its command line.
fn shim_of(id: &str) -> Result<PathBuf> {
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(line) = std::fs::read(path.join("cmdline")) else { continue };
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        let is_shim = words.first().is_some_and(|w| w.windows(16).any(|s| s == b"containerd-shim-"));
        if is_shim && words.windows(2).any(|w| w == [b"-id", id.as_bytes()]) {
            return Ok(path);
        }
    }
    anyhow::bail!("no shim of {id}")
}

fn memory(shim: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for file in ["status", "smaps_rollup"] {
        for line in std::fs::read_to_string(shim.join(file))?.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            if ["VmRSS", "RssAnon", "RssFile", "RssShmem", "Pss", "Private_Dirty", "Private_Clean", "Threads"]
                .contains(&name)
            {
                let number = value.split_whitespace().next().unwrap_or_default();
                found.insert(name.to_owned(), number.parse().context(name.to_owned())?);
            }
        }
    }
    Ok(found)
}

async fn start(ns: &Namespace, runtime: &str, id: &str) -> Result<(f64, f64)> {
    node(&[
        "ctr",
        "-n",
        NAMESPACE,
        "c",
        "create",
        "--runtime",
        runtime,
        "localhost/probe:1",
        id,
        "ts-probe",
        "sleep",
    ])?;
    let mounts = ns.snapshot_mounts("overlayfs", id).await?;
    let begin = Instant::now();
    ns.task_create(id, mounts, Stdio::default()).await?;
    let create_ms = ms(begin);
    let begin = Instant::now();
    ns.task_start(id).await?;
    Ok((create_ms, ms(begin)))
}

async fn remove(ns: &Namespace, id: &str) -> Result<()> {
    ns.task_remove(id, Duration::from_secs(10)).await?;
    node(&["ctr", "-n", NAMESPACE, "c", "rm", id]).map(drop)
}

async fn measure(runs: usize) -> Result<Vec<(usize, Run)>> {
    let pid: u32 = {
        let nodes = Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/nodes");
        let output = Command::new(nodes).args(["pid", "a"]).output()?;
        String::from_utf8_lossy(&output.stdout).trim().parse().context("the bed is not up")?
    };
    let socket = format!("/proc/{pid}/root/run/containerd/containerd.sock");
    let containerd = Containerd::connect(Path::new(&socket)).await?;
    let ns = containerd.namespace(NAMESPACE)?;
    let mut done = Vec::new();
    // the first of each warms the page cache and does not count
    for n in 0..=runs {
        let mut started = Vec::new();
        // each runtime goes first in every other round
        for k in 0..RUNTIMES.len() {
            let which = (n + k) % RUNTIMES.len();
            let id = format!("bench-{which}");
            let (create_ms, start_ms) = start(&ns, RUNTIMES[which], &id).await?;
            started.push((which, id, create_ms, start_ms));
        }
        // memory in a few rounds only: it takes time and hardly varies
        let with_memory = n > 0 && n <= 3;
        if with_memory {
            tokio::time::sleep(IDLE).await;
        }
        for (which, id, create_ms, start_ms) in started {
            let memory = if with_memory { memory(&shim_of(&id)?)? } else { BTreeMap::new() };
            remove(&ns, &id).await?;
            if n > 0 {
                done.push((which, Run { create_ms, start_ms, memory }));
            }
        }
    }
    Ok(done)
}

/// The medians of one runtime.
fn summary(runs: &[&Run]) -> Value {
    let all = |f: fn(&Run) -> f64| (median(runs.iter().map(|r| f(r))) * 10.0).round() / 10.0;
    let mut memory = BTreeMap::new();
    for name in runs.iter().flat_map(|r| r.memory.keys()) {
        let value = median(runs.iter().filter_map(|r| r.memory.get(name)).map(|v| *v as f64));
        memory.insert(name.clone(), value as u64);
    }
    json!({
        "runs": runs.len(),
        "create_ms": all(|r| r.create_ms),
        "start_ms": all(|r| r.start_ms),
        "create_and_start_ms": all(|r| r.create_ms + r.start_ms),
        "memory_kib": memory,
    })
}

fn table(runtimes: &BTreeMap<&str, Value>) {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |name: &str, get: &dyn Fn(&Value) -> Value| {
        rows.push((name.into(), RUNTIMES.iter().map(|r| get(&runtimes[r]).to_string()).collect()));
    };
    for name in ["create_ms", "start_ms", "create_and_start_ms"] {
        row(name, &|v| v[name].clone());
    }
    for name in ["VmRSS", "RssAnon", "RssFile", "Pss", "Private_Dirty", "Private_Clean", "Threads"] {
        row(&format!("idle {name}{}", if name == "Threads" { "" } else { " KiB" }), &|v| {
            v["memory_kib"][name].clone()
        });
    }
    println!("{:<24}{:>24}{:>28}", "median", RUNTIMES[0], RUNTIMES[1]);
    for (name, values) in rows {
        println!("{name:<24}{:>24}{:>28}", values[0], values[1]);
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runs = args.iter().find_map(|a| a.parse().ok()).unwrap_or(20);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(measure(runs))?;
    let mut runtimes = BTreeMap::new();
    for (which, name) in RUNTIMES.iter().enumerate() {
        let own: Vec<&Run> = done.iter().filter(|(w, _)| *w == which).map(|(_, r)| r).collect();
        runtimes.insert(*name, summary(&own));
    }
    table(&runtimes);
    if args.iter().any(|a| a == "--json") {
        println!("{}", json!({ "bench": "shim", "runtimes": runtimes }));
    }
    Ok(())
}
