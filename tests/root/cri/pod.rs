//! A pod and its containers, as kubelet makes and removes them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::answers::{self, Container, ContainerStatus, ExecOutput, SandboxStatus};
use super::client::{Answer, Cri};
use super::config::{
    ContainerConfig, ContainerMetadata, ContainerSecurity, CreateContainer, Exec, ExecSync, Id, IdVerbose,
    ImageSpec, LinuxContainer, LinuxSandbox, Mode, NamespaceOption, RunPodSandbox, SandboxConfig,
    SandboxMetadata, SandboxSecurity, StopContainer,
};
use super::record::Record;
use crate::bed::{Node, wait_for};

/// A container's states in the CRI.
pub const RUNNING: i32 = 1;
/// It has ended.
pub const EXITED: i32 = 2;

/// Each container has a pid namespace of its own, unless the pod says otherwise.
fn own_pids() -> NamespaceOption {
    NamespaceOption { pid: Mode::Container as i32, ..Default::default() }
}

/// By which kubelet knows what is a pod's.
fn labels_of(pod: &str) -> BTreeMap<String, String> {
    [("io.kubernetes.pod.name".into(), pod.into()), ("io.kubernetes.pod.namespace".into(), "tests".into())]
        .into()
}

/// A pod that runs.
pub struct Pod<'c, 'b> {
    cri: &'c Cri<'b>,
    /// The sandbox's id.
    pub id: String,
    /// As it was asked for.
    pub config: SandboxConfig,
}

impl<'c, 'b> Pod<'c, 'b> {
    /// A pod under a handler; its name, its id and what else is its own are known to the record from now on.
    pub fn run(cri: &'c Cri<'b>, handler: &str, name: &str, record: &mut Record) -> Result<Pod<'c, 'b>> {
        Pod::run_with(cri, handler, name, record, |_| {})
    }

    /// The same with changes to its configuration.
    pub fn run_with(
        cri: &'c Cri<'b>,
        handler: &str,
        name: &str,
        record: &mut Record,
        change: impl FnOnce(&mut SandboxConfig),
    ) -> Result<Pod<'c, 'b>> {
        let full = format!("{name}-under-{handler}");
        record.call(&full, name);
        let mut config = SandboxConfig {
            metadata: Some(SandboxMetadata {
                name: full.clone(),
                uid: format!("uid-{full}"),
                namespace: "tests".into(),
                attempt: 0,
            }),
            hostname: "pod".into(),
            log_directory: format!("/var/log/pods/{full}"),
            labels: labels_of(&full),
            annotations: [("example.org/of".to_owned(), "the tests".to_owned())].into(),
            linux: Some(LinuxSandbox {
                cgroup_parent: format!("/kubepods/{full}"),
                security_context: Some(SandboxSecurity { namespace_options: Some(own_pids()) }),
            }),
        };
        change(&mut config);
        std::fs::create_dir_all(cri.bed.path(Node::A, &config.log_directory)?)?;
        let question = RunPodSandbox { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let id: Id = cri.ask("RunPodSandbox", question)?;
        record.call(&id.id, "<pod>");
        let pod = Pod { cri, id: id.id, config };
        let ip = pod.status()?.status.and_then(|s| s.network).map(|n| n.ip).unwrap_or_default();
        record.call(&ip, "<the pod's ip>");
        Ok(pod)
    }

    /// Its status, with all that containerd knows.
    pub fn status(&self) -> Answer<SandboxStatus> {
        self.cri.ask("PodSandboxStatus", IdVerbose { id: self.id.clone(), verbose: true })
    }

    /// Makes a container that runs a command of busybox.
    pub fn create(&self, name: &str, command: &[&str], record: &mut Record) -> Result<String> {
        self.create_with(name, command, record, |_| {})
    }

    /// The same with changes to its configuration.
    pub fn create_with(
        &self,
        name: &str,
        command: &[&str],
        record: &mut Record,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String> {
        let mut labels = labels_of(self.config.metadata.as_ref().map_or("", |m| &m.name));
        labels.insert("io.kubernetes.container.name".into(), name.into());
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: "localhost/busybox:1".into(), ..Default::default() }),
            command: command.iter().map(|&c| c.to_owned()).collect(),
            labels,
            annotations: [("io.kubernetes.container.hash".to_owned(), "1a2b".to_owned())].into(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer {
                security_context: Some(ContainerSecurity {
                    namespace_options: Some(own_pids()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let question = CreateContainer {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id: Id = self.cri.ask("CreateContainer", question).with_context(|| format!("creating {name}"))?;
        record.call(&id.id, &format!("<{name}>"));
        Ok(id.id)
    }

    /// Makes and starts one.
    pub fn start(&self, name: &str, command: &[&str], record: &mut Record) -> Result<String> {
        self.start_with(name, command, record, |_| {})
    }

    /// The same with changes to its configuration.
    pub fn start_with(
        &self,
        name: &str,
        command: &[&str],
        record: &mut Record,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String> {
        let id = self.create_with(name, command, record, change)?;
        self.cri.start(&id).with_context(|| format!("starting {name}"))?;
        Ok(id)
    }

    /// Where a container's log lies, as this process reaches it.
    pub fn log_path(&self, name: &str) -> Result<PathBuf> {
        self.cri.bed.path(Node::A, &format!("{}/{name}.log", self.config.log_directory))
    }

    /// A container's log.
    pub fn log(&self, name: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.log_path(name)?)?).into_owned())
    }

    /// Waits until a container's log holds `text`.
    pub fn wait_log(&self, name: &str, text: &str) -> Result<()> {
        wait_for(Duration::from_secs(10), &format!("{text:?} in the log of {name}"), || {
            Ok(self.log(name).is_ok_and(|log| log.contains(text)))
        })
    }

    /// Stops and removes it, and the pod's cgroup, which is kubelet's to remove.
    pub fn remove(self) -> Result<()> {
        let id = || Id { id: self.id.clone() };
        self.cri.tell("StopPodSandbox", id()).context("stopping the pod")?;
        self.cri.tell("RemovePodSandbox", id()).context("removing the pod")?;
        self.remove_cgroup()
    }

    /// Removes only the pod's cgroup.
    pub fn remove_cgroup(&self) -> Result<()> {
        let parent = self.config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
        // others' cgroups may go away while find is looking
        let script = format!(
            "find /sys/fs/cgroup -depth -type d -path '*{parent}' 2> /dev/null | while read -r d; do rmdir \"$d\"; done"
        );
        self.cri.bed.sh(Node::A, &script).map(drop)
    }

    /// The shims that serve it: processes with its id behind `-id`, without one that only starts another.
    pub fn shims(&self) -> Result<Vec<String>> {
        let script = r"for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline 2> /dev/null | grep -E 'containerd-shim-[a-z]+-v2 ' || true; done";
        let all = self.cri.bed.sh(Node::A, script)?;
        let ours =
            |line: &&str| line.contains(&format!("-id {} ", self.id)) && !line.trim_end().ends_with(" start");
        Ok(all.lines().filter(ours).map(str::to_owned).collect())
    }
}

impl Cri<'_> {
    /// Starts a container.
    pub fn start(&self, id: &str) -> Answer<()> {
        self.tell("StartContainer", Id { id: id.to_owned() })
    }

    /// Asks it to stop, and kills it after so many seconds.
    pub fn stop(&self, id: &str, timeout: i64) -> Answer<()> {
        self.tell("StopContainer", StopContainer { id: id.to_owned(), timeout })
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Answer<()> {
        self.tell("RemoveContainer", Id { id: id.to_owned() })
    }

    /// A container's status, with all that containerd knows.
    pub fn verbose(&self, id: &str) -> Answer<ContainerStatus> {
        self.ask("ContainerStatus", IdVerbose { id: id.to_owned(), verbose: true })
    }

    /// A container's status.
    pub fn status(&self, id: &str) -> Result<Container> {
        let status: ContainerStatus = self.ask("ContainerStatus", Id { id: id.to_owned() })?;
        status.status.context("no status")
    }

    /// Waits for a state of a container; its status then.
    pub fn wait_state(&self, id: &str, wanted: i32) -> Result<Container> {
        wait_for(Duration::from_secs(15), &format!("container {id} in state {wanted}"), || {
            Ok(self.status(id)?.state == wanted)
        })?;
        self.status(id)
    }

    /// Runs a command in a container to its end, for at most so many seconds (0: without limit).
    pub fn exec(&self, id: &str, cmd: &[&str], timeout: i64) -> Answer<ExecOutput> {
        let cmd = cmd.iter().map(|&c| c.to_owned()).collect();
        self.ask("ExecSync", ExecSync { id: id.to_owned(), cmd, timeout })
    }

    /// What a command in a container writes to stdout; it must succeed.
    pub fn output(&self, id: &str, cmd: &[&str]) -> Result<String> {
        let output: ExecOutput = self.exec(id, cmd, 10)?;
        anyhow::ensure!(output.exit_code == 0, "{cmd:?}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A request for a stream to a command.
pub fn exec_request(id: &str, cmd: &[&str], tty: bool) -> Exec {
    Exec {
        id: id.to_owned(),
        cmd: cmd.iter().map(|&c| c.to_owned()).collect(),
        tty,
        stdin: true,
        stdout: true,
        // a terminal has one output only
        stderr: !tty,
    }
}

/// Which handlers the node has.
pub fn handlers(cri: &Cri<'_>) -> Answer<answers::Node> {
    cri.ask("Status", ())
}
