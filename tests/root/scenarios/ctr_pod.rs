//! Containers of one pod share a shim, by the sandbox's annotation, and each lives and dies by itself.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};
use crate::requirements::Needs;

pub const ALL: &[Scenario] = &[Scenario { name: "ctr_pod_shares_a_shim", needs: Needs::Shim, run: shares }];

/// How many shims serve in the node: processes whose first argument ends in the name of one, without those that only start one.
fn shims(bed: &Bed) -> Result<usize> {
    let script = r#"for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline 2> /dev/null | grep -E '^[^ ]*containerd-shim-[a-z]+-v2 ' || true; done"#;
    Ok(bed.sh(Node::A, script)?.lines().filter(|l| !l.trim_end().ends_with(" start")).count())
}

/// A shim ends a moment after its last container.
fn expect(bed: &Bed, wanted: usize, when: &str) -> Result<()> {
    wait_for(Duration::from_secs(10), &format!("{wanted} shims {when}"), || Ok(shims(bed)? == wanted))
}

fn shares(bed: &Bed) -> Result<()> {
    let sandbox = ["--null-io", "--annotation", "io.kubernetes.cri.sandbox-id=t1"];
    let start = |id| Run::new(bed, id, "busybox").options(&sandbox).args(&["sleep", "1000"]).start(Node::A);
    expect(bed, 0, "at first")?;
    start("t1")?;
    start("t2")?;
    expect(bed, 1, "for one pod")?;
    // one of no pod has a shim of its own
    Run::new(bed, "t3", "busybox").options(&["--null-io"]).args(&["sleep", "1000"]).start(Node::A)?;
    expect(bed, 2, "for a pod and a container")?;
    container::delete(bed, Node::A, "t3")?;
    container::delete(bed, Node::A, "t2")?;
    let said = container::exec(bed, Node::A, "t1", &["echo", "here"])?;
    ensure!(said.stdout == b"here\n", "after the other's end: {said:?}");
    expect(bed, 1, "for what is left of the pod")?;
    container::delete(bed, Node::A, "t1")
}
