//! `transship ps`: what runs under transship on a node, and the exit statuses of the command line.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::transship;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cli_ps_states", needs: Needs::Migration, run: states },
    Scenario { name: "cli_ps_namespaces", needs: Needs::Migration, run: namespaces },
    Scenario { name: "cli_without_an_agent", needs: Needs::Migration, run: without_an_agent },
    Scenario { name: "cli_plain_progress", needs: Needs::Migration, run: plain_progress },
];

/// The entry of a container.
fn entry(bed: &Bed, node: Node, id: &str) -> Result<Value> {
    let json = transship::ok(bed, node, &["ps"])?;
    let list = json["containers"].as_array().context("containers")?;
    list.iter().find(|c| c["container"] == id).cloned().with_context(|| format!("no {id} in {json}"))
}

fn sleeper(bed: &Bed, id: &str) -> Result<()> {
    Run::new(bed, id, "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)
}

fn states(bed: &Bed) -> Result<()> {
    sleeper(bed, "t1")?;
    let running = entry(bed, Node::A, "t1")?;
    let pid = container::pid(bed, Node::A, "t1")?;
    ensure!(
        running["state"] == "running" && running["pid"] == pid && running["image"] == "localhost/probe:1",
        "{running}"
    );
    bed.ok(Node::A, &["ctr", "task", "pause", "t1"])?;
    ensure!(entry(bed, Node::A, "t1")?["state"] == "paused");
    bed.ok(Node::A, &["ctr", "task", "resume", "t1"])?;
    bed.ok(Node::A, &["ctr", "task", "kill", "--signal", "KILL", "t1"])?;
    container::wait_status(bed, Node::A, "t1", "STOPPED")?;
    ensure!(entry(bed, Node::A, "t1")?["state"] == "stopped");
    container::delete(bed, Node::A, "t1")?;
    ensure!(transship::ok(bed, Node::A, &["ps"])?["containers"] == serde_json::json!([]));
    // one that came from the other node says so
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.6.1")?;
    moves::migrate(bed, "r1", Node::A, Node::B)?;
    let moved = entry(bed, Node::B, "r1")?;
    ensure!(
        moved["state"] == "running" && moved["from"].as_str().is_some_and(|f| f.contains("-a")),
        "{moved}"
    );
    let table = bed.ok(Node::B, &["transship", "ps"])?;
    ensure!(
        table.starts_with("NAMESPACE") && table.lines().any(|l| l.contains("r1") && l.contains("running")),
        "{table}"
    );
    moves::stop_redis(bed, Node::B, &redis)
}

fn namespaces(bed: &Bed) -> Result<()> {
    sleeper(bed, "t1")?;
    let other = "ctr images export /run/probe.tar localhost/probe:1; ctr -n other images import /run/probe.tar; rm /run/probe.tar
        ctr -n other run -d --null-io --runtime io.containerd.transship.v2 localhost/probe:1 t1 ts-probe sleep";
    bed.sh(Node::A, other)?;
    // not under transship: not listed
    bed.ok(
        Node::A,
        &[
            "ctr",
            "run",
            "-d",
            "--null-io",
            "--runtime",
            "io.containerd.runc.v2",
            "localhost/probe:1",
            "t9",
            "ts-probe",
            "sleep",
        ],
    )?;
    let names = |json: &Value| -> Vec<String> {
        let list = json["containers"].as_array().cloned().unwrap_or_default();
        list.iter()
            .map(|c| {
                format!("{}/{}", c["namespace"].as_str().unwrap_or(""), c["container"].as_str().unwrap_or(""))
            })
            .collect()
    };
    let all = names(&transship::ok(bed, Node::A, &["ps"])?);
    let one = names(&transship::ok(bed, Node::A, &["ps", "--namespace", "other"])?);
    let none = names(&transship::ok(bed, Node::A, &["ps", "-n", "nothing"])?);
    bed.sh(Node::A, "ctr -n other task rm --force t1 || true; ctr -n other c rm t1; ctr -n other images rm --sync localhost/probe:1; ctr namespaces rm other || true")?;
    container::delete(bed, Node::A, "t9")?;
    container::delete(bed, Node::A, "t1")?;
    ensure!(
        all == ["default/t1", "other/t1"] && one == ["other/t1"] && none.is_empty(),
        "{all:?} {one:?} {none:?}"
    );
    Ok(())
}

fn without_an_agent(bed: &Bed) -> Result<()> {
    bed.stop_agent(Node::A)?;
    let outcome = ["ps", "version"].map(|verb| transship::attempt(bed, Node::A, &[verb]));
    let checkpoint =
        transship::refused(bed, Node::A, &["checkpoint", "x", "-o", "/run/x"], 10, "transship agent");
    bed.start_agent(Node::A)?;
    checkpoint?;
    let [ps, _] = outcome;
    let ps = ps?;
    ensure!(ps.code == 10, "{}", ps.json);
    for wrong in
        [&["ps", "--nonsense"][..], &["nonsense"], &["migrate", "x"], &["checkpoint", "x"], &["restore"]]
    {
        let line: Vec<&str> = ["transship"].iter().chain(wrong).copied().collect();
        let output = bed.run(Node::A, &line)?;
        ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{wrong:?}: {output:?}");
    }
    Ok(())
}

fn plain_progress(bed: &Bed) -> Result<()> {
    sleeper(bed, "t1")?;
    let path = bed.shared()?.join("p.ckpt");
    let path = path.to_str().context("path")?;
    for (line, terminal) in [
        (format!("transship checkpoint t1 -o {path}"), false),
        (format!("transship checkpoint t1 -o {path}"), true),
    ] {
        let _ = std::fs::remove_file(path);
        let output = if terminal {
            bed.run(Node::A, &["env", "TERM=xterm", "script", "-qec", &line, "/dev/null"])?
        } else {
            bed.run(Node::A, &["bash", "-c", &line])?
        };
        let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        let text = String::from_utf8_lossy(&all);
        ensure!(output.status.success() && text.contains("runs on"), "{text}");
        if !terminal {
            ensure!(!text.contains(['\u{1b}', '\r']), "control characters without a terminal: {text:?}");
        }
    }
    container::delete(bed, Node::A, "t1")
}
