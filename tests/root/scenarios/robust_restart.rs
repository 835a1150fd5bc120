//! containerd goes away and comes back while containers run: nothing of theirs is lost, neither what ended meanwhile nor what was
//! asked for when it went.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};
use crate::many;
use crate::requirements::{self, Needs};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "robust_containerd_restarts", needs: Needs::Shim, run: restarts },
    Scenario { name: "robust_containerd_killed_while_busy", needs: Needs::Shim, run: killed_while_busy },
];

/// Ends containerd with the signal in `$1`, and waits until it is gone.
const STOP: &str = r#"
p=$(pgrep -x containerd)
kill -$1 $p
for i in $(seq 200); do [ -d /proc/$p ] && ! grep -q '^State:.Z' /proc/$p/status || exit 0; sleep 0.02; done
exit 1
"#;

/// Starts containerd; where it takes events is the socket in `$1`.
const START: &str = r#"
[ "$1" = /run/containerd/containerd.sock.ttrpc ] || { { cat /etc/containerd/config.toml; printf '[ttrpc]\n  address = "%s"\n' "$1"; } > /run/late.toml; config="-c /run/late.toml"; }
setsid containerd $config > /run/containerd-again.log 2>&1 < /dev/null &
for i in $(seq 200); do ctr version > /dev/null 2>&1 && exit 0; sleep 0.05; done
tail -20 /run/containerd-again.log; exit 1
"#;

const EVENTS: &str = "/run/containerd/containerd.sock.ttrpc";
const LATE: &str = "/run/containerd/late.ttrpc";

fn script(bed: &Bed, script: &str, argument: &str) -> Result<()> {
    bed.ok(Node::A, &["bash", "-ec", script, "bash", argument]).map(drop)
}

/// A shell that ends with `status` when there is a file `/tmp/go-ID`.
fn until_told(id: &str, status: u32) -> String {
    format!("while [ ! -e /tmp/go-{id} ]; do sleep 0.05; done; exit {status}")
}

/// Tells it, and waits until its process is gone.
fn tell(bed: &Bed, container: &str, id: &str, pid: u32) -> Result<()> {
    let root = container::rootfs(bed, Node::A, container)?;
    std::fs::write(root.join(format!("tmp/go-{id}")), "")?;
    let process = bed.path(Node::A, &format!("/proc/{pid}"))?;
    wait_for(Duration::from_secs(10), &format!("the end of {id}"), || {
        let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
        Ok(!status.contains("State:") || status.contains("\nState:\tZ"))
    })
}

/// The exits that containerd was told of: which process, and how it ended.
fn exits(events: &str) -> Vec<(String, u64)> {
    let json = events.lines().filter_map(|l| l.split_once(" /tasks/exit ")).map(|(_, json)| json);
    json.filter_map(|j| serde_json::from_str::<Value>(j).ok())
        .filter_map(|e| Some((e["id"].as_str()?.to_owned(), e["exit_status"].as_u64().unwrap_or(0))))
        .collect()
}

/// containerd stops; a task, another one of a pod, and a command in a third end; containerd starts, and is told of all of it only after
/// somebody listens: its socket for events appears late, which is also how long a busy containerd takes.
fn restarts(bed: &Bed) -> Result<()> {
    let counter = Run::new(bed, "t1", "probe").log()?;
    counter.args(&["ts-probe", "count", "--every", "10"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")?;
    let first = container::pid(bed, Node::A, "t1")?;
    for (round, signal) in ["TERM", "KILL", "TERM"].into_iter().enumerate() {
        one_restart(bed, round, signal).with_context(|| format!("restart {round}, by {signal}"))?;
        ensure!(container::pid(bed, Node::A, "t1")? == first, "t1 is another");
        let lines = container::log(bed, "t1")?.lines().count();
        container::wait_log(bed, "t1", &format!("out {}\n", lines + 3)).context("its output stopped")?;
    }
    container::delete(bed, Node::A, "t1")
}

fn one_restart(bed: &Bed, round: usize, signal: &str) -> Result<()> {
    let (alone, pod, member) = (format!("a{round}"), format!("p{round}"), format!("q{round}"));
    let pids = many::with(bed, Node::A, async |api| {
        api.run(&pod, Some(&pod), &[]).await?;
        let shell = async |id: &str, pod: Option<&str>, status| {
            api.run(id, pod, &["sh", "-c", &until_told(id, status)]).await
        };
        let pids = (shell(&alone, None, 7).await?, shell(&member, Some(&pod), 8).await?);
        let exec = api.exec_start(&pod, "x", &["sh", "-c", &until_told("x", 9)]).await?;
        Ok([pids.0, pids.1, exec])
    })?;
    script(bed, STOP, signal)?;
    tell(bed, &alone, &alone, pids[0])?;
    tell(bed, &member, &member, pids[1])?;
    tell(bed, &pod, "x", pids[2])?;
    script(bed, START, LATE)?;
    let mut listener = bed.command(Node::A, &["sh", "-c", "exec ctr events > /run/heard"]).spawn()?;
    let heard = bed.path(Node::A, "/run/heard")?;
    // an event of ours shows that somebody listens
    wait_for(Duration::from_secs(10), "a listener", || {
        bed.run(Node::A, &["ctr", "image", "tag", "--force", "localhost/busybox:1", "localhost/heard:1"])?;
        Ok(std::fs::read_to_string(&heard).unwrap_or_default().contains("/images/"))
    })?;
    bed.ok(Node::A, &["ln", "-sfn", LATE, EVENTS])?;
    let mut wanted = vec![(member.clone(), 8), ("x".to_owned(), 9)];
    // containerd ends a shim whose only container has ended; runc's goes before its events do
    if requirements::ours() {
        wanted.push((alone.clone(), 7));
    }
    let told = wait_for(Duration::from_secs(10), "the exits", || {
        let seen = exits(&std::fs::read_to_string(&heard)?);
        Ok(wanted.iter().all(|w| seen.contains(w)))
    });
    let seen = std::fs::read_to_string(&heard)?;
    listener.kill()?;
    listener.wait()?;
    bed.sh(
        Node::A,
        "p=$(pgrep -f '^ctr event[s]') && kill $p || true; rm /run/heard; ctr image rm localhost/heard:1",
    )?;
    told.with_context(|| format!("wanted {wanted:?} of\n{seen}"))?;
    let exec_status = many::with(bed, Node::A, async |api| {
        let status = api.wait(&pod, "x").await?;
        api.exec_delete(&pod, "x").await?;
        ensure!(api.exec(&pod, "y", &["true"]).await? == 0, "a command afterwards");
        Ok(status)
    })?;
    ensure!(exec_status == 9, "the command's end is {exec_status}");
    // back to where events go otherwise
    script(bed, STOP, "TERM")?;
    bed.sh(Node::A, &format!("rm -f {EVENTS} {LATE} /run/late.toml"))?;
    script(bed, START, EVENTS)?;
    many::with(bed, Node::A, async |api| {
        for id in [&alone, &member, &pod] {
            api.wipe(id).await?;
        }
        Ok(())
    })
}

/// Killed while containers are being made, started and deleted: when it is back, all of them can be removed, and nothing is left.
fn killed_while_busy(bed: &Bed) -> Result<()> {
    const MANY: usize = 12;
    let ids: Vec<String> = (0..MANY).map(|n| format!("b{n}")).collect();
    let busy = |id: String, api: many::Api| async move {
        for _ in 0..100 {
            // each call may fail from now on
            if api.run(&id, None, &[]).await.is_err() || api.remove(&id).await.is_err() {
                return;
            }
        }
    };
    let death: Result<()> = many::with(bed, Node::A, async |api| {
        let all = futures_util::future::join_all(ids.iter().cloned().map(|id| busy(id, api.clone())));
        let kill = async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            let mut kill = bed.command(Node::A, &["bash", "-ec", STOP, "bash", "KILL"]);
            let killed = tokio::task::spawn_blocking(move || kill.status()).await??;
            ensure!(killed.success(), "containerd was not killed");
            bail!("killed")
        };
        futures_util::future::join(all, kill).await.1
    });
    ensure!(death.as_ref().is_err_and(|e| e.to_string() == "killed"), "{death:?}");
    script(bed, START, EVENTS)?;
    bed.ok(Node::A, &["ctr", "c", "rm", "tmpl"])?;
    // a snapshot during whose making it was killed is one that it does not know of, but whose directory is in the way of the next one
    // ("failed to rename: ... file exists"), until it has collected what it does not know of
    wait_for(Duration::from_secs(10), "a containerd that makes snapshots", || {
        Ok(bed.run(Node::A, &["ctr", "snapshots", "prepare", "again"])?.status.success())
    })?;
    bed.ok(Node::A, &["ctr", "snapshots", "rm", "again"])?;
    many::with(bed, Node::A, async |api| {
        for id in &ids {
            api.wipe(id).await?;
        }
        for id in &ids {
            api.run(id, None, &[]).await.with_context(|| format!("{id} again"))?;
        }
        for id in &ids {
            api.remove(id).await?;
        }
        Ok(())
    })
}
