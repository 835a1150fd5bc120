//! Moves of other kinds: two at once, and of a container that does not run.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container;
use crate::moves;
use crate::requirements::Needs;
use crate::traffic;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "move_two_that_cross", needs: Needs::Migration, run: two_that_cross },
    Scenario { name: "move_a_stopped_one_cold", needs: Needs::Migration, run: stopped_cold },
];

fn two_that_cross(bed: &Bed) -> Result<()> {
    let homes = [("m1", Node::A, "10.77.7.1"), ("m2", Node::B, "10.77.7.2")];
    for (id, node, ip) in homes {
        container::pod(bed, node, id, ip)?;
        let pod = ["--with-ns", &format!("network:/run/netns/{id}")];
        traffic::start(bed, node, id, &pod, &["ts-probe", "memory", "16", "--every", "10"])?;
        traffic::wait_inside(bed, id, "memory round=2 wrong=0")?;
    }
    for back in [false, true] {
        std::thread::scope(|scope| {
            let both = homes.map(|(id, home, _)| {
                let from = if back { home.other() } else { home };
                scope.spawn(move || moves::migrate(bed, id, from, from.other()))
            });
            both.into_iter().try_for_each(|moved| match moved.join() {
                Ok(moved) => moved.map(drop),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
    }
    for (id, node, _) in homes {
        ensure!(container::status(bed, node, id)?.as_deref() == Some("RUNNING"), "{id}");
        traffic::expect_right(&traffic::inside(bed, id)?)?;
        container::delete(bed, node, id)?;
        container::unpod(bed, node, id)?;
    }
    Ok(())
}

fn stopped_cold(bed: &Bed) -> Result<()> {
    let script = "case $(cat /state 2> /dev/null) in '') echo first > /state ;; *) echo second time ;; esac; rm -f /etc/group";
    traffic::start(bed, Node::A, "m1", &[], &["sh", "-c", script])?;
    container::wait_status(bed, Node::A, "m1", "STOPPED")?;
    let refused = moves::attempt(bed, "m1", Node::A, Node::B.address(), &[])?;
    let said = format!("{}{}", refused.json, refused.stderr);
    ensure!(refused.code != 0 && said.contains("--cold"), "exit {}: {said}", refused.code);
    let outcome = moves::attempt(bed, "m1", Node::A, Node::B.address(), &["--cold"])?;
    ensure!(outcome.code == 0, "{}{}", outcome.json, outcome.stderr);
    let here = bed.ok(Node::A, &["ctr", "container", "ls", "-q"])?;
    ensure!(here.trim().is_empty(), "still on the source: {here}");
    ensure!(container::status(bed, Node::B, "m1")?.is_none(), "cold is not running");
    let started = bed.ok(Node::B, &["ctr", "task", "start", "m1"])?;
    ensure!(started == "second time\n", "the writable layer did not come: {started:?}");
    bed.run(Node::B, &["ctr", "task", "rm", "m1"])?;
    container::delete(bed, Node::B, "m1")
}
