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
    // ctr ends as the container did
    let removed = bed.run(on, &["ctr", "task", "rm", "m1"])?;
    ensure!(removed.status.code() == Some(137), "{removed:?}");
    // takes the snapshot; the agent takes the network (see Bed::expect_clean)
    bed.ok(on, &["ctr", "container", "rm", "m1"]).map(drop)
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
        let removed = bed.run(Node::B, &["ctr", "task", "rm", "m1"])?;
        ensure!(removed.status.code() == Some(7), "{removed:?}");
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
    let images = "/run/move-checkpoint";
    bed.ok(Node::B, &["ctr", "task", "checkpoint", "--image-path", images, "m1"])?;
    let files = bed.ok(Node::B, &["ls", images])?;
    ensure!(files.contains("inventory.img") && files.contains("pages-1.img"), "{files}");
    bed.ok(Node::B, &["rm", "-r", images])?;
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
    moves::refused(bed, "m1", Node::A, Node::B.address(), 4, "m1")?;
    container::delete(bed, Node::B, "m1")?;
    wait_for(Duration::from_secs(5), "the pod of node b is gone", || {
        Ok(!bed.ok(Node::B, &["ls", "/run/netns"])?.contains("m1"))
    })?;
    moves::migrate(bed, "m1", Node::A, Node::B)?;
    container::delete(bed, Node::B, "m1")
}
