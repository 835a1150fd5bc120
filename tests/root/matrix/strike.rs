//! A fault, done for real to both nodes at once, and undone.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;

use super::fault::{Fault, Program, Way};
use super::place::{self, PLACES, Side};
use crate::bed::{Bed, Node, wait_for};
use crate::trouble::{self, Mounted};

/// How far the clock is stepped, in seconds: longer than a ticket lives.
const STEP: i64 = 90;

/// Starts containerd in a node, and waits until it answers. Its log, and its shims', goes on in `$1`.
const CONTAINERD: &str = r#"
setsid containerd >> $1 2>&1 < /dev/null &
for i in $(seq 200); do ctr version > /dev/null 2>&1 && exit 0; sleep 0.05; done
tail -20 $1; exit 1
"#;

/// Starts containerd, which has ended in a node.
pub fn start_containerd(bed: &Bed, node: Node) -> Result<()> {
    let log = trouble::folder(bed)?.join(node.name()).join("log/containerd.log");
    bed.ok(node, &["bash", "-ec", CONTAINERD, "bash", &log.to_string_lossy()]).map(drop)
}

/// The node of a side, where containers come from this one.
pub fn node(side: Side, from: Node) -> Node {
    match side {
        Side::Source => from,
        Side::Destination => from.other(),
    }
}

/// A fault that is being done.
pub struct Strike<'a> {
    bed: &'a Bed,
    fault: Fault,
    from: Node,
    stopped: Vec<i32>,
    over: bool,
}

fn pids(bed: &Bed, program: Program, node: Node) -> Result<Vec<i32>> {
    Ok(match program {
        Program::Shim => trouble::processes(bed, node, trouble::SHIM)?,
        Program::Agent => trouble::processes(bed, node, trouble::AGENT)?,
        Program::Containerd => trouble::processes(bed, node, "containerd ")?,
        // by the name of the process: a gate that has become CRIU keeps no other trace
        Program::Criu => named(bed, node, "criu")?,
        Program::Runc => named(bed, node, "runc")?,
    })
}

fn named(bed: &Bed, node: Node, name: &str) -> Result<Vec<i32>> {
    let ns = std::fs::read_link(format!("/proc/{}/ns/pid", bed.pid(node)?))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let same = std::fs::read_link(entry.path().join("ns/pid")).is_ok_and(|of| of == ns);
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if same && comm.trim().starts_with(name) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn signal(pids: &[i32], signal: Signal) {
    for pid in pids {
        // one that is gone meanwhile is as dead as it shall be
        nix::sys::signal::kill(Pid::from_raw(*pid), signal).ok();
    }
}

fn step(seconds: i64) -> Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let then = TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec());
    clock_settime(ClockId::CLOCK_REALTIME, then).context("setting the clock")
}

fn switch(bed: &Bed, rule: &str) -> Result<()> {
    let switch = format!("{}-sw", trouble::prefix(bed)?);
    let status = Command::new("ip").args(["netns", "exec", &switch, "nft", rule]).status()?;
    ensure!(status.success(), "nft {rule}");
    Ok(())
}

fn cut(bed: &Bed, way: Way, from: Node) -> Result<()> {
    switch(bed, "add table bridge cut { chain f { type filter hook forward priority 0; }; }")?;
    let (here, there) = (format!("p{}", from.name()), format!("p{}", from.other().name()));
    for (a, b, ways) in [(&here, &there, [Way::Both, Way::There]), (&there, &here, [Way::Both, Way::Back])] {
        if ways.contains(&way) {
            switch(bed, &format!("add rule bridge cut f iifname {a} oifname {b} drop"))?;
        }
    }
    Ok(())
}

/// Where images live on a node, in a tmpfs of its own that can be filled without harm to others.
pub fn room(bed: &Bed, node: Node) -> Result<Mounted<'_>> {
    bed.ok(node, &["mkdir", "-p", "/run/transship/images"])?;
    Mounted::new(bed, node, "-t tmpfs -o size=1500m tmpfs", "/run/transship/images")
}

impl<'a> Strike<'a> {
    /// Does it, to containers that come from this node.
    pub fn now(bed: &'a Bed, fault: Fault, from: Node) -> Result<Strike<'a>> {
        let node = |side| node(side, from);
        let mut strike = Strike { bed, fault, from, stopped: Vec::new(), over: false };
        match fault {
            Fault::Killed(program, side) => {
                let found = pids(bed, program, node(side))?;
                ensure!(!found.is_empty(), "no {program:?} on node {}", node(side).name());
                signal(&found, Signal::SIGKILL);
            }
            Fault::Silent(program, side) => {
                strike.stopped = pids(bed, program, node(side))?;
                ensure!(!strike.stopped.is_empty(), "no {program:?} on node {}", node(side).name());
                signal(&strike.stopped, Signal::SIGSTOP);
            }
            Fault::Flutter(way) | Fault::Cut(way) => cut(bed, way, from)?,
            Fault::Full(side) => {
                bed.sh(
                    node(side),
                    "head -c 2g /dev/zero > /run/transship/images/filler 2> /dev/null || true",
                )?;
            }
            Fault::MemoryLimit(side) => strike.limited(|id| limit(bed, node(side), id))?,
            Fault::Clock => step(STEP)?,
            Fault::CommandLine => {
                signal(&trouble::processes(bed, from, "transship migrate")?, Signal::SIGKILL);
            }
        }
        Ok(strike)
    }

    /// Does something to the containers of all places where this fault applies.
    fn limited(&self, work: impl Fn(&str) -> Result<()>) -> Result<()> {
        let applies = |place: &(usize, &place::Place)| self.fault.applies(place.1);
        PLACES.iter().enumerate().filter(applies).try_for_each(|(number, _)| work(&place::id(number)))
    }

    /// What lasts for a time ends by itself; called when everybody is free to go on.
    pub fn last(&mut self) -> Result<()> {
        match self.fault {
            Fault::Flutter(_) => std::thread::sleep(Duration::from_secs(2)),
            // its own silence, and that of a peer that looks at it now and then
            Fault::Silent(..) => std::thread::sleep(Duration::from_secs(11)),
            Fault::Clock => std::thread::sleep(Duration::from_secs(1)),
            // containers that go on without it need it at their end
            Fault::Killed(Program::Containerd, _) => {}
            _ => return Ok(()),
        }
        self.undo()
    }

    /// Undoes it: what was killed is started as systemd would, the cable is plugged in.
    pub fn undo(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        let (bed, from) = (self.bed, self.from);
        let node = |side| node(side, from);
        match self.fault {
            Fault::Killed(Program::Agent, side) => {
                bed.ok(node(side), &["rm", "-f", "/run/transship/agent.sock"])?;
                bed.start_agent(node(side))
            }
            Fault::Killed(Program::Containerd, side) => start_containerd(bed, node(side)),
            Fault::Silent(..) => {
                signal(&self.stopped, Signal::SIGCONT);
                Ok(())
            }
            Fault::Flutter(_) | Fault::Cut(_) => switch(bed, "delete table bridge cut"),
            Fault::Full(side) => bed.ok(node(side), &["rm", "-f", "/run/transship/images/filler"]).map(drop),
            Fault::Clock => step(-STEP),
            Fault::MemoryLimit(side) => self.limited(|id| unlimit(bed, node(side), id)),
            Fault::Killed(..) | Fault::CommandLine => Ok(()),
        }
    }
}

impl Drop for Strike<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.undo() {
            eprintln!("undoing {}: {e:#}", self.fault.name());
        }
    }
}

/// Allows a container no more memory than it has: cgroup v1 refuses a limit below that, v2 would make room by killing.
fn limit(bed: &Bed, node: Node, id: &str) -> Result<()> {
    let script = format!(
        "cd /sys/fs/cgroup/memory/default/{id} 2> /dev/null && for i in $(seq 50); do
           echo $(($(cat memory.usage_in_bytes) + 65536)) 2> /dev/null > memory.limit_in_bytes && exit 0; done
         cd /sys/fs/cgroup/default/{id} && echo $(($(cat memory.current) + 65536)) > memory.max"
    );
    wait_for(Duration::from_secs(5), "the limit", || Ok(bed.sh(node, &script).is_ok()))
}

/// Takes the limit away, where the container still is.
fn unlimit(bed: &Bed, node: Node, id: &str) -> Result<()> {
    let script = format!(
        "if cd /sys/fs/cgroup/memory/default/{id}; then echo -1 > memory.limit_in_bytes
         elif cd /sys/fs/cgroup/default/{id}; then echo max > memory.max; fi 2> /dev/null || true"
    );
    bed.sh(node, &script).map(drop)
}
