//! A task's life without any migration: what `ctr` shows of the runtime under test. All of it holds for runc's own shim too
//! (`TRANSSHIP_TEST_RUNTIME=io.containerd.runc.v2`).

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "run_prints_and_ends", needs: Needs::Shim, run: run_prints_and_ends },
    Scenario { name: "exit_status_arrives", needs: Needs::Shim, run: exit_status_arrives },
    Scenario { name: "stdin_arrives", needs: Needs::Shim, run: stdin_arrives },
    Scenario { name: "terminal", needs: Needs::Shim, run: terminal },
    Scenario { name: "exec_in_a_running_task", needs: Needs::Shim, run: exec_in_a_running_task },
    Scenario { name: "log_file", needs: Needs::Shim, run: log_file },
    Scenario { name: "term_and_delete", needs: Needs::Shim, run: term_and_delete },
    Scenario { name: "kill_all_of_a_tree", needs: Needs::Shim, run: kill_all_of_a_tree },
    Scenario { name: "pause_and_resume", needs: Needs::Shim, run: pause_and_resume },
    Scenario { name: "stats_and_pids", needs: Needs::Shim, run: stats_and_pids },
    Scenario { name: "command_that_does_not_exist", needs: Needs::Shim, run: command_that_does_not_exist },
    Scenario { name: "in_a_pods_network", needs: Needs::Shim, run: in_a_pods_network },
];

fn run_prints_and_ends(bed: &Bed) -> Result<()> {
    let output =
        Run::new(bed, "t1", "busybox").args(&["sh", "-c", "echo hello; echo woe >&2"]).foreground(Node::A)?;
    ensure!(
        output.status.success() && output.stdout == b"hello\n" && output.stderr == b"woe\n",
        "{output:?}"
    );
    Ok(())
}

fn exit_status_arrives(bed: &Bed) -> Result<()> {
    for wanted in [0, 1, 42, 255] {
        let output = Run::new(bed, "t1", "busybox")
            .args(&["sh", "-c", &format!("exit {wanted}")])
            .foreground(Node::A)?;
        ensure!(output.status.code() == Some(wanted), "wanted {wanted}: {output:?}");
    }
    let output = Run::new(bed, "t1", "busybox").args(&["sh", "-c", "ulimit -c 0; kill -ABRT $$; sleep 9"]);
    // process 1 of a pid namespace ignores signals without a handler, its own included
    let output = output.options(&["--with-ns", "pid:/proc/1/ns/pid"]).foreground(Node::A)?;
    ensure!(output.status.code() == Some(134), "killed by a signal: {output:?}");
    Ok(())
}

fn stdin_arrives(bed: &Bed) -> Result<()> {
    let runtime = crate::requirements::runtime();
    // ctr forgets an end of stdin that comes before it has made the task
    let line = format!(
        "(printf 'one\\ntwo\\n'; sleep 1) | timeout 10 ctr run --rm --runtime {runtime} localhost/busybox:1 t1 cat"
    );
    let text = bed.sh(Node::A, &line)?;
    ensure!(text == "one\ntwo\n", "{text:?}");
    Ok(())
}

fn terminal(bed: &Bed) -> Result<()> {
    let script = "tty; test -t 0 && test -t 1 && test -t 2 && echo all three; exit 7";
    let output = Run::new(bed, "t1", "busybox").args(&["sh", "-c", script]).terminal(Node::A)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("/dev/pts/0") && text.contains("all three"), "{output:?}");
    ensure!(output.status.code() == Some(7), "{output:?}");
    Ok(())
}

fn exec_in_a_running_task(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let output = container::exec(
        bed,
        Node::A,
        "t1",
        &["sh", "-c", "echo in; echo err >&2; cat /proc/1/cmdline; exit 5"],
    )?;
    ensure!(output.status.code() == Some(5) && output.stderr.starts_with(b"err\n"), "{output:?}");
    ensure!(output.stdout == b"in\nts-probe\0sleep\0", "{output:?}");
    let missing = container::exec(bed, Node::A, "t1", &["/no/such/program"])?;
    ensure!(!missing.status.success(), "{missing:?}");
    let again = container::exec(bed, Node::A, "t1", &["true"])?;
    ensure!(again.status.success(), "an exec that failed must leave the task usable: {again:?}");
    container::delete(bed, Node::A, "t1")
}

fn log_file(bed: &Bed) -> Result<()> {
    // another scenario's container of that name may have left its lines
    std::fs::remove_file(container::log_path(bed, "t1")?).ok();
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "count", "--every", "10", "--stderr"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 5\n")?;
    container::wait_log(bed, "t1", "err 5\n")?;
    container::delete(bed, Node::A, "t1")?;
    let log = container::log(bed, "t1")?;
    let counted: Vec<&str> = log.lines().filter_map(|l| l.strip_prefix("out ")).collect();
    let wanted: Vec<String> = (1..=counted.len()).map(|n| n.to_string()).collect();
    ensure!(counted == wanted, "lines are missing or out of order:\n{log}");
    Ok(())
}

fn term_and_delete(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("RUNNING"), "not running");
    let early = bed.run(Node::A, &["ctr", "task", "rm", "t1"])?;
    ensure!(!early.status.success(), "a running task must not be deleted without force");
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "TERM", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    let again = bed.run(Node::A, &["ctr", "task", "kill", "--signal", "TERM", "t1"])?;
    ensure!(!again.status.success(), "killing a stopped task must fail");
    bed.ok(Node::A, &["ctr", "task", "rm", "t1"])?;
    ensure!(container::status(bed, Node::A, "t1")?.is_none(), "still listed");
    bed.ok(Node::A, &["ctr", "container", "rm", "t1"]).map(drop)
}

fn kill_all_of_a_tree(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "tree", "3"]).start(Node::A)?;
    container::wait_log(bed, "t1", "tree round=2 wrong=0 processes=7")?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--all", "--signal", "KILL", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    container::delete(bed, Node::A, "t1")
}

fn pause_and_resume(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "count", "--every", "10"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")?;
    bed.ok(Node::A, &["ctr", "task", "pause", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "PAUSED")?;
    let before = container::log(bed, "t1")?.len();
    std::thread::sleep(std::time::Duration::from_millis(150));
    ensure!(container::log(bed, "t1")?.len() == before, "it ran while paused");
    bed.ok(Node::A, &["ctr", "task", "resume", "t1"])?;
    let next = format!("out {}\n", container::log(bed, "t1")?.lines().count() + 3);
    container::wait_log(bed, "t1", &next)?;
    container::delete(bed, Node::A, "t1")
}

fn stats_and_pids(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "tree", "2"]).start(Node::A)?;
    container::wait_log(bed, "t1", "tree round=2 wrong=0 processes=5")?;
    let pids = bed.ok(Node::A, &["ctr", "task", "ps", "t1"])?;
    ensure!(pids.lines().count() == 6, "{pids}");
    let metrics = bed.ok(Node::A, &["ctr", "task", "metrics", "t1"])?;
    ensure!(metrics.contains("memory.usage"), "{metrics}");
    container::delete(bed, Node::A, "t1")
}

fn command_that_does_not_exist(bed: &Bed) -> Result<()> {
    let output = Run::new(bed, "t1", "busybox").args(&["/no/such/program"]).foreground(Node::A)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("/no/such/program"), "{output:?}");
    // ctr leaves the container when the task could not be made
    let _ = bed.run(Node::A, &["ctr", "container", "rm", "t1"])?;
    Ok(())
}

fn in_a_pods_network(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "t1", "10.77.3.1")?;
    let output = Run::new(bed, "t1", "busybox")
        .pod("t1")
        .args(&["sh", "-c", "ip addr show eth0; ping -c1 -W2 10.77.0.9; ping -6 -c1 -W2 fd77::9"])
        .foreground(Node::A)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        text.contains("02:00:0a:4d:03:01") && text.contains("10.77.3.1/16") && text.contains("fd77::3:1/64"),
        "{text}"
    );
    container::unpod(bed, Node::A, "t1")
}
