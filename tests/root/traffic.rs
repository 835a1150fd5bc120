//! Workloads (ts-probe) whose output is checked across moves: inside of containers, and outside in the client's network.

use std::fs::File;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};

/// The client's addresses.
pub const CLIENT: &str = "10.77.0.9";

/// A ts-probe in the client's network; ended when dropped.
pub struct Outside {
    child: Child,
    log: PathBuf,
}

impl Outside {
    /// Starts `ts-probe ARGS` there.
    pub fn start(bed: &Bed, args: &[&str]) -> Result<Outside> {
        let log = bed.shared()?.join(format!("outside-{}.log", args.join("-").replace('/', "_")));
        let out = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = bed.nodes(["client", "ts-probe"].iter().chain(args));
        let child = command.stderr(out.try_clone()?).stdout(out).spawn().context("ts-probe")?;
        Ok(Outside { child, log })
    }

    /// All it said.
    pub fn said(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())
    }

    /// Waits until it has said `text`.
    pub fn wait(&mut self, text: &str) -> Result<()> {
        self.until(&format!("{text:?} outside"), |said| said.contains(text))
    }

    /// Waits until it has received a few times. The counter may jump over any number.
    pub fn receives(&mut self) -> Result<()> {
        self.until("the one outside receives", receives)
    }

    fn until(&mut self, what: &str, is: impl Fn(&str) -> bool) -> Result<()> {
        wait_for(Duration::from_secs(20), what, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("ts-probe outside ended, {status}: {}", self.said()?);
            }
            Ok(is(&self.said()?))
        })
        .with_context(|| tail(&self.said().unwrap_or_default()))
    }

    /// Ends its pause: it does its next round now.
    pub fn wake(&self) -> Result<()> {
        // hack/nodes and ip netns exec become the program by exec
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGUSR1).context("waking ts-probe")
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The container's probe: a workload in a container of that name, in a pod of that name if it has an address. See [`inside`].
pub fn start(bed: &Bed, node: Node, id: &str, options: &[&str], workload: &[&str]) -> Result<()> {
    for place in Node::ALL {
        // a log is appended to, and an earlier scenario may have had the same name
        let _ = std::fs::remove_file(moved_log(bed, place, id)?);
    }
    let _ = std::fs::remove_file(container::log_path(bed, id)?);
    Run::new(bed, id, "probe").options(options).log()?.args(workload).start(node)
}

/// Where the agent of a node puts the output of a container that came to it.
fn moved_log(bed: &Bed, node: Node, id: &str) -> Result<PathBuf> {
    bed.path(node, &format!("/var/log/transship/default/{id}.log"))
}

/// What a container started on node a has written so far: there, then on node b, then back on node a. In this order if it moved
/// at most twice.
pub fn inside(bed: &Bed, id: &str) -> Result<String> {
    let mut text = container::log(bed, id)?;
    for node in [Node::B, Node::A] {
        text += &std::fs::read_to_string(moved_log(bed, node, id)?).unwrap_or_default();
    }
    Ok(text)
}

/// Waits until the container has written `text`.
pub fn wait_inside(bed: &Bed, id: &str, text: &str) -> Result<()> {
    wait_for(Duration::from_secs(20), &format!("{text:?} from {id}"), || Ok(inside(bed, id)?.contains(text)))
        .with_context(|| tail(&inside(bed, id).unwrap_or_default()))
}

/// Waits until a container has received a few times.
pub fn receives_inside(bed: &Bed, id: &str) -> Result<()> {
    wait_for(Duration::from_secs(20), &format!("{id} receives"), || Ok(receives(&inside(bed, id)?)))
        .with_context(|| tail(&inside(bed, id).unwrap_or_default()))
}

fn receives(log: &str) -> bool {
    last_number(log, "received").is_ok_and(|n| n >= 5)
}

/// The last lines of a log, for a message.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// The value of `key=` in the last line that has it.
pub fn last_number(log: &str, key: &str) -> Result<u64> {
    let mark = format!(" {key}=");
    let line =
        log.lines().rev().find(|l| l.contains(&mark)).with_context(|| format!("no {key} in\n{log}"))?;
    let value = line.split_once(&mark).map(|(_, rest)| rest.split(' ').next().unwrap_or_default());
    value.unwrap_or_default().parse().with_context(|| format!("{key} in {line:?}"))
}

/// Fails if the log has a wrong number, or a connection that ended.
pub fn expect_right(log: &str) -> Result<()> {
    for line in log.lines().filter(|l| l.contains(" round=")) {
        let right = line.contains("wrong=0") && !line.contains("closed") && !line.contains("broken");
        ensure!(right, "{line}");
    }
    ensure!(log.contains("wrong=0"), "it never checked anything:\n{log}");
    Ok(())
}
