//! The two nodes of a test, made by `hack/nodes`: up, down, commands inside, logs, and the check that nothing is left.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::requirements::{self, Needs};

/// A containerd that the tests run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// Debian 13's.
    V17,
    /// Debian forky's.
    V21,
}

impl Containerd {
    /// All of them, in the order of the tests.
    pub const ALL: [Containerd; 2] = [Containerd::V17, Containerd::V21];

    /// As `hack/setup` and `hack/nodes` name it.
    pub fn version(self) -> &'static str {
        match self {
            Containerd::V17 => "1.7",
            Containerd::V21 => "2.1",
        }
    }
}

impl fmt::Display for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}", self.version().replace('.', ""))
    }
}

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// 10.77.0.1
    A,
    /// 10.77.0.2
    B,
}

impl Node {
    /// Both.
    pub const ALL: [Node; 2] = [Node::A, Node::B];

    /// As `hack/nodes` names it.
    pub fn name(self) -> &'static str {
        match self {
            Node::A => "a",
            Node::B => "b",
        }
    }

    /// Its address, where its agent listens.
    pub fn address(self) -> &'static str {
        match self {
            Node::A => "10.77.0.1",
            Node::B => "10.77.0.2",
        }
    }

    /// The other one.
    pub fn other(self) -> Node {
        match self {
            Node::A => Node::B,
            Node::B => Node::A,
        }
    }
}

/// Two nodes and a client, gone when dropped.
pub struct Bed {
    containerd: Containerd,
    prefix: String,
    agents: bool,
    pods: bool,
}

/// All limits of the scenarios are for a machine of ordinary speed. TRANSSHIP_TEST_SLOW=N multiplies them: `hack/vm`'s processor is
/// emulated.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let given = || std::env::var("TRANSSHIP_TEST_SLOW").ok().and_then(|f| f.parse().ok());
    limit * *FACTOR.get_or_init(|| given().unwrap_or(1))
}

/// What a clean-up may take before what is left counts as leaked.
const SETTLE: Duration = Duration::from_secs(5);

impl Bed {
    /// Makes the nodes and imports the images; remains of an earlier, interrupted run are removed first.
    pub fn up(containerd: Containerd) -> Result<Bed> {
        let bed = Self::bare(containerd, "")?;
        for node in Node::ALL {
            bed.hack(["import", node.name()])?;
        }
        Ok(bed)
    }

    /// Nodes without images, beside those of other tests: `mark` sets their names apart.
    pub fn bare(containerd: Containerd, mark: &str) -> Result<Bed> {
        let prefix = std::env::var("TRANSSHIP_TEST_BED").unwrap_or_else(|_| "tst".into());
        let prefix = format!("{prefix}{mark}{}", containerd.version().replace('.', ""));
        let bed = Bed { containerd, prefix, agents: false, pods: false };
        bed.hack(["down"]).context("removing an earlier bed")?;
        bed.hack(["up"])?;
        Ok(bed)
    }

    /// Which containerd runs in the nodes.
    pub fn containerd(&self) -> Containerd {
        self.containerd
    }

    /// Starts the agents, and brings the images of pods, before the first scenario that needs them.
    pub fn prepare(&mut self, needs: Needs) -> Result<()> {
        if needs != Needs::Shim && !self.agents {
            self.hack(["agents"])?;
            self.agents = true;
        }
        if needs == Needs::Pods && !self.pods {
            self.hack(["import-pods", "a"])?;
            self.pods = true;
        }
        Ok(())
    }

    /// `hack/nodes ARGS`, to be run by the caller.
    pub fn nodes<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/nodes"));
        command.args(args).stdin(std::process::Stdio::null());
        command.env("TRANSSHIP_BED", &self.prefix).env("TRANSSHIP_CONTAINERD", self.containerd.version());
        command.env("TRANSSHIP_BIN_DIR", requirements::bin_dir());
        command
    }

    /// Runs `hack/nodes ARGS`; its output, or what it said on failing.
    pub fn hack<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        let mut command = self.nodes(args);
        succeeded(&command.output().context("hack/nodes")?, &format!("{:?}", command.get_args()))
    }

    /// A command in a node, to be run by the caller.
    pub fn command(&self, node: Node, args: &[&str]) -> Command {
        self.nodes(["exec", node.name()].iter().chain(args))
    }

    /// Runs a command in a node, whatever it ends with. One that hangs (ctr does when its stdin ends too early) ends with 124.
    pub fn run(&self, node: Node, args: &[&str]) -> Result<Output> {
        let limit = patient(Duration::from_secs(90)).as_secs().to_string();
        let guarded: Vec<_> = ["timeout", "-k", "2", &limit].iter().chain(args).copied().collect();
        self.command(node, &guarded).output().with_context(|| format!("{args:?} in node {}", node.name()))
    }

    /// Runs a command in a node, which must succeed; what it printed.
    pub fn ok(&self, node: Node, args: &[&str]) -> Result<String> {
        succeeded(&self.run(node, args)?, &format!("{args:?} in node {}", node.name()))
    }

    /// Runs a shell script in a node, which must succeed; what it printed.
    pub fn sh(&self, node: Node, script: &str) -> Result<String> {
        self.ok(node, &["bash", "-ec", script])
    }

    /// The node's process 1, as this machine numbers it.
    pub fn pid(&self, node: Node) -> Result<u32> {
        self.hack(["pid", node.name()])?.trim().parse().context("hack/nodes pid")
    }

    /// A path in the node, as this process reaches it.
    pub fn path(&self, node: Node, path: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root{path}", self.pid(node)?)))
    }

    /// A folder on this machine that both nodes see under the same path; gone with the bed.
    pub fn shared(&self) -> Result<PathBuf> {
        let root = std::env::var("TRANSSHIP_BED_DIR").unwrap_or_else(|_| "/var/lib/transship-bed".into());
        let dir = Path::new(&root).join(&self.prefix).join("shared");
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }

    /// Stops (and does not start again) the agent of a node.
    pub fn stop_agent(&self, node: Node) -> Result<()> {
        self.hack(["agent", node.name(), "stop"]).map(drop)
    }

    /// Starts the agent of a node.
    pub fn start_agent(&self, node: Node) -> Result<()> {
        self.hack(["agent", node.name(), "start"]).map(drop)
    }

    /// What containers left behind in these nodes; empty lines are not findings.
    pub fn leaks(&self, nodes: &[Node]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for &node in nodes {
            let text = self.hack(["leaks", node.name()])?;
            found.extend(text.lines().map(|l| format!("node {}: {l}", node.name())));
        }
        Ok(found)
    }

    /// Fails unless both nodes become clean soon.
    pub fn expect_clean(&self) -> Result<()> {
        self.expect_clean_nodes(&Node::ALL)
    }

    /// Fails unless this node becomes clean soon.
    pub fn expect_clean_node(&self, node: Node) -> Result<()> {
        self.expect_clean_nodes(&[node])
    }

    fn expect_clean_nodes(&self, nodes: &[Node]) -> Result<()> {
        let start = Instant::now();
        loop {
            let leaks = self.leaks(nodes)?;
            if leaks.is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < patient(SETTLE), "left behind:\n  {}", leaks.join("\n  "));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The ends of all logs of both nodes.
    pub fn logs(&self) -> String {
        let log = |n: Node| self.hack(["log", n.name(), "25"]).unwrap_or_else(|e| format!("{e:#}"));
        Node::ALL.map(log).join("")
    }

    /// Takes the bed down after a failure, so that no later scenario meets what is left of this one.
    pub fn spoil(self) {}
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::env::var_os("TRANSSHIP_TEST_KEEP").is_some() {
            eprintln!("kept: TRANSSHIP_BED={} hack/nodes exec a ...", self.prefix);
        } else if let Err(e) = self.hack(["down"]) {
            eprintln!("bed {}: {e:#}", self.prefix);
        }
    }
}

/// The output of a program that must have succeeded.
fn succeeded(output: &Output, what: &str) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    bail!("{what}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end())
}

/// Waits until `condition` holds, or fails naming `what` was awaited.
pub fn wait_for(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !condition()? {
        ensure!(start.elapsed() < patient(limit), "{what}: not within {:?}", patient(limit));
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until a program that this test started has ended; killed, and an error, when it does not within 30 s.
pub fn ended(child: &mut Child, what: &str) -> Result<ExitStatus> {
    let mut status = None;
    let ended = wait_for(Duration::from_secs(30), &format!("the end of {what}"), || {
        status = child.try_wait()?;
        Ok(status.is_some())
    });
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended.and_then(|()| status.context("no exit status"))
}
