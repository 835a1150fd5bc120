//! Root tests: real containerd (1.7 and 2.1), runc, CRIU and redis in two nodes on this machine. `tests/README.md` says how to
//! run and write them.
//!
//! | file | what lives there |
//! |---|---|
//! | `bed.rs` | the two nodes: up, down, commands in them, logs, the check for leaks |
//! | `container.rs` | containers, pods and images through ctr |
//! | `client.rs` | the redis client outside of the nodes |
//! | `cri/` | pods over CRI, under runc's handler and under ours |
//! | `live.rs` | a container whose processes check their memory, moves in all modes, what trackers leave behind |
//! | `matrix/` | the fault matrix |
//! | `many.rs` | containers without ctr, many at once |
//! | `manifest.rs` | what a directory tree holds, to be compared later |
//! | `moves.rs` | migrations through the command line |
//! | `output.rs` | what a container that moves has written, on either node |
//! | `trouble.rs` | a container that must not notice, the shape of errors, faults |
//! | `transship.rs` | the command `transship`, with --json |
//! | `service.rs` | containerd's Task service |
//! | `shims.rs` | the shim's process: which it is, what it holds |
//! | `requirements.rs` | what this machine has, and why a scenario is skipped |
//! | `traffic.rs` | workloads that are checked across moves, in containers and in the client's network |
//! | `watch.rs` | a scenario that hangs |
//! | `scenarios/` | the scenarios, one subject per file |
//!
//! Every scenario runs once for each containerd (`c17::name`, `c21::name`), one after the other; those of one containerd share a
//! bed. After each, nothing of it may be left in either node.

mod bed;
mod client;
mod container;
mod cri;
mod live;
mod manifest;
mod many;
mod matrix;
mod moves;
mod output;
mod requirements;
mod scenarios;
mod service;
mod shims;
mod traffic;
mod transship;
mod trouble;
mod watch;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bed::{Bed, Containerd};
use libtest_mimic::{Arguments, Failed, Trial};
use requirements::Needs;

/// One thing to show, on a bed that is clean when it starts and must be clean when it ends.
pub struct Scenario {
    /// Unique; what it shows.
    pub name: &'static str,
    /// What it cannot run without.
    pub needs: Needs,
    /// Does it.
    pub run: fn(&Bed) -> anyhow::Result<()>,
}

type Shared = Arc<Mutex<Option<Bed>>>;

/// Runs one scenario on the shared bed, which is made first if there is none (or the last one was spoilt).
fn trial(scenario: &Scenario, containerd: Containerd, shared: &Shared) -> Result<(), Failed> {
    let mut shared = shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // taken, not borrowed: if the scenario panics, the bed goes down with it and the next one gets a new bed
    let mut bed = match shared.take() {
        Some(bed) => bed,
        None => Bed::up(containerd).map_err(|e| format!("{e:#}"))?,
    };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        watch::limited(scenario.name, || {
            bed.prepare(scenario.needs)?;
            (scenario.run)(&bed)?;
            bed.expect_clean()
        })
    }));
    let error = match outcome {
        Ok(Ok(())) => {
            *shared = Some(bed);
            return Ok(());
        }
        Ok(Err(e)) => format!("{e:#}"),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or("panicked".into())
        }
    };
    let logs = bed.logs();
    bed.spoil();
    // at the end, where it is seen even if only the end is kept
    Err(format!("{logs}\n{error}").into())
}

/// What each scenario took, for those who have to keep the whole run short.
static TOOK: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// Says where the time went, if there was much.
fn say_what_took_longest() {
    let mut took = TOOK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let sum: Duration = took.iter().map(|(time, _)| *time).sum();
    took.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    let longest: Vec<String> =
        took.iter().take(12).map(|(t, name)| format!("{name} {:.0}", t.as_secs_f64())).collect();
    if took.len() > longest.len() {
        println!(
            "\n{:.0} s in {} scenarios; the longest: {}",
            sum.as_secs_f64(),
            took.len(),
            longest.join(", ")
        );
    }
}

/// This machine is small and its neighbours are noisy: a scenario that fails gets a second chance on a new bed. It is said when one
/// was needed, so that a scenario that needs it often is noticed.
fn twice(name: &str, run: impl Fn() -> Result<(), Failed>) -> Result<(), Failed> {
    let start = Instant::now();
    let outcome = run();
    TOOK.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((start.elapsed(), name.to_owned()));
    let Err(first) = outcome else { return Ok(()) };
    if std::env::var_os("TRANSSHIP_NO_RETRY").is_some() {
        return Err(first);
    }
    eprintln!("second try: {name}: {}", first.message().unwrap_or_default());
    run()
}

/// How such scenarios begin as have little to do with containerd: how memory, files and connections are moved, what is refused, who is let in.
const HALVED: [&str; 6] = ["live_", "files_", "net_", "refused_", "fails_", "peer_"];

/// Whether a run of everything tries the scenario under this containerd: half of those that are [`HALVED`] are tried under one, half under the
/// other. TRANSSHIP_TEST_MATRIX=all: all under both.
fn is_for(containerd: Containerd, number: usize, name: &str) -> bool {
    let all = std::env::var("TRANSSHIP_TEST_MATRIX").is_ok_and(|m| m == "all");
    let odd = containerd == Containerd::V21;
    all || !HALVED.iter().any(|h| name.starts_with(h)) || (number % 2 == 1) == odd
}

fn main() {
    let mut args = Arguments::from_args();
    // two scenarios at once would see each other as leaks, and this machine's timing matters
    args.test_threads = Some(1);
    // hack/test has just installed everything: what is missing then is a failure, not a reason to skip
    let require = std::env::var_os("TRANSSHIP_REQUIRE").is_some();
    // all scenarios of one containerd or of both: what containerd has little part in is run under one of them
    let whole = matches!(args.filter.as_deref(), None | Some("c17::" | "c21::"));
    let mut trials = Vec::new();
    let mut beds = Vec::new();
    for containerd in Containerd::ALL {
        let shared: Shared = Arc::default();
        beds.push(Arc::clone(&shared));
        let all = scenarios::all().filter(|s| requirements::chosen(s.name)).enumerate();
        for (_, scenario) in all.filter(|(n, s)| !whole || is_for(containerd, *n, s.name)) {
            let name = format!("{containerd}::{}", scenario.name);
            let missing = requirements::missing(containerd, scenario.needs);
            let ignored = missing.is_some() && !require;
            if let Some(reason) = missing.as_ref().filter(|_| ignored && !args.list) {
                eprintln!("skipped: {name}: {reason}");
            }
            let shared = Arc::clone(&shared);
            let shown = name.clone();
            let test = move || match missing {
                Some(reason) => Err(reason.into()),
                None => twice(&shown, || trial(scenario, containerd, &shared)),
            };
            trials.push(Trial::test(name, test).with_ignored_flag(ignored));
        }
        let watch = || watch::itself().map_err(|e| format!("{e:#}").into());
        trials.push(Trial::test(format!("{containerd}::watch"), watch));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    if let Some(table) = matrix::table::table() {
        println!("\n{table}");
    }
    say_what_took_longest();
    // exit() runs no destructors
    drop(
        beds.iter()
            .map(|b| b.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take())
            .collect::<Vec<_>>(),
    );
    conclusion.exit()
}
