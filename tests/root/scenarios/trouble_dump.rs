//! CRIU, runc or a tmpfs that fail while the container stands still: it thaws, and the error says why.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::requirements::Needs;
use crate::trouble::{self, Attempt, Configured, Fault, Mounted, Witness, failed, refused};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "fails_io_uring", needs: Needs::Migration, run: io_uring },
    Scenario { name: "fails_old_criu", needs: Needs::Migration, run: old_criu },
    Scenario { name: "fails_no_criu", needs: Needs::Migration, run: no_criu },
    Scenario { name: "fails_runc_restore", needs: Needs::Migration, run: runc_restore },
    Scenario { name: "fails_criu_restore", needs: Needs::Migration, run: criu_restore },
    Scenario { name: "fails_tmpfs_full", needs: Needs::Migration, run: tmpfs_full },
];

const OLD: &str = "/opt/transship/criu-old/bin/criu";

fn io_uring(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "t1", "10.77.6.3")?;
    let probe = Run::new(bed, "t1", "probe").pod("t1").log()?;
    probe.args(&["ts-probe", "io-uring", "--every", "20"]).start(Node::A)?;
    container::wait_log(bed, "t1", "io-uring round=2 ")?;
    let pid = container::pid(bed, Node::A, "t1")?;
    let error = refused(bed, "t1", Node::B.address(), &[], 7, &["io_uring", "CRIU"])?;
    ensure!(error["phase"] == "dump", "{error}");
    trouble::nothing_on(bed, Node::B)?;
    ensure!(container::pid(bed, Node::A, "t1")? == pid, "another process");
    let lines = container::log(bed, "t1")?.lines().count();
    container::wait_log(bed, "t1", &format!("io-uring round={} wrong=0", lines + 3))?;
    container::delete(bed, Node::A, "t1")?;
    container::unpod(bed, Node::A, "t1")
}

fn old_criu(bed: &Bed) -> Result<()> {
    ensure!(std::path::Path::new(OLD).exists(), "no {OLD} (hack/setup)");
    let witness = Witness::start(bed, "w1")?;
    {
        let _old = Configured::new(bed, Node::A, &format!("criu = \"{OLD}\""))?;
        let error = witness.refused(&[], 7, &["CRIU", "3.17"])?;
        ensure!(error["node"].as_str().is_some_and(|n| n.ends_with("-a")), "{error}");
    }
    {
        let _old = Configured::new(bed, Node::B, &format!("criu = \"{OLD}\""))?;
        let error = refused(bed, "w1", Node::B.address(), &[], 5, &["CRIU", "3.17"])?;
        ensure!(error["node"].as_str().is_some_and(|n| n.ends_with("-b")), "{error}");
        witness.untouched()?;
    }
    witness.finish_untouched().map(drop)
}

fn no_criu(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    {
        let _none = Configured::new(bed, Node::A, "criu = \"/nonexistent/criu\"")?;
        refused(bed, "w1", Node::B.address(), &[], 5, &["CRIU", "/nonexistent/criu"])?;
    }
    {
        let _none = Configured::new(bed, Node::B, "criu = \"/nonexistent/criu\"")?;
        witness.refused(&[], 5, &["CRIU", "doctor"])?;
    }
    witness.finish_untouched().map(drop)
}

/// A program in the place of another one on node b: `script`, with `$real` as what was there.
fn wrapped<'a>(bed: &'a Bed, program: &str, script: &str) -> Result<Mounted<'a>> {
    let at = bed.ok(Node::B, &["sh", "-c", &format!("readlink -f $(command -v {program})")])?;
    let at = at.trim();
    bed.sh(Node::B, &format!("mkdir -p /run/node/real && cp {at} /run/node/real/{program}"))?;
    let file = bed.path(Node::B, &format!("/run/node/wrapped-{program}"))?;
    std::fs::write(&file, format!("#!/bin/sh\nreal=/run/node/real/{program}\n{script}\n"))?;
    bed.sh(Node::B, &format!("chmod 755 /run/node/wrapped-{program}"))?;
    Mounted::new(bed, Node::B, &format!("--bind /run/node/wrapped-{program}"), at)
}

fn runc_restore(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    // fails at once, and only at the restore
    let script = r#"for a in "$@"; do [ "$prev" != --log ] || log=$a; [ "$a" != restore ] || restore=1; prev=$a; done
[ -z "$restore" ] || { echo '{"level":"error","msg":"mkdir /sys/fs/cgroup/x: read-only file system","time":"t"}' >> $log; exit 1; }
exec $real "$@""#;
    let _broken = wrapped(bed, "runc", script)?;
    let error = witness.refused(&[], 8, &["runc restore", "read-only file system"])?;
    ensure!(error["node"].as_str().is_some_and(|n| n.ends_with("-b")), "{error}");
    witness.finish_untouched().map(drop)
}

fn criu_restore(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    // the images arrive whole, but what they need of the node is not there: CRIU fails in the middle of the restore
    let fault = Fault::at(bed, Node::B, "restoring")?;
    let attempt = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    bed.sh(Node::B, "truncate -s 10 /run/transship/images/*/core-*.img")?;
    drop(fault);
    let error = failed(&attempt.finish()?, 8, &["CRIU"])?;
    ensure!(error["node"].as_str().is_some_and(|n| n.ends_with("-b")), "{error}");
    witness.untouched()?;
    let report = witness.finish_untouched()?;
    ensure!(
        report["longest_gap_ms"].as_f64().is_some_and(|ms| ms < 4000.0),
        "it stood still too long: {report}"
    );
    Ok(())
}

fn tmpfs_full(bed: &Bed) -> Result<()> {
    let witness = Witness::with_data(bed, "w1", 16)?;
    bed.sh(Node::B, "mkdir -p /run/transship/images")?;
    let _small = Mounted::new(bed, Node::B, "-t tmpfs -o size=200m tmpfs", "/run/transship/images")?;
    let fault = Fault::at(bed, Node::B, "receive")?;
    let attempt = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    // after the preflight found room
    bed.sh(Node::B, "head -c 190M /dev/zero > /run/transship/images/somebody-elses")?;
    drop(fault);
    let error = failed(&attempt.finish()?, 1, &["No space left on device"])?;
    ensure!(error["node"].as_str().is_some_and(|n| n.ends_with("-b")), "{error}");
    bed.sh(Node::B, "rm /run/transship/images/somebody-elses")?;
    witness.finish_untouched().map(drop)
}
