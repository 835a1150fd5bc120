//! The Task API through ctr, where it is easy to differ from runc's shim: limits, signals, terminals. All of it holds for runc's shim
//! too. Call by call the two are compared in `tests/compare`.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, ended, wait_for};
use crate::container::{self, Run};
use crate::requirements::{self, Needs};
use crate::service;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "ctr_signals", needs: Needs::Shim, run: signals },
    Scenario { name: "ctr_update", needs: Needs::Shim, run: update },
    Scenario { name: "ctr_exec_id_in_use", needs: Needs::Shim, run: exec_id_in_use },
    Scenario { name: "ctr_terminal_size", needs: Needs::Shim, run: terminal_size },
];

fn signals(bed: &Bed) -> Result<()> {
    // by name and by number, to the first process and to a session
    let traps = "trap 'exit 21' USR1; trap 'exit 22' USR2; echo ready; while :; do sleep 0.05; done";
    for (signal, status) in [("SIGUSR1", "21"), ("USR2", "22"), ("9", "137")] {
        Run::new(bed, "t1", "busybox").log()?.args(&["sh", "-c", traps]).start(Node::A)?;
        container::wait_log(bed, "t1", "ready\n")?;
        std::fs::write(container::log_path(bed, "t1")?, "")?;
        bed.ok(Node::A, &["ctr", "task", "kill", "--signal", signal, "t1"])?;
        container::wait_status(bed, Node::A, "t1", "STOPPED")?;
        let end = bed.run(Node::A, &["ctr", "task", "rm", "t1"])?;
        let said = String::from_utf8_lossy(&end.stderr).into_owned();
        ensure!(said.contains(&format!("exit code {status}")), "{signal}: {said}");
        bed.ok(Node::A, &["ctr", "c", "rm", "t1"])?;
    }
    Run::new(bed, "t1", "busybox").options(&["--null-io"]).args(&["sleep", "1000"]).start(Node::A)?;
    let line = ["ctr", "task", "exec", "--exec-id", "x1", "t1", "sleep", "1000"];
    let mut session = bed.command(Node::A, &line).spawn()?;
    wait_for(Duration::from_secs(5), "the session", || {
        Ok(bed.ok(Node::A, &["ctr", "task", "ps", "t1"])?.lines().count() == 3)
    })?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "TERM", "--exec-id", "x1", "t1"])?;
    ensure!(ended(&mut session, "ctr task exec")?.code() == Some(143), "the session's end");
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("RUNNING"), "the signal hit more");
    let bad = bed.run(Node::A, &["ctr", "task", "kill", "--signal", "NOSUCH", "t1"])?;
    ensure!(!bad.status.success(), "no such signal");
    container::delete(bed, Node::A, "t1")
}

fn update(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "busybox")
        .options(&["--null-io", "--memory-limit", "67108864"])
        .args(&["sleep", "1000"])
        .start(Node::A)?;
    service::update(bed, Node::A, "t1", r#"{"memory":{"limit":33554432},"pids":{"limit":77}}"#)?;
    let metrics = bed.ok(Node::A, &["ctr", "task", "metrics", "t1"])?;
    ensure!(metrics.contains("33554432"), "{metrics}");
    let limit = "cat $(find /sys/fs/cgroup -path '*t1/pids.max' | head -1)";
    let limit = bed.sh(Node::A, limit)?;
    ensure!(limit.trim() == "77", "{limit}");
    let bad = service::update(bed, Node::A, "t1", "{");
    ensure!(bad.is_err(), "broken resources were accepted");
    container::delete(bed, Node::A, "t1")
}

fn exec_id_in_use(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "busybox").options(&["--null-io"]).args(&["sleep", "1000"]).start(Node::A)?;
    let line = ["ctr", "task", "exec", "--exec-id", "x1", "t1", "sleep", "1000"];
    let mut session = bed.command(Node::A, &line).stderr(Stdio::null()).spawn()?;
    wait_for(Duration::from_secs(5), "the session", || {
        Ok(bed.ok(Node::A, &["ctr", "task", "ps", "t1"])?.lines().count() == 3)
    })?;
    let again = bed.run(Node::A, &["ctr", "task", "exec", "--exec-id", "x1", "t1", "true"])?;
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    ensure!(!again.status.success() && said.contains("x1"), "{again:?}");
    // the end of the container ends the session too
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "KILL", "t1"])?;
    ensure!(ended(&mut session, "ctr task exec")?.code() == Some(137), "the session's end");
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    container::delete(bed, Node::A, "t1")
}

fn terminal_size(bed: &Bed) -> Result<()> {
    // ctr passes on the size of its own terminal, at the start and at SIGWINCH
    let runtime = requirements::runtime();
    let inside = "for i in 1 2 3 4 5 6 7 8 9 10; do stty size; sleep 0.1; done";
    let ctr = format!("ctr run --rm -t --runtime {runtime} localhost/busybox:1 t1 sh -c \"{inside}\"");
    let outer = format!("stty rows 31 cols 97; (sleep 0.6; stty rows 17 cols 55 < /dev/tty) & {ctr}");
    let text = bed.ok(Node::A, &["script", "-qec", &outer, "/dev/null"])?;
    ensure!(text.contains("31 97") && text.contains("17 55"), "{text}");
    Ok(())
}
