//! What processes have and are in: all of it arrives and goes on working.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::moves;
use crate::requirements::Needs;
use crate::traffic;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "move_a_tree_of_processes", needs: Needs::Migration, run: tree },
    Scenario { name: "move_keeps_limits", needs: Needs::Migration, run: limits },
    Scenario { name: "move_keeps_who_and_where", needs: Needs::Migration, run: who_and_where },
    Scenario { name: "move_readonly_root_and_tmpfs", needs: Needs::Migration, run: readonly_and_tmpfs },
];

const WORKLOADS: [&str; 6] = ["tree", "threads", "unix-pair", "shared", "timers", "zombie"];

/// Processes with pipes, threads, a pair of unix sockets, shared memory, timers, a zombie: all in one container.
fn tree(bed: &Bed) -> Result<()> {
    let script =
        "ts-probe tree 3 & ts-probe threads 8 & ts-probe unix-pair & ts-probe shared & ts-probe timers &
        ts-probe zombie & trap 'kill $(jobs -p)' TERM; wait; wait";
    traffic::start(bed, Node::A, "m1", &[], &["sh", "-c", script])?;
    let each = |round: u64| {
        let wanted = WORKLOADS.map(|w| format!("{w} round={round} "));
        wait_for(Duration::from_secs(15), &format!("round {round} of all"), || {
            let said = traffic::inside(bed, "m1")?;
            Ok(wanted.iter().all(|w| said.contains(w)))
        })
        .with_context(|| traffic::tail(&traffic::inside(bed, "m1").unwrap_or_default()))
    };
    each(2)?;
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "m1", from, from.other())?;
        let said = traffic::inside(bed, "m1")?;
        each(said.lines().filter(|l| l.starts_with("threads round=")).count() as u64 + 3)?;
    }
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "TERM", "m1"])?;
    traffic::wait_inside(bed, "m1", "zombie reaped")?;
    let said = traffic::inside(bed, "m1")?;
    traffic::expect_right(&said)?;
    ensure!(
        !said.lines().any(|l| l.contains("stuck=") && !l.contains("stuck=0 ")),
        "a thread stands still:\n{said}"
    );
    container::delete(bed, Node::A, "m1")
}

/// The values of a container's cgroups, v1 or v2, as its own process 1 is in them.
fn cgroup_values(bed: &Bed, node: Node, id: &str) -> Result<String> {
    let pid = container::pid(bed, node, id)?;
    bed.sh(
        node,
        &format!(
            "while IFS=: read -r _ controller path; do
               for base in /sys/fs/cgroup/$controller /sys/fs/cgroup/${{controller#name=}} /sys/fs/cgroup/unified /sys/fs/cgroup; do
                 for f in memory.limit_in_bytes memory.soft_limit_in_bytes cpu.shares cpu.cfs_quota_us cpu.cfs_period_us \\
                   pids.max cpuset.cpus devices.list memory.max cpu.weight cpu.max; do
                   [ ! -f $base$path/$f ] || echo \"$f $(cat $base$path/$f | sort | xargs)\"
                 done
               done
             done < /proc/{pid}/cgroup | sort -u"
        ),
    )
}

fn limits(bed: &Bed) -> Result<()> {
    let options = ["--memory-limit", "50331648", "--cpu-shares", "333", "--cpus", "0.5"];
    traffic::start(bed, Node::A, "m1", &options, &["ts-probe", "memory", "4"])?;
    let wanted = cgroup_values(bed, Node::A, "m1")?;
    ensure!(wanted.contains("50331648"), "no limit at all: {wanted}");
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "m1", from, from.other())?;
        let found = cgroup_values(bed, from.other(), "m1")?;
        ensure!(found == wanted, "had\n{wanted}has\n{found}");
    }
    // and it counts: what goes beyond is killed
    let big = container::exec(bed, Node::A, "m1", &["ts-probe", "memory", "64"])?;
    ensure!(big.status.code() == Some(137), "64 MiB in 48: {big:?}");
    container::delete(bed, Node::A, "m1")
}

/// Environment, directory, user, groups, capabilities, seccomp, resource limits.
fn who_and_where(bed: &Bed) -> Result<()> {
    let mut options =
        vec!["--env", "WHO=somebody else", "--cwd", "/tmp", "--seccomp", "--cap-drop", "CAP_CHOWN"];
    if crate::requirements::may_read_limits() {
        options.extend(["--user", "65534:65534"]);
    } else {
        eprintln!(
            "without CAP_SYS_RESOURCE, CRIU cannot read another user's resource limits: run as root only"
        );
    }
    traffic::start(bed, Node::A, "m1", &options, &["ts-probe", "sleep"])?;
    let tell = "tr '\\0' '\\n' < /proc/1/environ; readlink /proc/1/cwd /proc/1/exe /proc/1/root; cat /proc/1/limits /proc/1/oom_score_adj; hostname
        grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Umask|Sig(Cgt|Ign|Blk))' /proc/1/status; id; pwd; grep -c . /proc/1/mountinfo";
    let told = |node| -> Result<String> {
        // as the same user: others may not look
        let out = container::exec(bed, node, "m1", &["sh", "-c", tell])?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
    };
    let wanted = told(Node::A)?;
    ensure!(wanted.contains("WHO=somebody else") && wanted.contains("Seccomp:\t2"), "{wanted}");
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "m1", from, from.other())?;
        let found = told(from.other())?;
        ensure!(found == wanted, "was\n{wanted}is\n{found}");
    }
    container::delete(bed, Node::A, "m1")
}

fn readonly_and_tmpfs(bed: &Bed) -> Result<()> {
    let options =
        ["--read-only", "--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=rw:nosuid:size=33554432"];
    traffic::start(bed, Node::A, "m1", &options, &["ts-probe", "files", "/scratch", "4", "--every", "10"])?;
    traffic::wait_inside(bed, "m1", "files round=2 wrong=0")?;
    let tell = "grep -E ' / | /scratch ' /proc/self/mounts | sed 's/lowerdir.*//'; stat -c '%n %a %u %s %Y' /scratch /scratch/*; touch /x 2>&1 || true";
    let told = |node| container::exec(bed, node, "m1", &["sh", "-c", tell]).map(|o| o.stdout);
    let wanted = told(Node::A)?;
    ensure!(String::from_utf8_lossy(&wanted).contains("Read-only"), "{}", String::from_utf8_lossy(&wanted));
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "m1", from, from.other())?;
        let found = told(from.other())?;
        ensure!(
            found == wanted,
            "was\n{}is\n{}",
            String::from_utf8_lossy(&wanted),
            String::from_utf8_lossy(&found)
        );
        let before = traffic::inside(bed, "m1")?.len();
        wait_for(Duration::from_secs(5), "it goes on", || Ok(traffic::inside(bed, "m1")?.len() > before))?;
    }
    traffic::expect_right(&traffic::inside(bed, "m1")?)?;
    container::delete(bed, Node::A, "m1")
}
