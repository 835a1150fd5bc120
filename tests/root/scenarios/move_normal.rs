//! What moved is a normal container where it arrived, and its name is free where it came from.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::traffic;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "move_then_every_task_command", needs: Needs::Migration, run: every_task_command },
    Scenario { name: "move_then_exit_status", needs: Needs::Migration, run: exit_status },
    Scenario { name: "move_then_checkpoint", needs: Needs::Migration, run: checkpoint },
    Scenario { name: "move_leaves_the_name_free", needs: Needs::Migration, run: leaves_the_name_free },
];

fn every_task_command(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "m1", "10.77.7.1")?;
    let pod = ["--with-ns", "network:/run/netns/m1"];
    traffic::start(bed, Node::A, "m1", &pod, &["ts-probe", "tree", "2", "--every", "10"])?;
    traffic::wait_inside(bed, "m1", "tree round=2 wrong=0")?;
    moves::migrate(bed, "m1", Node::A, Node::B)?;
    let on = Node::B;
    let echo = container::exec(bed, on, "m1", &["sh", "-c", "exit 5"])?;
    ensure!(echo.status.code() == Some(5), "{echo:?}");
    let pids = bed.ok(on, &["ctr", "task", "ps", "m1"])?;
    ensure!(pids.lines().count() == 6, "five processes and a header: {pids}");
    let metrics = bed.ok(on, &["ctr", "task", "metrics", "m1"])?;
    ensure!(metrics.contains("memory.usage"), "{metrics}");
    bed.ok(on, &["ctr", "task", "pause", "m1"])?;
    container::wait_status(bed, on, "m1", "PAUSED")?;
    let before = traffic::inside(bed, "m1")?.len();
    std::thread::sleep(Duration::from_millis(100));
    ensure!(traffic::inside(bed, "m1")?.len() == before, "it ran while paused");
    bed.ok(on, &["ctr", "task", "resume", "m1"])?;
    wait_for(Duration::from_secs(5), "it goes on", || Ok(traffic::inside(bed, "m1")?.len() > before))?;
    traffic::expect_right(&traffic::inside(bed, "m1")?)?;
    bed.ok(on, &["ctr", "task", "kill", "--all", "--signal", "KILL", "m1"])?;
    container::wait_status(bed, on, "m1", "STOPPED")?;
    expect_removed(bed, on, 137)?;
    // takes the snapshot; the agent takes the network (see Bed::expect_clean)
    bed.ok(on, &["ctr", "container", "rm", "m1"]).map(drop)
}

/// Removes the stopped task, which must have ended with this status.
fn expect_removed(bed: &Bed, node: Node, status: i32) -> Result<()> {
    let removed = bed.run(node, &["ctr", "task", "rm", "m1"])?;
    let said = String::from_utf8_lossy(&removed.stderr);
    ensure!(said.contains(&format!("exit code {status}")), "{removed:?}");
    Ok(())
}

/// The exit of what moved here is told here, with its status, and by nobody else's.
fn exit_status(bed: &Bed) -> Result<()> {
    let script = "trap 'exit 7' TERM; while true; do sleep 0.05; done";
    traffic::start(bed, Node::A, "m1", &[], &["sh", "-c", script])?;
    let mut events = bed.command(Node::B, &["ctr", "events"]);
    let file = bed.shared()?.join("events.log");
    let mut events = events.stdout(std::fs::File::create(&file)?).spawn()?;
    let outcome = (|| {
        moves::migrate(bed, "m1", Node::A, Node::B)?;
        bed.ok(Node::B, &["ctr", "task", "kill", "--signal", "TERM", "m1"])?;
        container::wait_status(bed, Node::B, "m1", "STOPPED")?;
        expect_removed(bed, Node::B, 7)?;
        bed.ok(Node::B, &["ctr", "container", "rm", "m1"])?;
        wait_for(Duration::from_secs(5), "the container's deletion among the events", || {
            Ok(std::fs::read_to_string(&file)?.contains("/containers/delete"))
        })
    })();
    let _ = events.kill();
    let _ = events.wait();
    outcome?;
    let text = std::fs::read_to_string(&file)?;
    let topics: Vec<&str> =
        text.lines().filter_map(|l| l.split(' ').find(|w| w.starts_with("/tasks/"))).collect();
    let wanted = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    ensure!(topics == wanted, "{text}");
    let exit = text.lines().find(|l| l.contains("/tasks/exit")).unwrap_or_default();
    ensure!(exit.contains("\"exit_status\":7"), "{exit}");
    Ok(())
}

fn checkpoint(bed: &Bed) -> Result<()> {
    traffic::start(bed, Node::A, "m1", &[], &["ts-probe", "memory", "4", "--every", "10"])?;
    traffic::wait_inside(bed, "m1", "memory round=2 wrong=0")?;
    moves::migrate(bed, "m1", Node::A, Node::B)?;
    // without --image-path, which ctr passes to runc's own shim only
    let image = bed.ok(Node::B, &["ctr", "task", "checkpoint", "m1"])?;
    let image = image.trim();
    let listed = bed.ok(Node::B, &["ctr", "images", "ls", "-q"])?;
    ensure!(listed.lines().any(|l| l == image), "{image} is not among {listed}");
    bed.ok(Node::B, &["ctr", "images", "rm", "--sync", image])?;
    // and it runs on
    let before = traffic::inside(bed, "m1")?.len();
    wait_for(Duration::from_secs(5), "it goes on", || Ok(traffic::inside(bed, "m1")?.len() > before))?;
    moves::migrate(bed, "m1", Node::B, Node::A)?;
    let before = traffic::inside(bed, "m1")?.len();
    wait_for(Duration::from_secs(5), "it goes on", || Ok(traffic::inside(bed, "m1")?.len() > before))?;
    traffic::expect_right(&traffic::inside(bed, "m1")?)?;
    container::delete(bed, Node::A, "m1")
}

fn leaves_the_name_free(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "m1", "10.77.7.1")?;
    let sleep = |node| {
        let probe = Run::new(bed, "m1", "probe").pod("m1").options(&["--null-io"]);
        probe.args(&["ts-probe", "sleep"]).start(node)
    };
    sleep(Node::A)?;
    moves::migrate(bed, "m1", Node::A, Node::B)?;
    bed.expect_clean_node(Node::A)?;
    // another one of the same name, the same pod, and another address
    container::pod(bed, Node::A, "m1", "10.77.7.2")?;
    sleep(Node::A)?;
    let taken = moves::attempt(bed, "m1", Node::A, Node::B.address(), &[])?;
    let said = taken.json.to_string();
    ensure!(
        taken.code == 5 && said.contains("a container m1 is there already"),
        "exit {}: {said}",
        taken.code
    );
    for node in Node::ALL {
        ensure!(container::status(bed, node, "m1")?.as_deref() == Some("RUNNING"), "on node {}", node.name());
    }
    container::delete(bed, Node::B, "m1")?;
    wait_for(Duration::from_secs(5), "the pod of node b is gone", || {
        Ok(!bed.ok(Node::B, &["ls", "/run/netns"])?.contains("m1"))
    })?;
    moves::migrate(bed, "m1", Node::A, Node::B)?;
    container::delete(bed, Node::B, "m1")
}
