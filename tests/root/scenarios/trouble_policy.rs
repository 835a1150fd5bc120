//! What a node takes from another one, and from a file: no more than its policy says.

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::transship;
use crate::trouble::{self, Configured, refused};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "trouble_policy_refuses", needs: Needs::Migration, run: refuses },
    Scenario { name: "trouble_policy_allows", needs: Needs::Migration, run: allows },
];

/// A container with this beyond a plain one is refused with these words, also from a file, and runs on.
fn one(bed: &Bed, options: &[&str], words: &[&str]) -> Result<()> {
    let run = Run::new(bed, "t1", "probe").options(&["--null-io"]).options(options);
    run.args(&["ts-probe", "sleep"]).start(Node::A)?;
    let pid = container::pid(bed, Node::A, "t1")?;
    refused(bed, "t1", Node::B.address(), &[], 5, words)?;
    ensure!(container::pid(bed, Node::A, "t1")? == pid, "the source was touched");
    trouble::nothing_on(bed, Node::B)?;
    container::delete(bed, Node::A, "t1")
}

fn refuses(bed: &Bed) -> Result<()> {
    one(bed, &["--privileged"], &["CAP_SYS_ADMIN", "`capabilities`", "devices", "policy"])?;
    let logger = "containerd.io/restart.loguri=binary:///bin/sh";
    one(bed, &["--label", logger], &["containerd.io/restart.loguri", "`labels`"])?;
    one(bed, &["--annotation", "org.criu.config=/run/evil.conf"], &["org.criu.config", "`annotations`"])?;
    // a file is believed no more than a peer
    let folder = bed.shared()?;
    let file = folder.join("t1.ts");
    let path = file.to_str().context("a path")?;
    let run = Run::new(bed, "t1", "probe").options(&["--null-io", "--cap-add", "CAP_SYS_PTRACE"]);
    run.args(&["ts-probe", "sleep"]).start(Node::A)?;
    transship::ok(bed, Node::A, &["checkpoint", "t1", "--output", path])?;
    transship::refused(bed, Node::B, &["restore", path], 5, "CAP_SYS_PTRACE")?;
    trouble::nothing_on(bed, Node::B)?;
    std::fs::remove_file(&file)?;
    container::delete(bed, Node::A, "t1")
}

/// What the policy lists arrives; and an image that comes along takes no name of the node's.
fn allows(bed: &Bed) -> Result<()> {
    for node in Node::ALL {
        bed.sh(node, "mkdir -p /run/node/data && echo here > /run/node/data/f")?;
    }
    let image = "localhost/probe:1";
    bed.ok(Node::B, &["ctr", "images", "rm", "--sync", image])?;
    let policy = "host_mounts = [\"/run/node\"]\n[policy]\ncapabilities = [\"CAP_NET_ADMIN\"]";
    let allowed = Configured::new(bed, Node::B, policy)?;
    container::pod(bed, Node::A, "t1", "10.77.6.3")?;
    let mount = "type=bind,src=/run/node/data,dst=/data,options=rbind:ro";
    let run = Run::new(bed, "t1", "probe").pod("t1");
    let run = run.options(&["--null-io", "--mount", mount, "--cap-add", "CAP_NET_ADMIN"]);
    run.args(&["ts-probe", "sleep"]).start(Node::A)?;
    moves::migrate(bed, "t1", Node::A, Node::B)?;
    let write = container::exec(bed, Node::B, "t1", &["sh", "-c", "cat /data/f && ! echo x > /data/g"])?;
    ensure!(write.status.success() && write.stdout == b"here\n", "{write:?}");
    let names = |node| bed.ok(node, &["ctr", "images", "ls", "-q"]);
    let there = names(Node::B)?;
    let named = there.lines().find(|n| n.starts_with(&format!("{image}@sha256:")));
    ensure!(named.is_some() && !there.lines().any(|n| n == image), "{there}");
    // and back, under the policy of the other node, where the image has its own name
    let back = Configured::new(bed, Node::A, policy)?;
    moves::migrate(bed, "t1", Node::B, Node::A)?;
    let record = bed.ok(Node::A, &["ctr", "c", "info", "t1"])?;
    ensure!(record.contains(&format!("\"Image\": \"{image}\"")), "{record}");
    drop((allowed, back));
    container::delete(bed, Node::A, "t1")?;
    // the other scenarios' image is there as before
    let named = named.context("a name")?;
    bed.ok(Node::B, &["ctr", "images", "tag", named, image])?;
    bed.ok(Node::B, &["ctr", "images", "rm", "--sync", named])?;
    container::unpod(bed, Node::A, "t1")
}
