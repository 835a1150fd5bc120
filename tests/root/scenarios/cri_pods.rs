//! Pods over CRI: a sandbox and its containers in one shim, its status and lists, its end with containers that run, and the examples by
//! which a node gets its handler.

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::cri::answers::{Containers, Sandboxes};
use crate::cri::client::{Answer, Cri};
use crate::cri::compare;
use crate::cri::config::{Filter, Id, IdVerbose, ListContainers, ListOf, OfPod};
use crate::cri::pod::{EXITED, Pod, handlers};
use crate::cri::record::{self, Record};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "cri_pod_of_three",
        needs: Needs::Pods,
        run: |bed| compare::same_in_turn(bed, of_three),
    },
    Scenario { name: "cri_pod_stopped", needs: Needs::Pods, run: |bed| compare::same(bed, stopped) },
    Scenario { name: "cri_pod_evicted", needs: Needs::Pods, run: |bed| compare::same(bed, evicted) },
    Scenario { name: "cri_pod_errors", needs: Needs::Pods, run: |bed| compare::same(bed, errors) },
    Scenario { name: "cri_handlers", needs: Needs::Pods, run: known_handlers },
    Scenario { name: "cri_records_are_plain", needs: Needs::Shim, run: |_| record::check() },
];

/// Three containers and the sandbox share one shim process; everything the CRI tells of them.
fn of_three(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "three", record)?;
    record.outcome("pod", &pod.status());
    let mut ids = Vec::new();
    for name in ["first", "second", "third"] {
        let id = pod.create(name, &["sleep", "1000"], record)?;
        record.outcome(&format!("{name} created"), &cri.verbose(&id));
        cri.start(&id)?;
        record.outcome(&format!("{name} running"), &cri.verbose(&id));
        ids.push(id);
    }
    let shims = pod.shims()?;
    ensure!(shims.len() == 1, "{shims:?}");
    let shown = cri.output(
        &ids[0],
        &["sh", "-c", "hostname; ps -o args; cat /proc/self/cgroup /etc/hostname; ls /dev; env"],
    )?;
    record.note("seen inside", shown);
    let list = ListContainers { filter: Some(OfPod { pod_sandbox_id: pod.id.clone() }) };
    let mut listed: Answer<Containers> = cri.ask("ListContainers", list);
    if let Ok(listed) = &mut listed {
        listed.containers.sort_by_key(|c| c.metadata.as_ref().map(|m| m.name.clone()));
    }
    record.outcome("containers", &listed);
    let list = ListOf { filter: Some(Filter { id: pod.id.clone(), ..Default::default() }) };
    let listed: Answer<Sandboxes> = cri.ask("ListPodSandbox", list);
    record.outcome("pods", &listed);
    record.outcome("pod with containers", &pod.status());
    pod.remove()
}

/// The pod is stopped while its containers run; CRI gives them no grace then.
fn stopped(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "stopped", record)?;
    let polite = pod.start(
        "polite",
        &["sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done"],
        record,
    )?;
    let deaf = pod.start("deaf", &["sleep", "1000"], record)?;
    pod.wait_log("polite", "up")?;
    record.outcome("stop", &cri.tell("StopPodSandbox", Id { id: pod.id.clone() }));
    record.outcome("again", &cri.tell("StopPodSandbox", Id { id: pod.id.clone() }));
    for (name, id) in [("polite", &polite), ("deaf", &deaf)] {
        cri.wait_state(id, EXITED)?;
        record.outcome(name, &cri.verbose(id));
        record.outcome(&format!("{name} exec"), &cri.exec(id, &["true"], 1));
    }
    record.outcome("pod", &pod.status());
    let left = cri.bed.sh(Node::A, &format!("find /sys/fs/cgroup -path '*{}*' -type d | sort", pod.id))?;
    record.note("the sandbox's cgroups", left);
    pod.remove()
}

/// What kubelet does to a pod that must go: every container at once without grace, then the pod.
fn evicted(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "evicted", record)?;
    let tree = pod.start(
        "tree",
        &["sh", "-c", "trap '' TERM; for i in 1 2 3; do sleep 1000 & done; echo up; wait"],
        record,
    )?;
    let plain = pod.start("plain", &["sleep", "1000"], record)?;
    pod.wait_log("tree", "up")?;
    for (name, id) in [("tree", &tree), ("plain", &plain)] {
        record.outcome(&format!("{name} stop"), &cri.stop(id, 0));
        record.outcome(name, &cri.verbose(id));
    }
    record.outcome("stop", &cri.tell("StopPodSandbox", Id { id: pod.id.clone() }));
    record.outcome("pod", &pod.status());
    for id in [&tree, &plain] {
        cri.remove(id)?;
    }
    pod.remove()
}

/// Calls that must be refused, and calls that are forgiven.
fn errors(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "errors", record)?;
    let none = "f".repeat(64);
    let missing = pod.create("missing", &["/no/such/program"], record)?;
    record.outcome("start of what is not there", &cri.start(&missing));
    record.outcome("missing", &cri.verbose(&missing));
    let id = pod.start("good", &["sleep", "1000"], record)?;
    record.outcome("start twice", &cri.start(&id));
    record.outcome("start of nothing", &cri.start(&none));
    record.outcome("stop of nothing", &cri.stop(&none, 1));
    record.outcome("remove of nothing", &cri.remove(&none));
    record.outcome("exec in nothing", &cri.exec(&none, &["true"], 1));
    record.outcome("status of nothing", &cri.verbose(&none));
    record.outcome("exec of what is not there", &cri.exec(&id, &["/no/such/program"], 5));
    record.outcome("exec of what may not run", &cri.exec(&id, &["/etc/passwd"], 5));
    record.outcome("exec of nothing", &cri.exec(&id, &[], 5));
    record.outcome("remove of what runs", &cri.remove(&id));
    record.outcome("removed", &cri.verbose(&id));
    let id = pod.create("unstarted", &["sleep", "1000"], record)?;
    record.outcome("exec before start", &cri.exec(&id, &["true"], 1));
    record.outcome("stop before start", &cri.stop(&id, 1));
    record.outcome("unstarted", &cri.verbose(&id));
    record.outcome("remove before start", &cri.remove(&id));
    let ask: Answer<()> = cri.ask("RemovePodSandbox", Id { id: pod.id.clone() });
    record.outcome("remove of a pod that runs", &ask);
    let gone: Answer<()> = cri.ask("PodSandboxStatus", IdVerbose { id: pod.id.clone(), verbose: false });
    record.outcome("pod", &gone);
    pod.remove_cgroup()
}

/// The value behind `key:` in a YAML file of ours; they are simple.
fn yaml(text: &str, key: &str) -> Result<String> {
    let line = text.lines().find_map(|l| l.trim().strip_prefix(key)?.strip_prefix(": "));
    line.map(|v| v.trim().to_owned()).with_context(|| format!("no {key} in\n{text}"))
}

/// The nodes' configuration is made of examples/: the handler that the example of a RuntimeClass names is there, and has what runc's has.
fn known_handlers(bed: &Bed) -> Result<()> {
    let cri = Cri::connect(bed)?;
    let example = |name: &str| {
        std::fs::read_to_string(format!("{}/examples/{name}", env!("CARGO_MANIFEST_DIR")))
            .with_context(|| name.to_owned())
    };
    let class = example("runtimeclass.yaml")?;
    let handler = yaml(&class, "handler")?;
    ensure!(yaml(&example("pod.yaml")?, "runtimeClassName")? == yaml(&class, "name")?, "{class}");
    let dump = bed.ok(Node::A, &["containerd", "config", "dump"])?;
    ensure!(dump.contains("io.containerd.transship.v2"), "{dump}");
    // containerd 2 also says what each can do
    let known = handlers(&cri)?.runtime_handlers;
    let features = |name: &str| known.iter().find(|h| h.name == name).map(|h| h.features.clone());
    if !known.is_empty() {
        ensure!(features(&handler).is_some(), "{known:?}");
        ensure!(features(compare::BY_PATH) == features(compare::RUNC), "{known:?}");
        // 2.1 asks only runtimes of runc's own type, as examples/ says
        let ours = features(&handler).flatten();
        ensure!(ours.is_none() || Some(ours) == features(compare::RUNC), "{known:?}");
    }
    let mut record = Record::default();
    let pod = Pod::run(&cri, &handler, "class", &mut record)?;
    let shims = pod.shims()?;
    ensure!(shims.len() == 1 && shims[0].contains("containerd-shim-transship-v2"), "{shims:?}");
    let unknown = Pod::run(&cri, "no-such-handler", "unknown", &mut record)
        .err()
        .context("an unknown handler was taken")?;
    ensure!(format!("{unknown:#}").contains("no-such-handler"), "{unknown:#}");
    pod.remove()
}
