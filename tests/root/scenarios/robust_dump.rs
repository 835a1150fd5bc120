//! A dump that takes its time holds up nobody else in the pod.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::many::{self, Api};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "robust_slow_dump_holds_up_nobody", needs: Needs::Shim, run: slow_dump }];

/// How often each call is timed.
const ROUNDS: usize = 7;

/// CRIU asks this before it looks at the tasks: it says that it was asked, and answers when there is no `/run/rob-hold` any more.
const HOLD: &str = r#"#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = pre-dump ] || exit 0
touch /run/rob-held
while [ -e /run/rob-hold ]; do sleep 0.05; done
"#;

/// Medians, in milliseconds, of a state, a whole exec, and a new member's life.
async fn calls(api: &Api, pod: &str) -> Result<[f64; 3]> {
    let mut times = [const { Vec::new() }; 3];
    for n in 0..ROUNDS {
        let begun = Instant::now();
        ensure!(api.state("d2").await? == 2, "d2 does not run");
        times[0].push(begun.elapsed());
        let begun = Instant::now();
        ensure!(api.exec("d2", &format!("x{n}"), &["true"]).await? == 0, "the command failed");
        times[1].push(begun.elapsed());
        let begun = Instant::now();
        api.run("d3", Some(pod), &[]).await?;
        api.remove("d3").await?;
        times[2].push(begun.elapsed());
    }
    Ok(times.map(|mut all| {
        all.sort();
        all[ROUNDS / 2].as_secs_f64() * 1000.0
    }))
}

fn slow_dump(bed: &Bed) -> Result<()> {
    let run = bed.path(Node::A, "/run")?;
    let script = run.join("rob-script");
    std::fs::write(&script, HOLD)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    bed.sh(Node::A, "mkdir -p /etc/criu; echo 'action-script \"/run/rob-script\"' > /etc/criu/runc.conf")?;
    many::with(bed, Node::A, async |api| {
        api.run("d1", Some("d1"), &[]).await?;
        api.run("d2", Some("d1"), &[]).await?;
        let without = calls(&api, "d1").await?;
        std::fs::write(run.join("rob-hold"), "")?;
        let dumping = api.clone();
        let dump = tokio::spawn(async move { dumping.checkpoint("d1").await });
        while !run.join("rob-held").exists() {
            ensure!(!dump.is_finished(), "the dump ended without being held: {:?}", dump.await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let during = calls(&api, "d1").await.context("while another container is dumped")?;
        ensure!(!dump.is_finished(), "the dump was not held");
        std::fs::remove_file(run.join("rob-hold"))?;
        dump.await??;
        eprintln!(
            "state, exec, life of a member in ms: {without:.1?}; while another is dumped: {during:.1?}"
        );
        ensure!(api.state("d1").await? == 2, "d1 does not run on");
        api.remove("d2").await?;
        api.remove("d1").await
    })?;
    bed.sh(Node::A, "rm /etc/criu/runc.conf /run/rob-script /run/rob-held").map(drop)
}
