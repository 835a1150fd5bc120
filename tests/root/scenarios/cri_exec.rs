//! ExecSync, by which kubelet probes: output, exit code, time limit.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Node, patient};
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::pod::Pod;
use crate::cri::record::Record;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_probes", needs: Needs::Pods, run: |bed| compare::same(bed, probes) },
    Scenario { name: "cri_probes_at_once", needs: Needs::Pods, run: |bed| compare::same(bed, at_once) },
];

fn probes(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "probes", record)?;
    let id = pod.start("main", &["sleep", "1000"], record)?;
    let mut probe = |what: &str, script: &str, timeout: i64| {
        let answer = cri.exec(&id, &["sh", "-c", script], timeout);
        record.outcome(what, &answer);
        answer
    };
    let _ = probe("well", "echo fine", 5);
    let _ = probe("both streams", "echo out; echo err >&2; exit 9", 5);
    let _ = probe("nothing", "true", 5);
    let _ = probe("a signal", "kill -KILL $$", 5);
    let _ = probe("stdin is at its end", "cat; echo end", 5);
    let _ = probe("the environment", "env | sort; id; pwd; tty; cat /proc/self/cgroup", 5);
    let start = Instant::now();
    let _ = probe("past its limit", "echo begun; exec sleep 20", 1);
    ensure!(start.elapsed() < patient(Duration::from_secs(5)), "the limit of 1 s took {:?}", start.elapsed());
    // its child holds the output a second longer than itself
    let start = Instant::now();
    let _ = probe("a child that outlives it", "sleep 1 & echo begun", 10);
    record.note("waited for the child", start.elapsed() > Duration::from_millis(900));
    let big = cri.exec(&id, &["sh", "-c", "yes | head -c 3000000; echo x >&2"], 10)?;
    record.note("much output", format!("{} {} {}", big.stdout.len(), big.stderr.len(), big.exit_code));
    // more than the CRI passes on: it must not stall
    let huge = cri.exec(&id, &["sh", "-c", "yes | head -c 20000000; exit 6"], 20);
    record.note(
        "too much output",
        huge.map_or_else(|s| s.code().to_string(), |o| format!("{} {}", o.stdout.len(), o.exit_code)),
    );
    record.note("left of them", cri.output(&id, &["ps", "-o", "args"])?);
    pod.remove()
}

/// Many probes at the same time, as many containers have them.
fn at_once(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "probes", record)?;
    let id = pod.start("main", &["sleep", "1000"], record)?;
    let answers: Vec<String> = std::thread::scope(|scope| {
        let ask = |n: usize| {
            let id = id.clone();
            let bed = cri.bed;
            scope.spawn(move || -> Result<String> {
                let answer =
                    Cri::connect(bed)?.exec(&id, &["sh", "-c", &format!("echo {n}; exit {n}")], 20)?;
                Ok(format!("{} {}", String::from_utf8_lossy(&answer.stdout).trim(), answer.exit_code))
            })
        };
        let asked: Vec<_> = (0..10).map(ask).collect();
        asked
            .into_iter()
            .map(|a| a.join().map_or("panicked".into(), |r| r.unwrap_or_else(|e| format!("{e:#}"))))
            .collect()
    });
    record.note("answers", answers.join(", "));
    let fifos = cri.bed.sh(
        Node::A,
        &format!("find /run/containerd/io.containerd.grpc.v1.cri/containers/{id} -type p | wc -l"),
    )?;
    record.note("pipes left", fifos);
    pod.remove()
}
