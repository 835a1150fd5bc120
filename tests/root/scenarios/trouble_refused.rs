//! Moves that are refused before anything is made: by the source, because the container cannot move, or by the destination,
//! because it does not fit there.

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::{self, Mounted, Witness, failed, refused};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "refused_unknown_container", needs: Needs::Migration, run: unknown_container },
    Scenario { name: "refused_not_running", needs: Needs::Migration, run: not_running },
    Scenario { name: "refused_host_network", needs: Needs::Migration, run: host_network },
    Scenario { name: "refused_shared_network", needs: Needs::Migration, run: shared_network },
    Scenario { name: "refused_bind_mounts", needs: Needs::Migration, run: bind_mounts },
    Scenario { name: "refused_paused_or_with_exec", needs: Needs::Migration, run: paused_or_with_exec },
    Scenario { name: "refused_to_itself", needs: Needs::Migration, run: to_itself },
    Scenario { name: "refused_name_taken", needs: Needs::Migration, run: name_taken },
    Scenario { name: "refused_no_bridge", needs: Needs::Migration, run: no_bridge },
    Scenario { name: "refused_no_room_no_memory", needs: Needs::Migration, run: no_room_no_memory },
    Scenario { name: "refused_cpu_features", needs: Needs::Migration, run: cpu_features },
];

const B: &str = "10.77.0.2";

fn unknown_container(bed: &Bed) -> Result<()> {
    refused(bed, "nosuch", B, &[], 3, &["no container nosuch", "namespace default", "ctr"])?;
    refused(bed, "nosuch", B, &["--namespace", "other"], 3, &["no container nosuch", "namespace other"])
        .map(drop)
}

fn not_running(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "KILL", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    refused(bed, "t1", B, &[], 4, &["t1 does not run", "stopped", "--cold"])?;
    bed.run(Node::A, &["ctr", "task", "rm", "t1"])?;
    refused(bed, "t1", B, &[], 4, &["t1 does not run", "no task", "--cold"])?;
    trouble::nothing_on(bed, Node::B)?;
    container::delete(bed, Node::A, "t1")
}

fn host_network(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").options(&["--null-io", "--net-host"]);
    probe.args(&["ts-probe", "sleep"]).start(Node::A)?;
    refused(bed, "t1", B, &[], 5, &["uses the node's network", "network namespace of its own"])?;
    trouble::nothing_on(bed, Node::B)?;
    container::delete(bed, Node::A, "t1")
}

/// With whom it shares its network is seen among processes that come and go all the time; alone there it moves.
fn shared_network(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "t1", "10.77.6.8")?;
    let run = |id, command: &[&str]| {
        Run::new(bed, id, "probe").pod("t1").options(&["--null-io"]).args(command).start(Node::A)
    };
    run("t1", &["sh", "-c", "while sleep 0.01; do :; done"])?;
    run("t2", &["ts-probe", "sleep"])?;
    let other = format!("process {}", container::pid(bed, Node::A, "t2")?);
    refused(bed, "t1", B, &[], 5, &["shares its network", &other, "one pod"])?;
    trouble::nothing_on(bed, Node::B)?;
    container::delete(bed, Node::A, "t2")?;
    moves::migrate(bed, "t1", Node::A, Node::B)?;
    moves::migrate(bed, "t1", Node::B, Node::A)?;
    container::delete(bed, Node::A, "t1")?;
    container::unpod(bed, Node::A, "t1")
}

fn bind_mounts(bed: &Bed) -> Result<()> {
    bed.sh(Node::A, "mkdir -p /run/node/bound")?;
    container::pod(bed, Node::A, "t1", "10.77.6.2")?;
    let mount = "type=bind,src=/run/node/bound,dst=/data,options=rbind:ro";
    let probe = Run::new(bed, "t1", "probe").pod("t1").options(&["--null-io", "--mount", mount]);
    probe.args(&["ts-probe", "sleep"]).start(Node::A)?;
    let pid = container::pid(bed, Node::A, "t1")?;
    refused(bed, "t1", B, &[], 5, &["/run/node/bound", "host_mounts"])?;
    bed.sh(Node::B, "mkdir -p /run/node/bound")?;
    refused(bed, "t1", B, &[], 5, &["/run/node/bound", "host_mounts"])?;
    {
        let _allowed = trouble::Configured::new(bed, Node::B, "host_mounts = [\"/run/node\"]")?;
        bed.sh(Node::B, "rmdir /run/node/bound")?;
        refused(bed, "t1", B, &[], 5, &["/run/node/bound", "does not exist"])?;
    }
    trouble::nothing_on(bed, Node::B)?;
    ensure!(container::pid(bed, Node::A, "t1")? == pid, "the source was touched");
    container::delete(bed, Node::A, "t1")?;
    container::unpod(bed, Node::A, "t1")
}

fn paused_or_with_exec(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    bed.ok(
        Node::A,
        &[
            "ctr",
            "task",
            "exec",
            "--detach",
            "--log-uri",
            "file:///dev/null",
            "--exec-id",
            "x1",
            "w1",
            "redis-cli",
            "blpop",
            "nothing",
            "0",
        ],
    )?;
    witness.refused(&[], 5, &["exec sessions", "x1", "end them"])?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--exec-id", "x1", "--signal", "KILL", "w1"])?;
    bed.ok(Node::A, &["ctr", "task", "pause", "w1"])?;
    refused(bed, "w1", B, &[], 4, &["w1 is paused", "resume it first"])?;
    let status = container::status(bed, Node::A, "w1")?;
    ensure!(status.as_deref() == Some("PAUSED"), "it is not as it was: {status:?}");
    bed.ok(Node::A, &["ctr", "task", "resume", "w1"])?;
    witness.finish_untouched().map(drop)
}

fn to_itself(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    refused(bed, "w1", Node::A.address(), &[], 2, &["is this node"])?;
    witness.finish_untouched().map(drop)
}

fn name_taken(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    Run::new(bed, "w1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::B)?;
    refused(bed, "w1", B, &[], 5, &["a container w1 is there already", "delete it"])?;
    let there = container::status(bed, Node::B, "w1")?;
    ensure!(there.as_deref() == Some("RUNNING"), "the one on node b was touched: {there:?}");
    container::delete(bed, Node::B, "w1")?;
    bed.ok(Node::B, &["ctr", "snapshot", "prepare", "w1"])?;
    refused(bed, "w1", B, &[], 5, &["a snapshot w1 is there already"])?;
    bed.ok(Node::B, &["ctr", "snapshot", "rm", "w1"])?;
    // the pod's network namespace keeps its path
    container::pod(bed, Node::B, "w1", "10.77.6.9")?;
    refused(bed, "w1", B, &[], 5, &["/run/netns/w1"])?;
    container::unpod(bed, Node::B, "w1")?;
    witness.finish_untouched().map(drop)
}

fn no_bridge(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    // a renamed link keeps its addresses
    bed.ok(Node::B, &["ip", "link", "set", "cni0", "name", "cni1"])?;
    let attempt = witness.refused(&[], 5, &["the bridge cni0 does not exist", "agent.toml"]);
    bed.ok(Node::B, &["ip", "link", "set", "cni1", "name", "cni0"])?;
    attempt?;
    witness.finish_untouched().map(drop)
}

fn no_room_no_memory(bed: &Bed) -> Result<()> {
    let witness = Witness::with_data(bed, "w1", 16)?;
    bed.sh(Node::B, "mkdir -p /run/transship/images")?;
    {
        let _small = Mounted::new(bed, Node::B, "-t tmpfs -o size=8m tmpfs", "/run/transship/images")?;
        witness.refused(&[], 5, &["images need about", "MiB", "images_dir"])?;
    }
    {
        let text = std::fs::read_to_string("/proc/meminfo")?;
        let kept: Vec<_> = text.lines().filter(|l| !l.starts_with("MemAvailable")).collect();
        let text = format!("MemAvailable:      10000 kB\n{}\n", kept.join("\n"));
        let _poor = Mounted::text(bed, Node::B, &text, "/proc/meminfo")?;
        witness.refused(&[], 5, &["of memory", "are available"])?;
    }
    witness.finish_untouched().map(drop)
}

fn cpu_features(bed: &Bed) -> Result<()> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let feature =
        ["sse4_2", "asimd"].into_iter().find(|f| text.contains(f)).context("a CPU without features")?;
    let witness = Witness::start(bed, "w1")?;
    let lesser = text.replace(&format!(" {feature}"), "");
    let _lesser = Mounted::text(bed, Node::B, &lesser, "/proc/cpuinfo")?;
    witness.refused(&[], 5, &["CPU lacks", feature, "--ignore-cpu"])?;
    let outcome = moves::attempt(bed, "w1", Node::A, B, &["--ignore-cpu"])?;
    ensure!(outcome.code == 0, "{} {}", outcome.json, outcome.stderr);
    // from the lesser to the better one nothing is missing
    moves::migrate(bed, "w1", Node::B, Node::A)?;
    let after = moves::attempt(bed, "w1", Node::A, B, &[])?;
    failed(&after, 5, &[feature])?;
    witness.finish(Node::A).map(drop)
}
