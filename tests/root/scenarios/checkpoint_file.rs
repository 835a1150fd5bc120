//! `transship checkpoint` and `transship restore`: a container's state in one file, and back, on this node and on the other one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves::{self, Redis};
use crate::requirements::Needs;
use crate::transship;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "checkpoint_restored_here", needs: Needs::Migration, run: restored_here },
    Scenario { name: "checkpoint_restored_on_the_other_node", needs: Needs::Migration, run: restored_there },
    Scenario { name: "checkpoint_and_stop", needs: Needs::Migration, run: and_stop },
    Scenario { name: "checkpoint_needs_the_image", needs: Needs::Migration, run: needs_the_image },
    Scenario {
        name: "checkpoint_of_a_paused_container",
        needs: Needs::Migration,
        run: of_a_paused_container,
    },
];

/// A path for a checkpoint, nothing there; both nodes see it.
fn file(bed: &Bed, name: &str) -> Result<String> {
    let path = bed.shared()?.join(name);
    let _ = std::fs::remove_file(&path);
    Ok(path.to_str().context("path")?.to_owned())
}

fn redis_cli(bed: &Bed, node: Node, args: &[&str]) -> Result<String> {
    let line: Vec<&str> = ["redis-cli"].iter().chain(args).copied().collect();
    let output = container::exec(bed, node, "r1", &line)?;
    ensure!(output.status.success(), "redis-cli {args:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Memory and a file in the writable layer, both saying `value`.
fn put(bed: &Bed, node: Node, value: &str) -> Result<()> {
    redis_cli(bed, node, &["set", "key", value])?;
    let output = container::exec(bed, node, "r1", &["sh", "-c", &format!("echo {value} > /data/file")])?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// Fails unless memory, writable layer and network are there as [`put`] left them.
fn expect(bed: &Bed, node: Node, redis: &Redis, value: &str) -> Result<()> {
    let key = redis_cli(bed, node, &["get", "key"])?;
    let output = container::exec(bed, node, "r1", &["sh", "-c", "read x < /data/file; echo $x"])?;
    let file = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(key == value && file == value, "wanted {value}, memory has {key:?}, the layer {file:?}");
    // from outside, over the pod's address
    let ping = format!("exec 3<>/dev/tcp/{}/6379; echo PING >&3; read -t 5 x <&3; echo $x", redis.ip);
    let output = bed.nodes(["client", "bash", "-c", &ping]).output()?;
    ensure!(output.stdout.starts_with(b"+PONG"), "from outside: {output:?}");
    Ok(())
}

/// What any running container can do.
fn expect_normal(bed: &Bed, node: Node) -> Result<()> {
    let metrics = bed.ok(node, &["ctr", "task", "metrics", "r1"])?;
    ensure!(metrics.contains("memory"), "{metrics}");
    let pids = bed.ok(node, &["ctr", "task", "ps", "r1"])?;
    ensure!(pids.lines().count() >= 2, "{pids}");
    bed.ok(node, &["ctr", "task", "pause", "r1"])?;
    container::wait_status(bed, node, "r1", "PAUSED")?;
    bed.ok(node, &["ctr", "task", "resume", "r1"])?;
    container::wait_status(bed, node, "r1", "RUNNING")
}

fn restored_here(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.1")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c1.ckpt")?;
    let json = transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path])?;
    ensure!(json["report"]["running"] == true, "{json}");
    let meta = std::fs::metadata(&path)?;
    ensure!(
        meta.permissions().mode() & 0o7777 == 0o600 && json["report"]["bytes"] == meta.len(),
        "{meta:?} {json}"
    );
    expect(bed, Node::A, &redis, "one").context("after the checkpoint")?;
    put(bed, Node::A, "two")?;
    transship::refused(bed, Node::A, &["restore", &path], 5, "a container r1 is there already")?;
    container::delete(bed, Node::A, "r1")?;
    transship::refused(bed, Node::A, &["restore", &path], 5, "/run/netns/r1")?;
    container::unpod(bed, Node::A, "r1")?;
    let json = transship::ok(bed, Node::A, &["restore", &path])?;
    ensure!(json["report"]["container"] == "r1" && json["report"]["namespace"] == "default", "{json}");
    ensure!(json["report"]["pid"] == container::pid(bed, Node::A, "r1")?, "{json}");
    expect(bed, Node::A, &redis, "one").context("after the restore")?;
    expect_normal(bed, Node::A)?;
    // again, from the restored one; the file of before can be restored any number of times
    put(bed, Node::A, "three")?;
    let again = file(bed, "c2.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "r1", "-o", &again])?;
    for (path, value) in [(&again, "three"), (&path, "one")] {
        moves::stop_redis(bed, Node::A, &redis)?;
        transship::ok(bed, Node::A, &["restore", path])?;
        expect(bed, Node::A, &redis, value)?;
    }
    moves::stop_redis(bed, Node::A, &redis)
}

fn restored_there(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.2")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c3.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path])?;
    moves::stop_redis(bed, Node::A, &redis)?;
    transship::ok(bed, Node::B, &["restore", &path])?;
    expect(bed, Node::B, &redis, "one")?;
    expect_normal(bed, Node::B)?;
    moves::migrate(bed, "r1", Node::B, Node::A)?;
    expect(bed, Node::A, &redis, "one").context("after a migration of the restored container")?;
    moves::stop_redis(bed, Node::A, &redis)
}

fn and_stop(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.3")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c4.ckpt")?;
    let json = transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path, "--stop"])?;
    ensure!(json["report"]["running"] == false, "{json}");
    container::wait_status(bed, Node::A, "r1", "STOPPED")?;
    moves::stop_redis(bed, Node::A, &redis)?;
    // under another name
    transship::ok(bed, Node::A, &["restore", &path, "--name", "r2"])?;
    let output = container::exec(bed, Node::A, "r2", &["redis-cli", "get", "key"])?;
    ensure!(output.stdout == b"one\n", "{output:?}");
    container::delete(bed, Node::A, "r2")?;
    container::unpod(bed, Node::A, "r1")
}

fn needs_the_image(bed: &Bed) -> Result<()> {
    bed.ok(Node::A, &["ctr", "image", "tag", "localhost/probe:1", "localhost/gone:1"])?;
    Run::new(bed, "t1", "gone").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let path = file(bed, "c5.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "t1", "--output", &path])?;
    container::delete(bed, Node::A, "t1")?;
    bed.ok(Node::A, &["ctr", "image", "rm", "--sync", "localhost/gone:1", "localhost/probe:1"])?;
    let refused = transship::refused(bed, Node::A, &["restore", &path], 8, "localhost/gone:1");
    bed.hack(["import", "a"])?;
    refused?;
    // its blobs are here again, under another name: enough
    transship::ok(bed, Node::A, &["restore", &path])?;
    container::wait_status(bed, Node::A, "t1", "RUNNING")?;
    container::delete(bed, Node::A, "t1")?;
    let _ = bed.run(Node::A, &["ctr", "image", "rm", "localhost/gone:1"])?;
    Ok(())
}

fn of_a_paused_container(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "count", "--every", "10"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")?;
    bed.ok(Node::A, &["ctr", "task", "pause", "t1"])?;
    let before = container::log(bed, "t1")?;
    let path = file(bed, "c6.ckpt")?;
    transship::refused(bed, Node::A, &["checkpoint", "t1", "--output", &path], 4, "task resume t1")?;
    ensure!(!Path::new(&path).exists(), "a file was left");
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("PAUSED"), "it was resumed");
    ensure!(container::log(bed, "t1")? == before, "it ran while it was paused");
    container::delete(bed, Node::A, "t1")
}
