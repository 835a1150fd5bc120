//! The image moves along: what the destination lacks comes from the source's content store.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::Configured;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "move_brings_the_image", needs: Needs::Migration, run: brings_the_image }];

const IMAGE: &str = "localhost/probe:1";

/// The name says localhost, where no registry is: had anything asked for one, it would have failed.
fn brings_the_image(bed: &Bed) -> Result<()> {
    bed.ok(Node::B, &["ctr", "images", "rm", "--sync", IMAGE])?;
    let digests = |node| {
        bed.ok(node, &["ctr", "content", "ls", "-q"]).map(|t| t.lines().map(String::from).collect::<Vec<_>>())
    };
    let (all, before) = (digests(Node::A)?, digests(Node::B)?);
    ensure!(before.len() + 3 <= all.len(), "node b still has the blobs: {before:?}");
    let listed = |node| bed.ok(node, &["ctr", "images", "ls", &format!("name=={IMAGE}")]);
    // without that it would have the digest behind its name
    let _allowed = Configured::new(bed, Node::B, "[policy]\nimage_names = [\"localhost/*\"]")?;
    Run::new(bed, "m1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let report = moves::migrate(bed, "m1", Node::A, Node::B)?;
    ensure!(report["blob_bytes"].as_u64().is_some_and(|n| n > 1_000_000), "{report}");
    ensure!(listed(Node::B)? == listed(Node::A)?, "{}", listed(Node::B)?);
    let check = |node| bed.ok(node, &["ctr", "images", "check", &format!("name=={IMAGE}")]);
    let there = check(Node::B)?;
    ensure!(there == check(Node::A)? && there.contains("complete"), "{there}");
    let output = Run::new(bed, "m2", "probe").args(&["echo", "from it"]).foreground(Node::B)?;
    ensure!(output.stdout == b"from it\n", "{output:?}");
    container::delete(bed, Node::B, "m1")?;
    // the image stays, without the container that brought it
    let output = Run::new(bed, "m2", "probe").args(&["echo", "again"]).foreground(Node::B)?;
    ensure!(output.stdout == b"again\n", "{output:?}");
    Ok(())
}
