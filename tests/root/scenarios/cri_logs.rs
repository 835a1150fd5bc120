//! What containers write, in the log files that kubelet reads.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::cri_containers::without_times;
use crate::Scenario;
use crate::bed::wait_for;
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::config::Id;
use crate::cri::pod::{EXITED, Pod};
use crate::cri::record::Record;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_logs", needs: Needs::Pods, run: |bed| compare::same(bed, logs) },
    Scenario { name: "cri_log_rotated", needs: Needs::Pods, run: |bed| compare::same(bed, rotated) },
    Scenario { name: "cri_log_flood", needs: Needs::Pods, run: |bed| compare::same(bed, flood) },
];

/// Both streams, lines without an end, lines longer than one entry, and a terminal.
fn logs(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "logs", record)?;
    for (name, script, tty) in [
        (
            "both",
            "for i in 1 2 3; do echo out $i; sleep 0.05; echo err $i >&2; sleep 0.05; done; printf 'no end'",
            false,
        ),
        ("long", "head -c 40000 /dev/zero | tr '\\0' x; echo; echo after", false),
        ("terminal", "echo out; echo err >&2; tty", true),
        ("bytes", "printf '\\377\\000z\\n\\n\\r\\n'", false),
    ] {
        let id = pod.start_with(name, &["sh", "-c", script], record, |config| config.tty = tty)?;
        cri.wait_state(&id, EXITED)?;
        let log = without_times(&pod.log(name)?);
        // a long line comes in pieces as they were read: its parts are joined, as those who read such logs do
        record.note(
            name,
            match name {
                "long" => joined(&log),
                _ => log.escape_debug().to_string(),
            },
        );
    }
    pod.remove()
}

/// The lines of a log, partial entries joined: for each its stream and its length.
fn joined(log: &str) -> String {
    let (mut lines, mut length) = (Vec::new(), 0);
    for entry in log.lines() {
        let mut words = entry.splitn(3, ' ');
        let (stream, tag, text) =
            (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next().unwrap_or(""));
        length += text.len();
        if tag == "F" {
            lines.push(format!("{stream} {length}"));
            length = 0;
        }
    }
    lines.join(", ")
}

/// kubelet renames a log that has grown and asks for a new one; no line is lost.
fn rotated(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "rotated", record)?;
    let id = pod.start(
        "main",
        &["sh", "-c", "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; sleep 0.01; done"],
        record,
    )?;
    pod.wait_log("main", "line 20\n")?;
    let (log, old) = (pod.log_path("main")?, pod.log_path("old")?);
    std::fs::rename(&log, &old)?;
    record.outcome("reopen", &cri.tell("ReopenContainerLog", Id { id: id.clone() }));
    cri.wait_state(&id, EXITED)?;
    let (first, second) = (pod.log("old")?, pod.log("main")?);
    ensure!(!first.is_empty() && !second.is_empty(), "{first}\n---\n{second}");
    record.note("all lines", without_times(&(first + &second)));
    record.outcome("reopen after its end", &cri.tell("ReopenContainerLog", Id { id }));
    pod.remove()
}

/// Megabytes at once: all of it arrives, and the container is not stalled.
fn flood(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    const LINES: usize = 100_000;
    let pod = Pod::run(cri, handler, "flood", record)?;
    let id = pod.start(
        "main",
        &["sh", "-c", &format!("yes 0123456789012345678901234567890123456789 | head -n {LINES}")],
        record,
    )?;
    let ended = cri.wait_state(&id, EXITED)?;
    wait_for(Duration::from_secs(5), "the log", || Ok(pod.log("main")?.lines().count() == LINES))?;
    let log = pod.log("main")?;
    record.note(
        "whole lines",
        log.lines().filter(|l| l.ends_with(" stdout F 0123456789012345678901234567890123456789")).count(),
    );
    record.note("exit code", ended.exit_code);
    pod.remove()
}
