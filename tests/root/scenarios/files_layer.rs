//! The writable layer of a running container: random changes to what the image has and to what it has not, compared entry by
//! entry after each move, as overlayfs keeps them on disk and as the container sees them. A failure names its seed: again with
//! TRANSSHIP_SEED=N TRANSSHIP_CASES=1.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use transship::rootfs::testing::{Random, Tree};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::manifest::{Manifest, View};
use crate::moves;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "files_of_a_layer", needs: Needs::Migration, run: files_of_a_layer }];

/// What must have occurred in some upper directory, for the comparison to mean anything: parts of a manifest's line.
const KINDS: [&str; 16] = [
    "cwhiteout ",
    "trusted.overlay.opaque=y",
    "file ",
    " sparse",
    "symlink ",
    "fifo ",
    "socket ",
    "char ",
    "block ",
    " links=",
    "user.note=",
    "trusted.note=",
    "security.capability=",
    "system.posix_acl_access=",
    "owner=3000000000:",
    "mtime=-1000000000.",
];

fn files_of_a_layer(bed: &Bed) -> Result<()> {
    let id = "fy1";
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(Ok(default), |v| v.parse().with_context(|| format!("{name}={v}")))
    };
    let (first, cases) = (number("TRANSSHIP_SEED", 1)?, number("TRANSSHIP_CASES", 4)?);
    Run::new(bed, id, "redis").options(&["--null-io"]).start(Node::A)?;
    // CRIU works in /tmp: its times must be the container's nevertheless
    std::fs::write(container::rootfs(bed, Node::A, id)?.join("tmp/note"), "here")?;
    let (mut at, mut seen, mut entries) = (Node::A, [0; KINDS.len()], 0);
    for seed in first..first + cases {
        let context = || format!("again with TRANSSHIP_SEED={seed} TRANSSHIP_CASES=1");
        let root = container::rootfs(bed, at, id)?;
        let mut rng = Random::new(seed);
        // what the image has (nested directories, files that the server does not need), and what it has not
        for (dir, changes) in [("usr/share", 50), ("data", 40)] {
            Tree::new(&root.join(dir), &mut rng).change(&mut rng, changes).with_context(context)?;
        }
        let merged = Manifest::of(&root, View::Merged)?;
        let upper = Manifest::of(&upper(bed, at, id)?, View::Upper)?;
        for (kind, seen) in KINDS.iter().zip(&mut seen) {
            *seen += upper.count(kind);
        }
        entries += upper.len();
        moves::migrate(bed, id, at, at.other()).with_context(context)?;
        at = at.other();
        let there = Manifest::of(&self::upper(bed, at, id)?, View::Upper)?;
        same("the upper directories", &upper, &there).with_context(context)?;
        let there = Manifest::of(&container::rootfs(bed, at, id)?, View::Merged)?;
        same("the merged views", &merged, &there).with_context(context)?;
    }
    let missing: Vec<_> =
        KINDS.iter().zip(seen).filter(|(_, seen)| *seen == 0).map(|(kind, _)| kind).collect();
    ensure!(missing.is_empty() || cases < 4, "never made: {missing:?}");
    println!("{cases} moves, {entries} entries: {:?}", KINDS.iter().zip(seen).collect::<Vec<_>>());
    container::delete(bed, at, id)
}

/// The upper directory of a container, as this process reaches it.
fn upper(bed: &Bed, node: Node, id: &str) -> Result<PathBuf> {
    let mounts = bed.ok(node, &["ctr", "snapshot", "mounts", "/nowhere", id])?;
    let upper = mounts.split([' ', ',', '\n']).find_map(|o| o.strip_prefix("upperdir="));
    bed.path(node, upper.with_context(|| format!("no upperdir in {mounts}"))?)
}

fn same(what: &str, before: &Manifest, after: &Manifest) -> Result<()> {
    let found = before.differences(after);
    let shown = found.iter().take(8).map(|d| format!("\n  {d}")).collect::<String>();
    ensure!(found.is_empty(), "{what} differ in {} entries:{shown}", found.len());
    Ok(())
}
