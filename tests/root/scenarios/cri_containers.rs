//! Containers of a pod over CRI: their ends of all kinds, with exit codes and reasons, and what comes after them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Node, wait_for};
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::config::{ContainerConfig, Resources};
use crate::cri::pod::{EXITED, Pod, RUNNING};
use crate::cri::record::Record;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_ends", needs: Needs::Pods, run: |bed| compare::same(bed, ends) },
    Scenario { name: "cri_stop", needs: Needs::Pods, run: |bed| compare::same(bed, stop) },
    Scenario { name: "cri_restart", needs: Needs::Pods, run: |bed| compare::same(bed, restart) },
    Scenario { name: "cri_oom", needs: Needs::Pods, run: |bed| compare::same(bed, oom) },
];

/// An init container that ends well, ones that do not, and one that ends before its start is over.
fn ends(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "ends", record)?;
    for (name, script) in [
        ("init", "echo made > /tmp/x; sleep 0.2; cat /tmp/x"),
        ("at-once", "exit 0"),
        ("failed", "echo broken >&2; exit 3"),
        // no signal of its own kills a process 1
        ("own-signal", "kill -SEGV $$; exit 4"),
    ] {
        let id = pod.start(name, &["sh", "-c", script], record)?;
        cri.wait_state(&id, EXITED)?;
        record.outcome(name, &cri.verbose(&id));
        record.note(&format!("{name}'s output"), without_times(&pod.log(name)?));
        record.outcome(&format!("{name} stopped"), &cri.stop(&id, 1));
        record.outcome(&format!("{name} removed"), &cri.remove(&id));
    }
    let shot = pod.start("shot", &["sleep", "1000"], record)?;
    let info = cri.verbose(&shot)?.info.remove("info").context("no info")?;
    let pid = &serde_json::from_str::<serde_json::Value>(&info)?["pid"];
    cri.bed.sh(Node::A, &format!("kill -KILL {pid}"))?;
    cri.wait_state(&shot, EXITED)?;
    record.outcome("shot", &cri.verbose(&shot));
    record.outcome("pod", &pod.status());
    pod.remove()
}

/// With grace, past its grace, and without.
fn stop(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "stop", record)?;
    let polite = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done";
    let deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done";
    for (name, script, grace) in [("polite", polite, 10), ("deaf", deaf, 1), ("forced", polite, 0)] {
        let id = pod.start(name, &["sh", "-c", script], record)?;
        pod.wait_log(name, "up")?;
        record.outcome(&format!("{name} stop"), &cri.stop(&id, grace));
        record.outcome(name, &cri.verbose(&id));
        let wanted = if name == "polite" { 7 } else { 137 };
        ensure!(cri.status(&id)?.exit_code == wanted, "{:?}", cri.status(&id)?);
        record.outcome(&format!("{name} again"), &cri.stop(&id, grace));
        record.note(&format!("{name}'s output"), without_times(&pod.log(name)?));
    }
    pod.remove()
}

/// The next attempt in the same sandbox, as kubelet makes it: another container, the old one removed later.
fn restart(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "restart", record)?;
    let attempt = |n: u32| {
        move |config: &mut ContainerConfig| {
            config.metadata.as_mut().expect("set").attempt = n;
            config.log_path = format!("main-{n}.log");
        }
    };
    let crash = pod.start_with("main", &["sh", "-c", "echo first; exit 1"], record, attempt(0))?;
    record.call(&crash, "<main, first>");
    cri.wait_state(&crash, EXITED)?;
    record.outcome("first", &cri.verbose(&crash));
    let next = pod.start_with("main", &["sh", "-c", "echo second; sleep 1000"], record, attempt(1))?;
    record.call(&next, "<main, second>");
    cri.wait_state(&next, RUNNING)?;
    cri.remove(&crash)?;
    record.outcome("first, removed", &cri.verbose(&crash));
    pod.wait_log("main-1", "second")?;
    record.outcome("second", &cri.verbose(&next));
    record.note("its hostname", cri.output(&next, &["hostname"])?);
    record.note("shims", pod.shims()?.len());
    pod.remove()
}

/// Killed by the kernel for its memory: the reason is what kubelet shows to the user.
fn oom(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "oom", record)?;
    let limited = |config: &mut ContainerConfig| {
        let limit = 32 << 20;
        let resources = Resources {
            memory_limit_in_bytes: limit,
            memory_swap_limit_in_bytes: limit,
            ..Default::default()
        };
        config.linux.as_mut().expect("set").resources = Some(resources);
    };
    let all = pod.start_with("all", &["tail", "/dev/zero"], record, limited)?;
    cri.wait_state(&all, EXITED)?;
    reason_comes(cri, &all);
    let killed = cri.status(&all)?;
    ensure!(killed.reason == "OOMKilled" && killed.exit_code == 137, "{killed:?}");
    record.outcome("process 1", &cri.verbose(&all));
    // one that survives its child's death ends with its own status
    let child =
        pod.start_with("child", &["sh", "-c", "tail /dev/zero; echo survived; exit 5"], record, limited)?;
    cri.wait_state(&child, EXITED)?;
    reason_comes(cri, &child);
    record.outcome("its child", &cri.verbose(&child));
    record.note("its output", in_any_order(&without_times(&pod.log("child")?)));
    pod.remove()
}

/// The kernel's word may come after the end. Where it never comes, the records tell.
fn reason_comes(cri: &Cri<'_>, id: &str) {
    let come = || Ok(cri.status(id)?.reason == "OOMKilled");
    if let Err(error) = wait_for(Duration::from_secs(3), "the reason OOMKilled", come) {
        eprintln!("{error:#}");
    }
}

/// Between stdout and stderr there is no order.
pub fn in_any_order(log: &str) -> String {
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// A CRI log without its times, which must be there.
pub fn without_times(log: &str) -> String {
    let rest = |line: &str| match line.split_once(' ') {
        Some((time, rest)) if time.len() > 20 && time.contains('T') => rest.to_owned(),
        _ => format!("no time: {line}"),
    };
    log.lines().map(rest).collect::<Vec<_>>().join("\n")
}
