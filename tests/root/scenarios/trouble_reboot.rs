//! The destination is switched off in the middle of a move, and comes back: what its journal says about who was on the way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::matrix;
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::{self, Attempt, Fault, Mounted, Witness};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "reboot_before_the_commit", needs: Needs::Migration, run: before },
    Scenario { name: "reboot_after_the_commit", needs: Needs::Migration, run: after },
];

/// Everything but process 1 ends at once; then what no boot finds goes: mounts, cgroups, and what was on /run.
const OFF: &str = r"
for round in 1 2 3; do
  for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = 1 ] || [ $p = $$ ] || [ $p = $PPID ] || kill -9 $p 2> /dev/null || true; done
done
sleep 0.2
awk '$2 ~ /^.run.(containerd|transship|netns)/ || /criu/ { print $2 }' /proc/self/mounts | sort -r | while read -r m; do umount -l $m; done
rm -rf /run/containerd /run/transship /run/netns/* /run/runc
find /sys/fs/cgroup/*/default /sys/fs/cgroup/default -depth -type d -exec rmdir {} + 2> /dev/null || true
mkdir -p /run/transship
";

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Node b after it was switched off: its disk is as it was, and it is another boot.
fn switch_off(bed: &Bed) -> Result<Mounted<'_>> {
    bed.ok(Node::B, &["bash", "-c", OFF])?;
    Mounted::text(bed, Node::B, "11111111-2222-3333-4444-555555555555\n", BOOT_ID)
}

fn switch_on(bed: &Bed) -> Result<()> {
    matrix::start_containerd(bed, Node::B)?;
    bed.start_agent(Node::B)
}

/// The source runs on, and of the half-made copy nothing is left when the node is back.
fn before(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let fault = Fault::at(bed, Node::B, "restore")?;
    let attempt = Attempt::start(bed, "w1", &["--silence", "3"])?;
    fault.reached()?;
    let other_boot = switch_off(bed)?;
    drop(fault);
    let outcome = attempt.finish()?;
    ensure!(outcome.code != 0 && outcome.code != 9, "exit {}: {}", outcome.code, outcome.json);
    switch_on(bed)?;
    wait_for(Duration::from_secs(10), "the record's end", || {
        Ok(bed.ok(Node::B, &["ctr", "container", "ls", "-q"])?.trim().is_empty())
    })?;
    // containerd keeps the work directory of a container that was there when it started, until it starts again
    bed.ok(Node::B, &["rm", "-r", "/var/lib/containerd/io.containerd.runtime.v2.task/default/w1"])?;
    let moved = witness.finish_untouched();
    drop(other_boot);
    moved.map(drop)
}

/// The commit was on the disk before anything ran: the container is the other node's, where it ended as any container does when its node is
/// switched off. It can be started anew there, from its files, and nowhere else.
fn after(bed: &Bed) -> Result<()> {
    let id = "w1";
    let redis = moves::start_redis(bed, Node::A, id, "10.77.6.1")?;
    let saved = container::exec(bed, Node::A, id, &["sh", "-c", "redis-cli set kept yes && redis-cli save"])?;
    ensure!(saved.status.success(), "{saved:?}");
    let fault = Fault::at(bed, Node::B, "running")?;
    let attempt = Attempt::start(bed, id, &["--silence", "3"])?;
    fault.reached()?;
    let other_boot = switch_off(bed)?;
    drop(fault);
    let outcome = attempt.finish()?;
    // nobody can be asked: the copy here stands still
    trouble::failed(&outcome, 9, &["frozen", "transship resolve"])?;
    switch_on(bed)?;
    wait_for(Duration::from_secs(20), "node a lets go of it", || {
        Ok(bed.ok(Node::A, &["ctr", "container", "ls", "-q"])?.trim().is_empty())
    })?;
    let said = bed.hack(["log", "b", "200"])?;
    ensure!(said.contains("ended with the machine; it can be started anew"), "{said}");
    let record = bed.ok(Node::B, &["ctr", "container", "info", id])?;
    let path = record.split('"').find(|word| word.starts_with("/run/netns/")).context("no network")?;
    // as whoever runs the node makes it at each boot
    let network = path.trim_start_matches("/run/netns/");
    bed.sh(Node::B, &format!("ip netns add {network}; ip -n {network} link set lo up"))?;
    bed.ok(Node::B, &["ctr", "task", "start", "--detach", "--null-io", id])?;
    let mut kept = String::new();
    let answers = wait_for(Duration::from_secs(10), "its answer", || {
        let asked = container::exec(bed, Node::B, id, &["redis-cli", "get", "kept"])?;
        kept = String::from_utf8_lossy(&asked.stdout).into_owned();
        Ok(kept.trim() == "yes")
    });
    answers.with_context(|| format!("it says {kept:?}"))?;
    container::delete(bed, Node::B, id)?;
    bed.sh(Node::B, &format!("! ip netns ls | grep {network} || ip netns del {network}"))?;
    drop(other_boot);
    container::unpod(bed, Node::A, &redis.id)?;
    trouble::nothing_on(bed, Node::B)
}
