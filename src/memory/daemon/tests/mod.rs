//! The daemon against tasks that hand over their memory as CRIU's do. Needs root; CRIU itself is in [`criu`].

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "plain system calls on memory of the test's own, whose effects are what is tested"
)]

mod criu;
mod ends;
mod measure;
mod remote;
mod task;

use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use super::*;
use crate::criu::ImageKind;
use crate::memory::store::Store;
use task::{BASE, P, PID, content, page};

const SPACE: Space = Space { kind: ImageKind::Pid, id: PID as u64 };
const KEEPER: &str = "transship-test-keeper";

/// The test binary is also the tasks and the keeper: this runs before the test harness's main.
#[unsafe(link_section = ".init_array")]
#[used]
static AS_TASK: extern "C" fn() = as_task;

extern "C" fn as_task() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == KEEPER) {
        let code = keeper::main();
        std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
    }
    if args.get(1).is_some_and(|a| a == "transship-test-doomed") {
        std::process::exit(ends::doomed_daemon(&args));
    }
    if let Some(code) = task::main_if_invoked(&args) {
        std::process::exit(code);
    }
}

fn skip() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: not root, which fork events of a userfaultfd need");
    }
    !root
}

struct Bed {
    dir: tempfile::TempDir,
    pages: u64,
}

impl Bed {
    fn new(pages: u64) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), pages }
    }

    fn listen(&self, set: impl FnOnce(&mut DaemonConfig)) -> Daemon {
        let mut cfg = DaemonConfig::new(self.dir.path().join(SOCKET));
        set(&mut cfg);
        Daemon::listen(cfg).unwrap()
    }

    fn task(&self, what: &str, arg: u64) -> Child {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["transship-test-task", what]).arg(self.dir.path().join(SOCKET));
        c.args([self.pages.to_string(), arg.to_string()]).spawn().unwrap()
    }

    /// All pages in the store; half of those that are zero are known to be so.
    fn store(&self, keep: impl Fn(u64) -> bool) -> (Store, RangeSet) {
        let mut store = Store::new(self.pages * P).unwrap();
        let mut lazy = RangeSet::new();
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        for n in 0..=self.pages {
            let word = content(n).filter(|_| n < self.pages && keep(n));
            if let Some(word) = word {
                if run.1.is_empty() {
                    run.0 = n;
                }
                run.1.extend(page(word));
            }
            if (word.is_none() || run.1.len() > 1 << 20) && !run.1.is_empty() {
                let at = BASE + run.0 * P;
                store.put(SPACE, at, &run.1).unwrap();
                lazy.insert(at..at + run.1.len() as u64);
                run.1.clear();
            }
            if n < self.pages && content(n).is_none() && n % 2 == 0 {
                store.zero(SPACE, BASE + n * P, P).unwrap();
                lazy.insert(BASE + n * P..BASE + (n + 1) * P);
            }
        }
        (store, lazy)
    }

    /// One task with everything in the store.
    fn local(&self, what: &str, arg: u64, set: impl FnOnce(&mut DaemonConfig)) -> (DaemonStats, ExitStatus) {
        let (store, lazy) = self.store(|_| true);
        let daemon = self.listen(set);
        let mut task = self.task(what, arg);
        let sets = LazySets { lazy: vec![(SPACE, lazy)], remote: Vec::new() };
        let stats = daemon.run(store, &sets, None, DaemonCtl::new().unwrap(), &mut |_| {}).unwrap();
        (stats, wait(&mut task))
    }
}

fn wait(task: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(30) {
        if let Some(status) = task.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    task.kill().unwrap();
    panic!("the task hangs");
}

fn bytes(pages: u64) -> u64 {
    (0..pages).filter(|n| content(*n).is_some()).count() as u64 * P
}

#[test]
fn threads_read_what_was_stored_and_zeros() {
    if skip() {
        return;
    }
    let bed = Bed::new(4000);
    let (stats, status) = bed.local("random", 0, |c| c.fill_delay = Duration::from_millis(100));
    assert!(status.success(), "{status}");
    assert!(stats.complete && stats.faults_local > 10 && stats.faults_zero > 10, "{stats:?}");
    assert_eq!(stats.fault_bytes + stats.filled_bytes, bytes(4000));
    assert_eq!((stats.unplaced_bytes, stats.faults_remote), (0, 0));
}

#[test]
fn memory_is_complete_by_faults_alone_and_by_the_fill_alone() {
    if skip() {
        return;
    }
    let bed = Bed::new(3000);
    let (stats, status) = bed.local("random", 0, |c| c.fill_delay = Duration::from_secs(60));
    assert!(status.success() && stats.filled_bytes == 0 && stats.fault_bytes == bytes(3000), "{stats:?}");
    let (stats, status) = bed.local("exec", 0, |c| c.fill_delay = Duration::ZERO);
    assert!(status.success() && stats.complete, "{stats:?}");
}

#[test]
fn children_get_the_same_pages() {
    if skip() {
        return;
    }
    let (stats, status) = Bed::new(2000).local("fork", 0, |c| c.fill_delay = Duration::from_millis(100));
    assert!(status.success() && stats.complete, "{status} {stats:?}");
    assert!(stats.forks > 1 && stats.unplaced_bytes == 0, "{stats:?}");
}

#[test]
fn mappings_may_change_in_every_way() {
    if skip() {
        return;
    }
    for seed in 1..=4 {
        // A slow fill, so that there is much to do wrong.
        let (stats, status) = Bed::new(60_000).local("churn", seed, |c| {
            c.fill_delay = Duration::from_millis(if seed % 2 == 0 { 300 } else { 20 });
            c.batch = 16 << 10;
        });
        assert!(status.success() && stats.complete, "{status} {stats:?}");
        assert!(stats.forks > 0 && stats.unplaced_bytes == 0, "{stats:?}");
    }
}
