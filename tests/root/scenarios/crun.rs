//! crun in runc's place (`BinaryName`): a life as under runc's shim, and what runc's shim cannot do with it: restore, and move.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::{self, Needs};
use crate::traffic;
use crate::trouble::Configured;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "crun_life_as_with_runcs_shim", needs: Needs::Shim, run: life },
    Scenario { name: "crun_checkpoint_restore", needs: Needs::Migration, run: checkpoint_restore },
    Scenario { name: "crun_moves", needs: Needs::Migration, run: moves_there_and_back },
    Scenario { name: "crun_without_criu", needs: Needs::Migration, run: without_criu },
];

/// Where the nodes find it, and the options that name it to a runtime that is not called runc.
const CRUN: &str = "/run/rob/crun";
const OPTIONS: &str = "/run/rob/crun.toml";

/// crun wants cgroup v2 or v1: where both are mounted it refuses, so it gets a view with v1 alone.
const WRAPPER: &str = r#"#!/bin/sh
[ "$1 SAYS" != "--version without" ] || { echo "crun version 1.8.1"; echo "+SYSTEMD +SECCOMP +YAJL"; exit; }
[ -d /sys/fs/cgroup/unified ] || exec PROGRAM "$@"
exec unshare -m --propagation private sh -c 'umount /sys/fs/cgroup/unified; exec PROGRAM "$@"' crun "$@"
"#;

/// crun in both nodes; `says`: what it claims of CRIU, `with` or `without`.
fn install(bed: &Bed, says: &str) -> Result<()> {
    let program = requirements::opt().join("crun/bin/crun");
    ensure!(program.exists(), "no {} (hack/setup crun)", program.display());
    let wrapper = WRAPPER.replace("PROGRAM", &program.display().to_string()).replace("SAYS", says);
    for node in Node::ALL {
        let at = bed.path(node, CRUN)?;
        std::fs::create_dir_all(at.parent().context("a folder")?)?;
        std::fs::write(&at, &wrapper)?;
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o755))?;
        std::fs::write(bed.path(node, OPTIONS)?, format!("BinaryName = \"{CRUN}\"\n"))?;
    }
    Ok(())
}

/// Options of `ctr run` for a runtime with crun.
fn options(runtime: &str) -> [&'static str; 2] {
    if runtime == "io.containerd.runc.v2" {
        ["--runc-binary", CRUN]
    } else {
        ["--runtime-config-path", OPTIONS]
    }
}

const LIFE: &str = r#"
ctr events > /run/t1-events & e=$!
sleep 0.5
ctr run -d --null-io --runtime RUNTIME OPTIONS localhost/busybox:1 t1 sh -c 'trap "exit 5" TERM; while :; do sleep 0.05; done'
ls /run/containerd/runc/default/t1 | sort | xargs echo state:
ctr task exec --exec-id x1 t1 sh -c 'echo said; exit 3' 2> /dev/null && echo no || echo exec: $?
ctr task exec --exec-id x2 t1 /no/such/program > /dev/null 2>&1 && echo no || echo exec: $?
script -qec 'ctr task exec -t --exec-id x3 t1 tty 2> /dev/null' /dev/null | grep -o '/dev/pts.*'
ctr task pause t1; ctr task ls | awk '/^t1/ {print $3}'
ctr task resume t1; ctr task ls | awk '/^t1/ {print $3}'
ctr task ps t1 | wc -l
ctr task metrics t1 | awk '{print $1}' | sort | xargs echo metrics:
ctr task rm t1 2>&1 | sed 's/.*://' || true
ctr task kill --signal TERM t1
for i in $(seq 100); do ctr task ls | grep -q STOPPED && break; sleep 0.05; done
ctr task kill t1 2>&1 | sed 's/.*: //' || true
ctr task rm t1 2>&1 | sed 's/time="[^"]*" //' || true
ctr c rm t1
sleep 0.5
kill $e; wait $e || true
cat /run/t1-events; rm /run/t1-events
"#;

/// What is seen of a life: output, and events with what does not differ from run to run.
fn seen(bed: &Bed, runtime: &str) -> Result<Vec<String>> {
    let script = LIFE.replace("RUNTIME", runtime).replace("OPTIONS", &options(runtime).join(" "));
    let text = bed.sh(Node::A, &script)?;
    let mut seen = Vec::new();
    for line in text.lines() {
        let Some((_, event)) = line.split_once(" /tasks/") else {
            if !line.contains(" +0000 UTC ") {
                seen.push(line.trim_end().to_owned());
            }
            continue;
        };
        let (topic, json) = event.split_once(' ').unwrap_or((event, ""));
        let json: Value = serde_json::from_str(json).with_context(|| line.to_owned())?;
        seen.push(format!("{topic} {} {} {}", json["exec_id"], json["id"], json["exit_status"]));
    }
    Ok(seen)
}

fn life(bed: &Bed) -> Result<()> {
    install(bed, "with")?;
    let mut theirs = seen(bed, "io.containerd.runc.v2")?;
    let ours = seen(bed, &requirements::runtime())?;
    // runc's shim 2.1 mostly ends before its last event is sent; ours waits until it is
    let last = |seen: &[String]| seen.last().is_some_and(|e| e.starts_with("delete "));
    if !last(&theirs) && last(&ours) {
        theirs.extend(ours.last().cloned());
    }
    ensure!(theirs.iter().any(|l| l.contains("config.json")), "was it crun? {theirs:#?}");
    ensure!(theirs.len() > 20, "{theirs:#?}");
    ensure!(ours == theirs, "ours: {ours:#?}\nrunc's: {theirs:#?}");
    Ok(())
}

/// CRIU makes anew what a container has of the hierarchy that crun was not shown.
fn tidy(bed: &Bed) -> Result<()> {
    let groups = "[ ! -d /sys/fs/cgroup/unified/default ] || find /sys/fs/cgroup/unified/default -depth -type d -exec rmdir {} +";
    bed.sh(Node::A, groups).map(drop)
}

fn checkpoint_restore(bed: &Bed) -> Result<()> {
    install(bed, "with")?;
    let unique = format!("UNIQUE={}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
    let keeper = "read v < /proc/sys/kernel/random/uuid; (while :; do sleep 1; done) & trap 'echo $v > /tmp/v' USR1; while :; do sleep 0.05; done";
    let value = |id: &str| -> Result<String> {
        bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "USR1", id])?;
        let wait =
            "for i in $(seq 100); do [ ! -s /tmp/v ] || break; sleep 0.05; done; cat /tmp/v; rm /tmp/v";
        let output = container::exec(bed, Node::A, id, &["sh", "-c", wait])?;
        ensure!(output.status.success() && output.stdout.len() > 30, "{id}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let crun = options(&requirements::runtime());
    let run = Run::new(bed, "t1", "busybox").options(&crun).options(&["--null-io", "--env", &unique]);
    run.args(&["sh", "-c", keeper]).start(Node::A)?;
    let before = value("t1")?;
    bed.ok(Node::A, &["ctr", "c", "checkpoint", "--task", "--rw", "--image", "t1", "localhost/ck:1"])?;
    ensure!(value("t1")? == before, "the checkpointed one is another");
    container::delete(bed, Node::A, "t1")?;
    bed.ok(Node::A, &["ctr", "c", "restore", "--live", "--rw", "t1", "localhost/ck:1"])?;
    ensure!(value("t1")? == before, "the restored one is another");
    ensure!(bed.ok(Node::A, &["ctr", "task", "ps", "t1"])?.lines().count() >= 4, "its processes");
    bed.ok(Node::A, &["ctr", "task", "metrics", "t1"])?;
    container::delete(bed, Node::A, "t1")?;
    bed.ok(Node::A, &["ctr", "image", "rm", "localhost/ck:1"])?;
    tidy(bed)
}

/// The nodes' policies name the file that names crun.
fn allow(bed: &Bed, node: Node) -> Result<Configured<'_>> {
    Configured::new(bed, node, &format!("[policy]\nruntime_configs = [\"{OPTIONS}\"]"))
}

fn moves_there_and_back(bed: &Bed) -> Result<()> {
    install(bed, "with")?;
    let _allowed = (allow(bed, Node::A)?, allow(bed, Node::B)?);
    container::pod(bed, Node::A, "m1", "10.77.7.7")?;
    let crun = options(&requirements::runtime());
    let pod = [&crun[..], &["--with-ns", "network:/run/netns/m1"]].concat();
    traffic::start(bed, Node::A, "m1", &pod, &["ts-probe", "tree", "2", "--every", "10"])?;
    traffic::wait_inside(bed, "m1", "tree round=2 wrong=0")?;
    for (from, to) in [(Node::A, Node::B), (Node::B, Node::A)] {
        moves::migrate(bed, "m1", from, to)?;
        let echo = container::exec(bed, to, "m1", &["sh", "-c", "exit 5"])?;
        ensure!(echo.status.code() == Some(5), "{echo:?}");
        let pids = bed.ok(to, &["ctr", "task", "ps", "m1"])?;
        ensure!(pids.lines().count() == 6, "five processes and a header: {pids}");
        let state = bed.path(to, "/run/containerd/runc/default/m1/status")?;
        ensure!(state.exists(), "it is not crun's any more");
        traffic::expect_right(&traffic::inside(bed, "m1")?)?;
    }
    container::delete(bed, Node::A, "m1")?;
    container::unpod(bed, Node::A, "m1")
}

/// A crun of many distributions: the error says what is missing, and the container runs on.
fn without_criu(bed: &Bed) -> Result<()> {
    install(bed, "without")?;
    let _allowed = allow(bed, Node::B)?;
    let crun = options(&requirements::runtime());
    container::pod(bed, Node::A, "m1", "10.77.7.8")?;
    let pod = [&crun[..], &["--null-io", "--with-ns", "network:/run/netns/m1"]].concat();
    Run::new(bed, "m1", "busybox").options(&pod).args(&["sleep", "1000"]).start(Node::A)?;
    let dump = bed.run(Node::A, &["ctr", "task", "checkpoint", "m1"])?;
    let said = String::from_utf8_lossy(&dump.stderr).into_owned();
    ensure!(!dump.status.success() && said.contains("built without CRIU"), "{said}");
    let outcome = moves::attempt(bed, "m1", Node::A, Node::B.address(), &[])?;
    ensure!(outcome.code != 0 && outcome.json.to_string().contains("built without CRIU"), "{}", outcome.json);
    ensure!(container::status(bed, Node::A, "m1")?.as_deref() == Some("RUNNING"), "it does not run on");
    container::delete(bed, Node::A, "m1")?;
    container::unpod(bed, Node::A, "m1")
}
