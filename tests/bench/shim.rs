//! `hack/bench shim`: the cost of our shim beside runc's own, on one containerd, in interleaved runs. How long a container takes to start
//! (Tasks.Create and Tasks.Start, as containerd sees them), alone and as a further one of a pod, a command in it, its deletion; and
//! the memory of the shim of an idle pod with one container and with ten.
//!
//! Not a test: nothing here fails because of a number. The bed (`hack/nodes`) is made by `hack/bench`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{DeleteProcessRequest, ExecProcessRequest, StartRequest, WaitRequest};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::Channel;
use prost_types::Any;
use serde_json::{Value, json};
use transship::containerd::record::Record;
use transship::containerd::task::Stdio;
use transship::containerd::{Containerd, Namespace};

const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.transship.v2"];
const NAMESPACE: &str = "default";
const SNAPSHOTTER: &str = "overlayfs";
/// How long a shim is left alone before it counts as idle.
const IDLE: Duration = Duration::from_secs(4);
/// Pods of each runtime whose memory is looked at, and their sizes.
const PODS: usize = 3;
const SIZES: [usize; 2] = [1, 10];
/// What of a shim's memory is shown: the kernel's names, in KiB; Threads is a count.
const MEMORY: [&str; 6] = ["VmRSS", "Pss", "RssAnon", "RssFile", "Private_Dirty", "Threads"];

/// The rows of times, in milliseconds: name, and what it is.
const TIMES: [(&str, &str); 7] = [
    ("create", "Tasks.Create of a container with a shim of its own"),
    ("start", "Tasks.Start of it"),
    ("create_and_start", "both"),
    ("exec", "a command in it: Exec, Start, its end, DeleteProcess"),
    ("delete", "Tasks.Delete after its end, with its shim"),
    ("member_create_and_start", "create and start of a further container of a pod"),
    ("member_delete", "its deletion"),
];

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}

fn nodes(args: &[&str]) -> Result<String> {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/nodes"));
    let output = command.args(args).output().context("hack/nodes")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("a header"));
    request
}

/// The server that was started for this container, by its command line.
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

fn memory(shim: &Path) -> Result<BTreeMap<String, f64>> {
    let mut found = BTreeMap::new();
    for file in ["status", "smaps_rollup"] {
        for line in std::fs::read_to_string(shim.join(file))?.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            if MEMORY.contains(&name) {
                let number = value.split_whitespace().next().unwrap_or_default();
                found.insert(name.to_owned(), number.parse().context(name.to_owned())?);
            }
        }
    }
    Ok(found)
}

/// The node's containerd, and what containers are made from.
struct Bench {
    ns: Namespace,
    tasks: TasksClient<Channel>,
    template: Record,
    parent: String,
}

/// All samples, by runtime and row.
#[derive(Default)]
struct Samples(BTreeMap<(usize, String), Vec<f64>>);

impl Samples {
    fn add(&mut self, runtime: usize, row: &str, value: f64) {
        self.0.entry((runtime, row.to_owned())).or_default().push(value);
    }

    fn median(&self, runtime: usize, row: &str) -> f64 {
        (median(self.0.get(&(runtime, row.to_owned())).cloned().unwrap_or_default()) * 10.0).round() / 10.0
    }
}

impl Bench {
    async fn new() -> Result<Bench> {
        let pid = nodes(&["pid", "a"])?;
        let socket = format!("/proc/{}/root/run/containerd/containerd.sock", pid.trim());
        nodes(&["exec", "a", "ctr", "c", "create", "localhost/probe:1", "tmpl", "ts-probe", "sleep"])?;
        let ns = Containerd::connect(Path::new(&socket)).await?.namespace(NAMESPACE)?;
        let template = ns.container("tmpl").await?.context("the template")?;
        let parent = ns.snapshot(SNAPSHOTTER, "tmpl").await?.context("the template's snapshot")?.parent;
        let tasks = TasksClient::new(containerd_client::connect(&socket).await.context("containerd")?);
        Ok(Bench { ns, tasks, template, parent })
    }

    /// Makes and starts a container; how long create and start took.
    async fn start(&self, runtime: usize, id: &str, pod: Option<&str>) -> Result<(f64, f64)> {
        let mut record = Record { id: id.into(), snapshot_key: id.into(), ..self.template.clone() };
        record.runtime = RUNTIMES[runtime].into();
        record.spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        if let Some(pod) = pod {
            record.spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": pod});
        }
        self.ns.container_create(record).await?;
        let mounts = self.ns.snapshot_prepare(SNAPSHOTTER, id, &self.parent, BTreeMap::default()).await?;
        let begin = Instant::now();
        self.ns.task_create(id, mounts, Stdio::default()).await?;
        let create = ms(begin);
        let begin = Instant::now();
        self.ns.task_start(id).await?;
        Ok((create, ms(begin)))
    }

    /// Ends a container and removes it; how long the deletion of its task took.
    async fn remove(&self, id: &str) -> Result<f64> {
        self.ns.task_kill(id).await?;
        self.ns.task_wait(id).await?;
        let begin = Instant::now();
        self.ns.task_delete(id).await?;
        let delete = ms(begin);
        self.ns.container_delete(id).await?;
        self.ns.snapshot_remove(SNAPSHOTTER, id).await?;
        Ok(delete)
    }

    /// A command in a container, from its announcement to its end.
    async fn exec(&self, id: &str) -> Result<f64> {
        let mut process = self.template.spec["process"].clone();
        process["args"] = json!(["true"]);
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
        };
        let (container_id, exec_id) = (id.to_owned(), "x".to_owned());
        let exec = ExecProcessRequest {
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            spec: Some(spec),
            ..Default::default()
        };
        let mut tasks = self.tasks.clone();
        let begin = Instant::now();
        tasks.exec(request(exec)).await?;
        let start = StartRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        tasks.start(request(start)).await?;
        let wait = WaitRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        let status = tasks.wait(request(wait)).await?.into_inner().exit_status;
        tasks.delete_process(request(DeleteProcessRequest { container_id, exec_id })).await?;
        let took = ms(begin);
        ensure!(status == 0, "the command ended with {status}");
        Ok(took)
    }

    /// One life of a container of its own and of one of a pod.
    async fn round(&self, runtime: usize, samples: &mut Samples) -> Result<()> {
        let (create, start) = self.start(runtime, "bench", None).await?;
        samples.add(runtime, "create", create);
        samples.add(runtime, "start", start);
        samples.add(runtime, "create_and_start", create + start);
        samples.add(runtime, "exec", self.exec("bench").await?);
        samples.add(runtime, "delete", self.remove("bench").await?);
        let pod = format!("pod{runtime}");
        let (create, start) = self.start(runtime, "member", Some(&pod)).await?;
        samples.add(runtime, "member_create_and_start", create + start);
        samples.add(runtime, "member_delete", self.remove("member").await?);
        Ok(())
    }

    async fn times(&self, runs: usize, samples: &mut Samples) -> Result<()> {
        for runtime in 0..RUNTIMES.len() {
            let pod = format!("pod{runtime}");
            self.start(runtime, &pod, Some(&pod)).await?;
        }
        // the first of each warms the page cache and does not count
        for n in 0..=runs {
            let mut unused = Samples::default();
            // each runtime goes first in every other round
            for k in 0..RUNTIMES.len() {
                let into = if n == 0 { &mut unused } else { &mut *samples };
                self.round((n + k) % RUNTIMES.len(), into).await?;
            }
        }
        for runtime in 0..RUNTIMES.len() {
            self.remove(&format!("pod{runtime}")).await?;
        }
        Ok(())
    }

    async fn memory(&self, samples: &mut Samples) -> Result<()> {
        let name = |runtime: usize, pod: usize, n: usize| format!("m{runtime}-{pod}-{n}");
        let all = || (0..RUNTIMES.len()).flat_map(|r| (0..PODS).map(move |pod| (r, pod)));
        let mut have = 0;
        for size in SIZES {
            for (runtime, pod) in all() {
                for n in have..size {
                    self.start(runtime, &name(runtime, pod, n), Some(&name(runtime, pod, 0))).await?;
                }
            }
            have = size;
            tokio::time::sleep(IDLE).await;
            for (runtime, pod) in all() {
                for (what, value) in memory(&shim_of(&name(runtime, pod, 0))?)? {
                    samples.add(runtime, &format!("{size} {what}"), value);
                }
            }
        }
        for (runtime, pod) in all() {
            for n in (0..have).rev() {
                self.remove(&name(runtime, pod, n)).await?;
            }
        }
        Ok(())
    }
}

fn load() -> Vec<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).filter_map(|n| n.parse().ok()).collect()
}

fn table(samples: &Samples) {
    let row = |name: &str, key: &str| {
        let [theirs, ours] = [0, 1].map(|runtime| samples.median(runtime, key));
        println!("{name:<34}{theirs:>12}{ours:>12}{:>8.2}", ours / theirs);
    };
    println!("{:<34}{:>12}{:>12}{:>8}", "median", "runc's shim", "transship", "ratio");
    for (name, _) in TIMES {
        row(&format!("{name} ms"), name);
    }
    for size in SIZES {
        for what in MEMORY {
            let unit = if what == "Threads" { "" } else { " KiB" };
            row(&format!("pod of {size}: {what}{unit}"), &format!("{size} {what}"));
        }
    }
}

/// All medians of a runtime.
fn summary(samples: &Samples, runtime: usize) -> Value {
    let times: BTreeMap<_, _> = TIMES.iter().map(|(row, _)| (*row, samples.median(runtime, row))).collect();
    let pod = |size: usize| -> BTreeMap<_, _> {
        MEMORY.iter().map(|what| (*what, samples.median(runtime, &format!("{size} {what}")))).collect()
    };
    json!({ "ms": times, "pod_of_1_kib": pod(SIZES[0]), "pod_of_10_kib": pod(SIZES[1]) })
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runs = args.iter().find_map(|a| a.parse().ok()).unwrap_or(20);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let before = load();
    let samples = runtime.block_on(async {
        let mut samples = Samples::default();
        let bench = Bench::new().await?;
        bench.times(runs, &mut samples).await?;
        bench.memory(&mut samples).await?;
        anyhow::Ok(samples)
    })?;
    let after = load();
    for (row, what) in TIMES {
        println!("{row}: {what}");
    }
    println!("\n{runs} runs, {PODS} pods; load average {before:?} before, {after:?} after\n");
    table(&samples);
    if args.iter().any(|a| a == "--json") {
        let runtimes: BTreeMap<_, _> =
            RUNTIMES.iter().enumerate().map(|(n, name)| (*name, summary(&samples, n))).collect();
        let whole = json!({ "bench": "shim", "runs": runs, "load": [before, after], "runtimes": runtimes });
        println!("{whole}");
    }
    Ok(())
}
