//! A scenario that hangs: what waits is told, and what it waits for is ended, so that it fails like any other and the rest is still tried.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bed::patient;

/// What the longest scenario (a part of the fault matrix) needs five times over.
const LIMIT: Duration = Duration::from_secs(900);
/// For how long what it waits for is ended again and again before the whole program ends.
const GRACE: Duration = Duration::from_secs(120);
/// The program's exit status then: it told of no failed test, which `hack/test` takes for a failure.
const HANGS: i32 = 97;

/// Runs `scenario`. If it takes longer than any scenario may, the processes under this one are listed and killed: whoever waits for one of them
/// goes on and fails. One that waits for something else ends the whole program.
pub fn limited<T>(name: &str, scenario: impl FnOnce() -> T) -> T {
    within(patient(LIMIT), name, scenario)
}

fn within<T>(limit: Duration, name: &str, scenario: impl FnOnce() -> T) -> T {
    let (ended, has_ended) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut next = limit;
            let start = Instant::now();
            while has_ended.recv_timeout(next) == Err(RecvTimeoutError::Timeout) {
                next = Duration::from_secs(2);
                let below = below(std::process::id());
                eprintln!("{name}: hangs for {:?}; ended are:{}", start.elapsed(), told(&below));
                if start.elapsed() > limit + GRACE {
                    eprintln!("{name}: hangs in itself: the test program ends here");
                    std::process::exit(HANGS);
                }
                for process in below {
                    // it may have ended meanwhile
                    let _ = kill(Pid::from_raw(process.pid as i32), Signal::SIGKILL);
                }
            }
        });
        // also when it panics
        let _ended = ended;
        scenario()
    })
}

/// A process below this one.
struct Process {
    pid: u32,
    state: String,
    command: String,
}

fn told(processes: &[Process]) -> String {
    processes.iter().fold(String::new(), |mut text, p| {
        let _ = write!(text, "\n  {} {} {}", p.pid, p.state, p.command);
        text
    })
}

/// All processes that descend from `root`, without itself; the eldest first.
fn below(root: u32) -> Vec<Process> {
    let mut children: HashMap<u32, Vec<Process>> = HashMap::new();
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in pids.filter_map(|e| e.file_name().to_str()?.parse().ok()) {
        // proc_pid_stat(5): pid (name, which may hold anything) state ppid
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (Some(state), Some(Ok(parent))) = (fields.next(), fields.next().map(str::parse)) else {
            continue;
        };
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&line).replace('\0', " ");
        children.entry(parent).or_default().push(Process { pid, state: state.to_owned(), command });
    }
    let mut found: Vec<Process> = children.remove(&root).unwrap_or_default();
    let mut seen = 0;
    while let Some(process) = found.get(seen) {
        found.extend(children.remove(&process.pid).unwrap_or_default());
        seen += 1;
    }
    found
}

/// The watch itself: what waits for a process that does not end goes on, and what ends in time is left alone. Part of every run.
pub fn itself() -> Result<()> {
    let start = Instant::now();
    let limit = Duration::from_millis(300);
    let mut line = std::process::Command::new("sh");
    // a child of a child, which its parent waits for
    line.args(["-c", "sleep 60; true"]);
    let status = within(limit, "itself, on purpose", || line.status())?;
    if status.success() || start.elapsed() > patient(Duration::from_secs(30)) {
        bail!("what hung ended with {status} after {:?}", start.elapsed());
    }
    let status = within(Duration::from_secs(60), "itself", || std::process::Command::new("true").status())?;
    if !status.success() {
        bail!("what did not hang ended with {status}");
    }
    Ok(())
}
