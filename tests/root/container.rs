//! Containers and pods in a node, through ctr: what an operator would type.

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bed::{Bed, Node, wait_for};
use crate::requirements;

/// A container to be run.
pub struct Run<'a> {
    bed: &'a Bed,
    id: &'a str,
    image: &'a str,
    options: Vec<String>,
    command: Vec<String>,
}

impl<'a> Run<'a> {
    /// `image`: busybox, probe or redis.
    pub fn new(bed: &'a Bed, id: &'a str, image: &'a str) -> Self {
        Run { bed, id, image, options: Vec::new(), command: Vec::new() }
    }

    /// Options of `ctr run`.
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|&o| o.to_owned()));
        self
    }

    /// In the pod's network namespace.
    pub fn pod(self, pod: &str) -> Self {
        self.options(&["--with-ns", &format!("network:/run/netns/{pod}")])
    }

    /// stdout and stderr into a file that both nodes and this process see; see [`log`].
    pub fn log(self) -> Result<Self> {
        let uri = format!("file://{}", log_path(self.bed, self.id)?.display());
        Ok(self.options(&["--log-uri", &uri]))
    }

    /// What runs in it (the image's command without it).
    pub fn args(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|&c| c.to_owned()).collect();
        self
    }

    fn line(&self, mode: &'static str) -> Vec<String> {
        let runtime = requirements::runtime();
        let mut line: Vec<String> = ["ctr", "run", mode, "--runtime", &runtime].map(String::from).into();
        line.extend(self.options.iter().cloned());
        line.extend([format!("localhost/{}:1", self.image), self.id.to_owned()]);
        line.extend(self.command.iter().cloned());
        line
    }

    /// Runs it to its end in the foreground and removes it.
    pub fn foreground(self, node: Node) -> Result<Output> {
        let line = self.line("--rm");
        self.bed.run(node, &line.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The same on a terminal of its own; what that showed.
    pub fn terminal(self, node: Node) -> Result<Output> {
        let line = self.options(&["--tty"]);
        let mut command = vec!["script", "-qec"];
        let quoted: Vec<String> = line.line("--rm").iter().map(|a| format!("'{a}'")).collect();
        let quoted = quoted.join(" ");
        command.extend([quoted.as_str(), "/dev/null"]);
        line.bed.run(node, &command)
    }

    /// Starts it in the background.
    pub fn start(self, node: Node) -> Result<()> {
        let line = self.line("--detach");
        self.bed.ok(node, &line.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
    }
}

/// Where the output of a container started with [`Run::log`] goes.
pub fn log_path(bed: &Bed, id: &str) -> Result<PathBuf> {
    Ok(bed.shared()?.join(format!("{id}.log")))
}

/// What it wrote there so far.
pub fn log(bed: &Bed, id: &str) -> Result<String> {
    let path = log_path(bed, id)?;
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Waits until the log of a container holds `text`.
pub fn wait_log(bed: &Bed, id: &str, text: &str) -> Result<()> {
    wait_for(Duration::from_secs(10), &format!("{text:?} in the log of {id}"), || {
        Ok(log(bed, id).is_ok_and(|log| log.contains(text)))
    })
}

/// Its root file system without what is mounted in it, as this process reaches it.
pub fn rootfs(bed: &Bed, node: Node, id: &str) -> Result<PathBuf> {
    bed.path(node, &format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}/rootfs"))
}

/// The content of a file in a container.
pub fn file(bed: &Bed, node: Node, id: &str, path: &str) -> Result<Vec<u8>> {
    let path = rootfs(bed, node, id)?.join(path.trim_start_matches('/'));
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// Runs a command in a running container.
pub fn exec(bed: &Bed, node: Node, id: &str, command: &[&str]) -> Result<Output> {
    let unique = format!("x{}", std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos());
    let line = ["ctr", "task", "exec", "--exec-id", &unique, id];
    bed.run(node, &line.iter().chain(command).copied().collect::<Vec<_>>())
}

/// The state of a task as ctr shows it (RUNNING, STOPPED, ...); nothing when there is none.
pub fn status(bed: &Bed, node: Node, id: &str) -> Result<Option<String>> {
    let table = bed.ok(node, &["ctr", "task", "ls"])?;
    let mut rows = table.lines().skip(1).map(|l| l.split_whitespace().collect::<Vec<_>>());
    Ok(rows.find(|r| r.first() == Some(&id)).and_then(|r| r.last().map(|&s| s.to_owned())))
}

/// Waits for a state of the task.
pub fn wait_status(bed: &Bed, node: Node, id: &str, wanted: &str) -> Result<()> {
    wait_for(Duration::from_secs(10), &format!("{id} is {wanted} on node {}", node.name()), || {
        Ok(status(bed, node, id)?.as_deref() == Some(wanted))
    })
}

/// The task's process 1, in the node's numbers.
pub fn pid(bed: &Bed, node: Node, id: &str) -> Result<u32> {
    let table = bed.ok(node, &["ctr", "task", "ls"])?;
    let mut rows = table.lines().skip(1).map(|l| l.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|r| r.first() == Some(&id)).with_context(|| format!("no task {id} in\n{table}"))?;
    row.get(1).context("no pid")?.parse().context("pid")
}

/// Kills the task, waits for its end and removes it and its container.
pub fn delete(bed: &Bed, node: Node, id: &str) -> Result<()> {
    if status(bed, node, id)?.is_some() {
        let killed = bed.run(node, &["ctr", "task", "kill", "--signal", "KILL", id])?;
        if killed.status.success() {
            wait_status(bed, node, id, "STOPPED")?;
        }
        // its exit status is ctr's own
        bed.run(node, &["ctr", "task", "rm", id])?;
    }
    bed.ok(node, &["ctr", "container", "rm", id]).map(drop)
}

/// A pod's network namespace, with a MAC that follows from its address 10.77.x.y.
pub fn pod(bed: &Bed, node: Node, name: &str, ip: &str) -> Result<()> {
    let octets =
        ip.split('.').map(|o| o.parse::<u8>().map(|n| format!("{n:02x}"))).collect::<Result<Vec<_>, _>>()?;
    let mac = format!("02:00:{}", octets.join(":"));
    bed.hack(["pod", node.name(), name, ip, &mac]).map(drop)
}

/// Removes a pod's network namespace.
pub fn unpod(bed: &Bed, node: Node, name: &str) -> Result<()> {
    bed.hack(["unpod", node.name(), name]).map(drop)
}
