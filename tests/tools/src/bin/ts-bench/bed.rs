//! The bed of `hack/nodes` as the measurements use it: a helper in each node, the wire's counters and its shaping.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// A node's address.
pub fn address(node: &str) -> &'static str {
    if node == "a" { "10.77.0.1" } else { "10.77.0.2" }
}

/// The helper in a node (`node.rs`).
pub struct Helper {
    name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Helper {
    fn open(nodes: &Path, name: &'static str) -> Result<Self, String> {
        let me = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut child = Command::new(nodes)
            .args(["exec", name])
            .arg(me)
            .arg("node")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{}: {e}", nodes.display()))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Self { name, child, stdin, stdout })
    }

    /// Asks for something; an `error` in the answer is one here.
    pub fn ask(&mut self, request: Value) -> Result<Value, String> {
        let context = |e: &dyn std::fmt::Display| format!("node {}: {request}: {e}", self.name);
        let stdin = self.stdin.as_mut().ok_or("closed")?;
        stdin.write_all(format!("{request}\n").as_bytes()).map_err(|e| context(&e))?;
        let mut line = String::new();
        self.stdout.read_line(&mut line).map_err(|e| context(&e))?;
        let answer: Value = serde_json::from_str(&line).map_err(|e| context(&e))?;
        match answer["error"].as_str() {
            Some(e) => Err(context(&e)),
            None => Ok(answer),
        }
    }

    /// A command to its end; a status other than 0 is an error.
    pub fn run(&mut self, command: &[&str], limit_s: u64) -> Result<Value, String> {
        let answer = self.ask(json!({"do": "run", "command": command, "limit_s": limit_s}))?;
        let output = answer["output"].as_str().unwrap_or_default();
        if answer["code"] != 0 {
            return Err(format!("node {}: {}: {}", self.name, command.join(" "), output.trim()));
        }
        Ok(answer)
    }

    /// A shell script that must succeed; its output.
    pub fn sh(&mut self, script: &str) -> Result<String, String> {
        let answer = self.run(&["sh", "-ec", script], 60)?;
        Ok(answer["output"].as_str().unwrap_or_default().to_owned())
    }

    /// A shell script that may fail.
    pub fn try_sh(&mut self, script: &str) {
        let _ = self.ask(json!({"do": "run", "command": ["sh", "-c", script], "limit_s": 30}));
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// What passed node a's uplink, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire {
    pub sent: u64,
    pub received: u64,
}

pub struct Bed {
    pub prefix: String,
    pub a: Helper,
    pub b: Helper,
    nodes: PathBuf,
}

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Bed {
    /// A new bed, whatever was there before: both nodes with an agent and the images.
    pub fn up(nodes: &Path, images: &[&str]) -> Result<Self, String> {
        let prefix = std::env::var("TRANSSHIP_BED").map_err(|e| format!("TRANSSHIP_BED: {e}"))?;
        let hack = |args: &[&str]| output(Command::new(nodes).args(args)).map(drop);
        hack(&["down"])?;
        hack(&["up"])?;
        for node in ["a", "b"] {
            hack(&[&["import", node], images].concat())?;
        }
        hack(&["agents"])?;
        let nodes = nodes.to_owned();
        Ok(Self { prefix, a: Helper::open(&nodes, "a")?, b: Helper::open(&nodes, "b")?, nodes })
    }

    /// One of `hack/nodes`' commands.
    pub fn nodes(&self, args: &[&str]) -> Result<String, String> {
        output(Command::new(&self.nodes).args(args))
    }

    /// A program in the client's network, not started yet.
    pub fn client(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(&self.nodes);
        command.arg("client").arg(beside(program)).args(args);
        command
    }

    /// The counters of the link of node a, as the switch sees it.
    pub fn wire(&self) -> Result<Wire, String> {
        let namespace = format!("{}-sw", self.prefix);
        let text = output(Command::new("ip").args(["-n", &namespace, "-j", "-s", "link", "show", "pa"]))?;
        let links: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let count = |way: &str| links[0]["stats64"][way]["bytes"].as_u64().ok_or("no counters");
        Ok(Wire { sent: count("rx")?, received: count("tx")? })
    }

    /// Shapes the links of both nodes to `rate` (as tc writes it), or not at all.
    pub fn shape(&self, rate: Option<&str>) -> Result<(), String> {
        let namespace = format!("{}-sw", self.prefix);
        for link in ["pa", "pb"] {
            let tc = |args: &[&str]| {
                output(Command::new("ip").args(["netns", "exec", &namespace, "tc", "qdisc"]).args(args))
            };
            match rate {
                Some(rate) => {
                    let tbf = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"];
                    tc(&[&["replace", "dev", link], &tbf[..]].concat())?;
                }
                // fails where there is none
                None => drop(tc(&["del", "dev", link, "root"])),
            }
        }
        Ok(())
    }
}

/// A program in the folder of this one.
pub fn beside(program: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(program)
}
