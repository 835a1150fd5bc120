//! The comparison: every scenario runs under runc's shim and under ours, on the same node and containerd (1.7 and 2.1), and everything
//! observable is compared: answers, errors' codes and words, events and their order, outputs, files, what is left. `tests/README.md`
//! says how to run it.
//!
//! | file | what lives there |
//! |---|---|
//! | `scenarios/` | the scenarios, one subject per file |
//! | `subject.rs`, `making.rs` | one side of a running scenario: calls and notes, containers; what scenarios are written over |
//! | `stage.rs` | one side for as long as a bed lives |
//! | `calls.rs` | the Task API's calls and answers |
//! | `daemon.rs`, `shim.rs` | the two ways to a shim: through containerd, and its own socket |
//! | `events.rs`, `stats.rs`, `left.rs` | events, metrics, what is left in the node |
//! | `spec.rs`, `streams.rs` | OCI specifications, a client's ends of FIFOs |
//! | `record.rs`, `normal.rs` | observations and how two runs differ; names and numbers that mean nothing |
//! | `meant.rs`, `table.rs` | the differences that are meant; the table at the end |
//!
//! A scenario's two sides run at the same time, each in a namespace of containerd of its own. The bed (`hack/nodes`), what this
//! machine needs and the watch over scenarios that hang are shared with the root tests.

#[path = "../root/bed.rs"]
#[allow(dead_code, reason = "the root tests need more of it")]
mod bed;
#[path = "../root/requirements.rs"]
#[allow(dead_code, reason = "the root tests need more of it")]
mod requirements;
#[path = "../root/watch.rs"]
#[allow(dead_code, reason = "the root tests try the watch itself")]
mod watch;

mod calls;
mod daemon;
mod events;
mod left;
mod making;
mod meant;
mod normal;
mod record;
mod scenarios;
mod shim;
mod spec;
mod stage;
mod stats;
mod streams;
mod subject;
mod table;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use bed::{Bed, Containerd, Node};
use libtest_mimic::{Arguments, Failed, Trial};
use record::Record;
use requirements::Needs;
use stage::{Side, Stage};
use subject::Subject;
use table::Row;

/// Something to be done under both shims. An error is the scenario's own; refusals of a shim are observations.
pub struct Scenario {
    /// Unique; what it is about.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&mut Subject) -> Result<()>,
}

/// A bed with both sides, made when the first scenario needs it.
struct Theatre {
    bed: Bed,
    stages: [Stage; 2],
}

impl Theatre {
    fn open(containerd: Containerd) -> Result<Theatre> {
        let bed = Bed::bare(containerd, "c")?;
        let [theirs, ours] = Side::ALL.map(|side| Stage::set(&bed, side).with_context(|| side.program()));
        Ok(Theatre { stages: [theirs?, ours?], bed })
    }

    /// Both sides at once; their records.
    fn play(&self, scenario: &Scenario) -> [Result<Record, String>; 2] {
        std::thread::scope(|scope| {
            let side = |stage| scope.spawn(move || one_side(&self.bed, stage, scenario));
            let running = self.stages.each_ref().map(side);
            running.map(|thread| thread.join().unwrap_or_else(|_| Err("panicked".into())))
        })
    }
}

fn one_side(bed: &Bed, stage: &Stage, scenario: &Scenario) -> Result<Record, String> {
    let mut subject = Subject::new(bed, stage).map_err(|e| format!("{e:#}"))?;
    let outcome = (scenario.run)(&mut subject);
    let record = subject.finish();
    match outcome {
        Ok(()) => Ok(record),
        Err(e) => Err(format!("{}: {e:#}\n{}", stage.side.program(), record.text())),
    }
}

/// What the trials share.
#[derive(Default)]
struct Shared {
    theatre: Mutex<Option<Theatre>>,
    rows: Mutex<Vec<Row>>,
}

impl Shared {
    fn rows(&self) -> std::sync::MutexGuard<'_, Vec<Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn theatre(&self) -> std::sync::MutexGuard<'_, Option<Theatre>> {
        self.theatre.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn trial(scenario: &Scenario, containerd: Containerd, shared: &Shared) -> Result<Row, String> {
    let start = Instant::now();
    let mut place = shared.theatre();
    let theatre = match place.take() {
        Some(theatre) => theatre,
        None => Theatre::open(containerd).map_err(|e| format!("{e:#}"))?,
    };
    let [theirs, ours] = match watch::limited(scenario.name, || theatre.play(scenario)) {
        [Ok(theirs), Ok(ours)] => [theirs, ours],
        // a bed on which a scenario did not come to its end is not used again
        failed => {
            let said: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
            return Err(format!("{}\n{}", said.join("\n"), theatre.bed.logs()));
        }
    };
    // nor one on which something is left
    if !theirs.left() && !ours.left() {
        *place = Some(theatre);
    }
    let took = start.elapsed();
    let differences = record::differences(&theirs, &ours);
    let (meant, real) = meant::judge(meant::LIST, scenario.name, containerd, differences);
    if std::env::var_os("TRANSSHIP_TEST_SHOW").is_some() {
        println!("\n{containerd}::{}, runc shim:\n{}", scenario.name, theirs.text());
    }
    for difference in &real {
        println!("\n{containerd}::{}: {difference}", scenario.name);
    }
    let seen = [theirs.len(), ours.len()];
    Ok(Row { containerd, scenario: scenario.name, seen, meant, real: real.len(), took })
}

/// This machine is small and its neighbours are noisy: what differs once is looked at once more, and that is said.
fn twice(scenario: &'static Scenario, containerd: Containerd, shared: &Shared) -> Result<(), Failed> {
    let mut row = trial(scenario, containerd, shared);
    if !row.as_ref().is_ok_and(|r| r.real == 0) && std::env::var_os("TRANSSHIP_NO_RETRY").is_none() {
        let why = row.as_ref().map_or_else(String::clone, |r| format!("different in {}", r.real));
        eprintln!("second try: {containerd}::{}: {why}", scenario.name);
        row = trial(scenario, containerd, shared);
    }
    let row = row?;
    let real = row.real;
    shared.rows().push(row);
    if real == 0 { Ok(()) } else { Err(format!("different in {real}, see above").into()) }
}

/// After all scenarios: the list of what is meant is no longer than it has to be, and the node is clean.
fn last(containerd: Containerd, shared: &Shared) -> Result<(), Failed> {
    let rows = shared.rows();
    let ran: Vec<&str> = rows.iter().map(|r| r.scenario).collect();
    let occurred: Vec<usize> = rows.iter().flat_map(|r| r.meant.iter().map(|(n, _)| *n)).collect();
    let all = ran.len() == scenarios::all().count();
    let outdated = meant::outdated(meant::LIST, containerd, &ran, all, &occurred);
    if !outdated.is_empty() {
        return Err(format!("in the list of meant differences, but did not occur: {outdated:#?}").into());
    }
    match &*shared.theatre() {
        Some(theatre) => theatre.bed.expect_clean_node(Node::A).map_err(|e| format!("{e:#}").into()),
        None => Ok(()),
    }
}

type Test = Box<dyn Fn(&Shared) -> Result<(), Failed> + Send>;

fn main() {
    let mut args = Arguments::from_args();
    // scenarios of one bed would see each other's remains
    args.test_threads = Some(1);
    let require = std::env::var_os("TRANSSHIP_REQUIRE").is_some();
    let mut trials = Vec::new();
    let mut all_shared = Vec::new();
    for containerd in Containerd::ALL {
        let shared = Arc::new(Shared::default());
        all_shared.push(Arc::clone(&shared));
        let missing = requirements::missing(containerd, Needs::Shim);
        let ignored = missing.is_some() && !require;
        if let Some(reason) = missing.as_ref().filter(|_| ignored && !args.list) {
            eprintln!("skipped: {containerd}: {reason}");
        }
        let mut add = |name: &str, test: Test| {
            let (shared, missing) = (Arc::clone(&shared), missing.clone());
            let test = move || match missing {
                Some(reason) => Err(reason.into()),
                None => test(&shared),
            };
            trials.push(Trial::test(format!("{containerd}::{name}"), test).with_ignored_flag(ignored));
        };
        add("itself", Box::new(|_| Ok(itself()?)));
        for scenario in scenarios::all().filter(|s| requirements::chosen(s.name)) {
            add(scenario.name, Box::new(move |shared| twice(scenario, containerd, shared)));
        }
        add("last", Box::new(move |shared| last(containerd, shared)));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    for shared in all_shared {
        if !args.list && !shared.rows().is_empty() {
            table::print(&shared.rows());
        }
        // exit() runs no destructors
        drop(shared.theatre().take());
    }
    conclusion.exit()
}

/// The runner would be worth nothing if it could not tell two runs apart.
fn itself() -> Result<(), String> {
    record::tells_runs_apart()?;
    normal::hides_only_names_and_numbers()?;
    meant::takes_only_what_is_listed()
}
