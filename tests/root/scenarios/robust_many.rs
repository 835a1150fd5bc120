//! Two hundred containers, fifty at a time, alone and in pods: all of them run, and nothing of them stays in a pod's shim that lives on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::stream::{StreamExt, iter};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::many::{self, Api};
use crate::requirements::{self, Needs};
use crate::shims::{self, Held, Shim};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "robust_many_containers", needs: Needs::Shim, run: many_containers },
    Scenario { name: "robust_descriptor_limit", needs: Needs::Shim, run: descriptor_limit },
];

/// Containers in all (TRANSSHIP_TEST_MANY: another number, to see whether memory grows in the long run), those at a time, pods.
const ALL_OF_THEM: usize = 200;
const AT_A_TIME: usize = 50;
const PODS: [&str; 3] = ["pod0", "pod1", "pod2"];
/// How much more memory of its own a shim may have afterwards, in KiB: what an allocator keeps, not what containers cost.
const SLACK: u64 = 1024;

/// One life: created, started, a command in it, killed, deleted.
async fn life(api: &Api, n: usize) -> Result<()> {
    let id = format!("m{n}");
    // three of four share the shims of pods, one has its own
    let pod = PODS.get(n % 4).copied();
    api.run(&id, pod, &[]).await?;
    let status = api.exec(&id, "x", &["sh", "-c", "exit 7"]).await?;
    ensure!(status == 7, "{id}: the command ended with {status}");
    api.remove(&id).await
}

async fn lives(api: &Api, numbers: std::ops::Range<usize>) -> Result<()> {
    let mut all = iter(numbers.map(|n| life(api, n))).buffer_unordered(AT_A_TIME);
    while let Some(one) = all.next().await {
        one?;
    }
    Ok(())
}

/// What the pods' shims hold when the threads that helped, which wait a second for more, have gone home.
fn at_rest(bed: &Bed) -> Result<[Held; 3]> {
    let shims: Vec<_> = PODS.iter().map(|pod| Shim::of(bed, Node::A, pod)).collect::<Result<_>>()?;
    let look = || -> Result<[Held; 3]> { Ok([shims[0].held()?, shims[1].held()?, shims[2].held()?]) };
    let mut last = look()?;
    wait_for(Duration::from_secs(20), "shims at rest", || {
        std::thread::sleep(Duration::from_millis(1300));
        let now = look()?;
        Ok(now == std::mem::replace(&mut last, now) && now.iter().all(|held| held.zombies == 0))
    })?;
    Ok(last)
}

fn mounts(bed: &Bed) -> Result<usize> {
    Ok(bed.sh(Node::A, "cat /proc/self/mountinfo")?.lines().count())
}

fn many_containers(bed: &Bed) -> Result<()> {
    many::with(bed, Node::A, async |api| {
        for pod in PODS {
            api.run(pod, Some(pod), &[]).await?;
        }
        // the first ones make the shim's tables and buffers as large as they will be
        lives(&api, 0..AT_A_TIME).await?;
        let before = at_rest(bed)?;
        let mounted = mounts(bed)?;
        let begun = Instant::now();
        let wanted = std::env::var("TRANSSHIP_TEST_MANY").ok().and_then(|n| n.parse().ok());
        let all = wanted.unwrap_or(ALL_OF_THEM);
        lives(&api, AT_A_TIME..all).await?;
        let took = begun.elapsed();
        for (pod, (before, after)) in PODS.into_iter().zip(before.into_iter().zip(at_rest(bed)?)) {
            eprintln!("{pod} after {all} containers in {took:.1?}: {before:?} became {after:?}");
            ensure!(after.zombies == 0, "{pod}: {after:?}");
            // runc's shim grows by threads
            if !requirements::ours() {
                continue;
            }
            ensure!(after.descriptors <= before.descriptors, "{pod}: {before:?} became {after:?}");
            ensure!(after.threads <= before.threads, "{pod}: {before:?} became {after:?}");
            ensure!(after.memory <= before.memory + SLACK, "{pod}: {before:?} became {after:?}");
        }
        ensure!(mounts(bed)? == mounted, "mounts are left");
        for pod in PODS {
            api.remove(pod).await.with_context(|| pod.to_owned())?;
        }
        Ok(())
    })
}

/// A containerd that was started with a low soft limit, as by systemd's default: the shim lifts it for itself, and a container has what it
/// has under runc's shim.
fn descriptor_limit(bed: &Bed) -> Result<()> {
    const SOFT: u64 = 300;
    let containerd: u32 = bed.ok(Node::A, &["pgrep", "-x", "containerd"])?.trim().parse()?;
    let [soft, hard] = shims::descriptor_limits(bed, Node::A, containerd)?;
    let restart = |limit: u64| {
        // by the shell: containerd lifts its own and gives children what it was started with
        let script = format!(
            "p=$(pgrep -x containerd); kill $p; while grep -qs '^State:.[^Z]' /proc/$p/status; do sleep 0.02; done
             ulimit -Sn {limit}; setsid containerd > /run/containerd-again.log 2>&1 < /dev/null &
             for i in $(seq 200); do ctr version > /dev/null 2>&1 && exit 0; sleep 0.05; done; exit 1"
        );
        bed.sh(Node::A, &script)
    };
    restart(SOFT)?;
    many::with(bed, Node::A, async |api| {
        let mut found = Vec::new();
        for runtime in [requirements::runtime().as_str(), "io.containerd.runc.v2"] {
            let api = api.unlimited(runtime);
            let pid = api.run("u1", None, &[]).await?;
            let shim = Shim::of(bed, Node::A, "u1")?;
            let own = shims::descriptor_limits(bed, Node::A, shim.pid)?;
            // Go's runtime stays one below
            ensure!(own[0] >= hard - 1, "the shim of {runtime} may have {own:?}");
            found.push(shims::descriptor_limits(bed, Node::A, pid)?);
            api.remove("u1").await?;
        }
        ensure!(found[0] == found[1], "containers may have {found:?}");
        ensure!(found[0][0] == SOFT, "{found:?}");
        Ok(())
    })?;
    restart(soft).map(drop)
}
