//! containerd's own checkpoint and restore (`ctr task checkpoint`, `ctr c checkpoint`, `ctr c restore`), as with runc's shim: all of
//! it holds for that one too.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::requirements::Needs;
use crate::service;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "ctr_checkpoint_restore_live", needs: Needs::Shim, run: restore_live },
    Scenario { name: "ctr_task_checkpoint", needs: Needs::Shim, run: task_checkpoint },
    Scenario { name: "ctr_checkpoint_and_exit", needs: Needs::Shim, run: and_exit },
    Scenario { name: "ctr_checkpoint_terminal", needs: Needs::Shim, run: terminal },
];

/// A shell that holds a random value in its memory only, and writes it down when asked.
const KEEPER: &str =
    "read v < /proc/sys/kernel/random/uuid; trap 'echo $v > /tmp/v' USR1; while :; do sleep 0.05; done";

/// What the shell of `id` holds.
fn value(bed: &Bed, id: &str) -> Result<String> {
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "USR1", id])?;
    let wait = "for i in $(seq 100); do [ ! -s /tmp/v ] || break; sleep 0.05; done; cat /tmp/v; rm /tmp/v";
    let output = container::exec(bed, Node::A, id, &["sh", "-c", wait])?;
    ensure!(output.status.success() && output.stdout.len() > 30, "{id}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// containerd refuses to store the same record twice when it checkpoints, so each has something of its own.
fn unique() -> String {
    format!("UNIQUE={}", std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos())
}

fn keeper(bed: &Bed, id: &str) -> Result<()> {
    let run = Run::new(bed, id, "busybox").options(&["--null-io", "--env", &unique()]);
    run.args(&["sh", "-c", KEEPER]).start(Node::A)
}

fn remove_checkpoints(bed: &Bed) -> Result<()> {
    bed.sh(
        Node::A,
        "for i in $(ctr image ls -q | grep -e /checkpoint/ -e ^localhost/ck); do ctr image rm $i; done",
    )
    .map(drop)
}

fn restore_live(bed: &Bed) -> Result<()> {
    keeper(bed, "t1")?;
    let before = value(bed, "t1")?;
    let output = container::exec(bed, Node::A, "t1", &["sh", "-c", "echo layer > /root/file"])?;
    ensure!(output.status.success(), "{output:?}");
    bed.ok(Node::A, &["ctr", "c", "checkpoint", "--task", "--rw", "--image", "t1", "localhost/ck:1"])?;
    ensure!(value(bed, "t1")? == before, "the checkpointed one is another");
    // never beside another copy: the cgroup is in the record, and runc 1.3 wants it empty
    container::delete(bed, Node::A, "t1")?;
    for id in ["t2", "t1"] {
        bed.ok(Node::A, &["ctr", "c", "restore", "--live", "--rw", id, "localhost/ck:1"])?;
        let now = value(bed, id)?;
        ensure!(now == before, "{id}: its memory is {now:?}, was {before:?}");
        let output = container::exec(bed, Node::A, id, &["cat", "/root/file"])?;
        ensure!(output.stdout == b"layer\n", "{id}: {output:?}");
        ensure!(bed.ok(Node::A, &["ctr", "task", "ps", id])?.lines().count() >= 2);
        bed.ok(Node::A, &["ctr", "task", "pause", id])?;
        container::wait_status(bed, Node::A, id, "PAUSED")?;
        bed.ok(Node::A, &["ctr", "task", "resume", id])?;
        container::delete(bed, Node::A, id)?;
    }
    remove_checkpoints(bed)
}

fn task_checkpoint(bed: &Bed) -> Result<()> {
    keeper(bed, "t1")?;
    let before = value(bed, "t1")?;
    let name = bed.ok(Node::A, &["ctr", "task", "checkpoint", "t1"])?;
    let images = bed.ok(Node::A, &["ctr", "image", "ls", "-q"])?;
    ensure!(name.contains("checkpoint/t1") && images.contains(name.trim()), "{name}\n{images}");
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("RUNNING"), "it does not run on");
    ensure!(value(bed, "t1")? == before, "it is another");
    container::delete(bed, Node::A, "t1")?;
    remove_checkpoints(bed)
}

fn and_exit(bed: &Bed) -> Result<()> {
    keeper(bed, "t1")?;
    // only for runc's runtime does containerd pass on where the images shall be; what it asks of the shim is the same
    let stored = |bed: &Bed| bed.ok(Node::A, &["ctr", "content", "ls", "-q"]);
    let before = stored(bed)?;
    service::checkpoint(bed, Node::A, "t1", false, "")?;
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("RUNNING"), "it does not run on");
    // containerd 1.7 fails where the second checkpoint's record of the container is the same as the first one's
    for digest in stored(bed)?.lines().filter(|d| !before.lines().any(|b| b == *d)) {
        bed.run(Node::A, &["ctr", "content", "rm", digest])?;
    }
    service::checkpoint(bed, Node::A, "t1", true, "")?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    // the task has ended; a new one of the same container is as any
    bed.run(Node::A, &["ctr", "task", "rm", "t1"])?;
    bed.ok(Node::A, &["ctr", "task", "start", "-d", "--null-io", "t1"])?;
    value(bed, "t1")?;
    container::delete(bed, Node::A, "t1")
}

fn terminal(bed: &Bed) -> Result<()> {
    let runtime = crate::requirements::runtime();
    let line =
        format!("ctr run -d -t --env {} --runtime {runtime} localhost/busybox:1 t1 sh -c \"$0\"", unique());
    let run = format!("script -qec '{line}' /dev/null");
    bed.ok(Node::A, &["env", &format!("KEEPER={KEEPER}"), "bash", "-ec", &run.replace("$0", "$KEEPER")])?;
    let before = value(bed, "t1")?;
    bed.ok(Node::A, &["ctr", "task", "checkpoint", "t1"])?;
    ensure!(value(bed, "t1")? == before, "it is another");
    container::delete(bed, Node::A, "t1")?;
    remove_checkpoints(bed)
}
