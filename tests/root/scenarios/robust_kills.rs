//! A shim that is killed: containerd cleans up what it had, whatever it had.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, patient, wait_for};
use crate::container::{self, Run};
use crate::many;
use crate::requirements::{self, Needs};
use crate::shims::Shim;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "robust_shim_killed", needs: Needs::Shim, run: alone },
    Scenario { name: "robust_pods_shim_killed", needs: Needs::Shim, run: pod },
    Scenario { name: "robust_shim_killed_while_busy", needs: Needs::Shim, run: while_busy },
];

/// Kills the shim of `id` and waits until containerd has done with the tasks, and their processes are gone.
fn kill(bed: &Bed, id: &str, tasks: &[&str], processes: &str) -> Result<()> {
    let shim = Shim::of(bed, Node::A, id)?;
    bed.ok(Node::A, &["kill", "-9", &shim.pid.to_string()])?;
    for task in tasks {
        wait_for(Duration::from_secs(15), &format!("containerd to notice the end of {task}"), || {
            let state = container::status(bed, Node::A, task)?;
            Ok(state.is_none_or(|s| s == "STOPPED" || s == "UNKNOWN"))
        })?;
    }
    wait_for(Duration::from_secs(10), "the processes' end", || {
        Ok(bed.run(Node::A, &["pgrep", "-f", processes])?.stdout.is_empty())
    })
}

/// containerd may still be at it, and keeps what it has found to be stopped.
fn forget_task(bed: &Bed, id: &str) -> Result<()> {
    wait_for(Duration::from_secs(10), &format!("the task {id} to be gone"), || {
        let _ = bed.run(Node::A, &["ctr", "task", "rm", "--force", id])?;
        Ok(container::status(bed, Node::A, id)?.is_none())
    })
}

fn alone(bed: &Bed) -> Result<()> {
    Run::new(bed, "t1", "busybox").options(&["--null-io"]).args(&["sleep", "1000"]).start(Node::A)?;
    kill(bed, "t1", &["t1"], "^sleep 1000")?;
    // a new life under the same name
    forget_task(bed, "t1")?;
    let start = ["ctr", "task", "start", "-d", "--null-io", "t1"];
    // containerd cleans up in the background, and has the name until it is done
    wait_for(Duration::from_secs(10), "containerd lets go of the name", || {
        let started = bed.run(Node::A, &start)?;
        let busy = String::from_utf8_lossy(&started.stderr).contains("task t1: already exists");
        ensure!(started.status.success() || busy, "{started:?}");
        Ok(started.status.success())
    })?;
    let output = container::exec(bed, Node::A, "t1", &["echo", "hello"])?;
    ensure!(output.stdout == b"hello\n", "{output:?}");
    container::delete(bed, Node::A, "t1")
}

/// The shim of a pod with all that a shim can hold: commands that run, a paused container, mounts, a terminal, a logging program, and
/// processes that have left their session. What is left is looked for after every scenario.
fn pod(bed: &Bed) -> Result<()> {
    let sandbox = "io.kubernetes.cri.sandbox-id=t1";
    let pod = ["--annotation", sandbox];
    let sleeper = ["sleep", "1313"];
    let start = |id: &str, options: &[&str], args: &[&str]| {
        Run::new(bed, id, "busybox").options(&pod).options(options).args(args).start(Node::A)
    };
    start("t1", &["--null-io"], &sleeper)?;
    bed.ok(Node::A, &["mkdir", "-p", "/run/rob-mounted"])?;
    let mount = [
        "--mount",
        "type=bind,src=/run/rob-mounted,dst=/mnt,options=rbind:rw",
        "--mount",
        "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m",
    ];
    let daemons = "setsid sleep 1313 & setsid sleep 1313 & exec sleep 1313";
    start("t2", &[&["--null-io"][..], &mount].concat(), &["sh", "-c", daemons])?;
    start("t3", &["--null-io"], &sleeper)?;
    start("t4", &["--log-uri", "file:///run/rob-mounted/log"], &sleeper)?;
    let runtime = requirements::runtime();
    let tty =
        format!("ctr run -d -t --annotation {sandbox} --runtime {runtime} localhost/busybox:1 t5 sleep 1313");
    bed.ok(Node::A, &["script", "-qec", &tty, "/dev/null"])?;
    let session = ["ctr", "task", "exec", "--exec-id", "x", "t2", "sleep", "1313"];
    let mut session = bed.command(Node::A, &session).stderr(std::process::Stdio::null()).spawn()?;
    wait_for(Duration::from_secs(5), "the session", || {
        Ok(bed.ok(Node::A, &["pgrep", "-fx", "sleep 1313"])?.lines().count() == 8)
    })?;
    bed.ok(Node::A, &["ctr", "task", "pause", "t3"])?;
    let all = ["t1", "t2", "t3", "t4", "t5"];
    kill(bed, "t1", &all, "^sleep 1313")?;
    wait_for(Duration::from_secs(10), "the session's end", || Ok(session.try_wait()?.is_some()))?;
    for id in all {
        forget_task(bed, id)?;
        bed.ok(Node::A, &["ctr", "container", "rm", id])?;
    }
    // ctr's own, which it removes after an ordinary end
    bed.sh(Node::A, "rm -r /run/rob-mounted /run/containerd/fifo/*")?;
    if !requirements::ours() {
        // runc's shim leaves its socket
        bed.sh(Node::A, "rm -f /run/containerd/s/*")?;
    }
    bed.expect_clean()?;
    // and the pod's name can be used again
    start("t1", &["--null-io"], &sleeper)?;
    start("t2", &["--null-io"], &sleeper)?;
    container::delete(bed, Node::A, "t2")?;
    container::delete(bed, Node::A, "t1")
}

/// Killed while containers of its pod are being made, entered and deleted, so that some are half there.
fn while_busy(bed: &Bed) -> Result<()> {
    const MANY: usize = 8;
    let ids: Vec<String> = (0..MANY).map(|n| format!("k{n}")).collect();
    // the next create brings the pod another shim: all of them would live on
    let (stop, lives) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let busy = |id: String, api: many::Api| {
        let (stop, lives) = (stop.clone(), lives.clone());
        async move {
            while !stop.load(Ordering::Relaxed)
                && api.run(&id, Some("k"), &[]).await.is_ok()
                && api.exec(&id, "x", &["true"]).await.is_ok()
                && api.remove(&id).await.is_ok()
            {
                lives.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    many::with(bed, Node::A, async |api| {
        api.run("k", Some("k"), &[]).await?;
        let shim = Shim::of(bed, Node::A, "k")?;
        let all = ids.iter().map(|id| tokio::spawn(busy(id.clone(), api.clone())));
        let all: Vec<_> = all.collect();
        while lives.load(Ordering::Relaxed) < MANY {
            ensure!(all.iter().any(|one| !one.is_finished()), "all have failed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bed.ok(Node::A, &["kill", "-9", &shim.pid.to_string()])?;
        stop.store(true, Ordering::Relaxed);
        for one in all {
            let ended = tokio::time::timeout(patient(Duration::from_secs(30)), one).await;
            ended.context("a call that does not end")??;
        }
        for id in ids.iter().map(String::as_str).chain(["k"]) {
            let begun = std::time::Instant::now();
            // containerd may still be cleaning up
            while let Err(e) = api.wipe(id).await {
                ensure!(begun.elapsed() < patient(Duration::from_secs(15)), "{id} cannot be removed: {e:#}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    })?;
    bed.expect_clean()?;
    many::with(bed, Node::A, async |api| {
        api.run("k", Some("k"), &[]).await?;
        api.run("k0", Some("k"), &[]).await?;
        api.remove("k0").await?;
        api.remove("k").await
    })
}
