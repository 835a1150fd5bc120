//! Containers with someone attached: input that was not read yet, a terminal, FIFOs on the destination.

use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::stdio_moves::{end, forget_ctrs_fifos, wait_more};
use crate::Scenario;
use crate::bed::{Bed, Node, ended, wait_for};
use crate::container::{self, Run};
use crate::moves;
use crate::output;
use crate::requirements::{Needs, runtime};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "stdio_input_not_read_yet", needs: Needs::Migration, run: stdio_input_not_read_yet },
    Scenario { name: "stdio_input_that_ended", needs: Needs::Migration, run: stdio_input_that_ended },
    Scenario { name: "stdio_terminal", needs: Needs::Migration, run: stdio_terminal },
    Scenario { name: "stdio_fifos_and_attach", needs: Needs::Migration, run: stdio_fifos_and_attach },
];

/// Runs a shell line in a node, in the background; it ends with the container.
fn background(bed: &Bed, node: Node, line: &str) -> Result<Child> {
    let mut command = bed.command(node, &["bash", "-c", line]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context(line.to_owned())
}

/// A container that reads nothing until it is told, its input fed by `feed`; moved while that waits. What it then says.
fn moved_with_input(bed: &Bed, id: &str, feed: &str, settle: Duration, last: &str) -> Result<String> {
    output::forget(bed, id)?;
    let out = container::log_path(bed, id)?;
    let run = format!(
        "({feed}) | ctr run --runtime {} localhost/probe:1 {id} ts-probe patient > {}",
        runtime(),
        out.display()
    );
    let mut client = background(bed, Node::A, &run)?;
    container::wait_log(bed, id, "ready\n")?;
    // ctr hands on what it is given, and its end, within milliseconds; nothing tells when
    std::thread::sleep(settle);
    moves::migrate(bed, id, Node::A, Node::B)?;
    ensure!(container::log(bed, id)? == "ready\n", "it read before it was told to");
    bed.ok(Node::B, &["ctr", "task", "kill", "--signal", "USR1", id])?;
    output::wait_arrived(bed, Node::B, id, last)?;
    ended(&mut client, "ctr run")?;
    forget_ctrs_fifos(bed)?;
    output::arrived(bed, Node::B, id)
}

fn stdio_input_not_read_yet(bed: &Bed) -> Result<()> {
    let id = "si1";
    // more than the process's pipe holds: the rest waits in the shim and in the FIFO
    let text = moved_with_input(bed, id, "seq 1 20000; sleep 3", Duration::from_millis(300), "in 20000\n")?;
    let lines: Vec<&str> = text.lines().collect();
    let wanted: Vec<String> =
        std::iter::once("reading".into()).chain((1..=20_000).map(|n| format!("in {n}"))).collect();
    ensure!(lines == wanted, "{} lines, the last {:?}", lines.len(), lines.last());
    // and it goes on on this side
    bed.sh(Node::B, "for f in /run/transship/fifo/*/stdin; do echo later > $f; done")?;
    output::wait_arrived(bed, Node::B, id, "in 20000\nin later\n")?;
    // it waits for more input and does not hear a TERM
    container::delete(bed, Node::B, id)
}

fn stdio_input_that_ended(bed: &Bed) -> Result<()> {
    let id = "se1";
    // a client that reads the end before it knows the task would not tell it: not at once
    let feed = "printf 'one\\ntwo\\n'; sleep 0.5";
    let text = moved_with_input(bed, id, feed, Duration::from_millis(900), "in-closed\n")?;
    ensure!(text == "reading\nin one\nin two\nin-closed\n", "{text:?}");
    end(bed, Node::B, id)
}

fn stdio_terminal(bed: &Bed) -> Result<()> {
    let id = "st1";
    output::forget(bed, id)?;
    let shown = container::log_path(bed, id)?;
    let run = format!(
        "script -qec 'stty rows 33 cols 77; exec ctr run --tty --runtime {} localhost/probe:1 {id} ts-probe flood' {}",
        runtime(),
        shown.display()
    );
    // its input stays open, and from out here: a shell's `< <(...)` would be a child of script, and util-linux's script (2.38) turns in circles
    // for good once a child ends that is not the one it started
    let mut client = bed.command(Node::A, &["bash", "-c", &run]);
    let mut client = client.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    output::wait_flood(bed, id)?;
    moves::migrate(bed, id, Node::A, Node::B)?;
    wait_more(bed, Node::B, id)?;
    let size = container::exec(bed, Node::B, id, &["stty", "-F", "/dev/pts/0", "size"])?;
    ensure!(size.stdout == b"33 77\n", "the window's size: {size:?}");
    end(bed, Node::B, id)?;
    ended(&mut client, "script and ctr run --tty")?;
    forget_ctrs_fifos(bed)?;
    // script's own first and last line, and ctr's that there is no container any more
    let text = container::log(bed, id)?;
    let (_, text) = text.split_once('\n').context("nothing was shown")?;
    let text = text.split("ctr: ").next().unwrap_or_default();
    let text = text.split("\nScript done").next().unwrap_or_default();
    output::flood(&(text.to_owned() + &output::arrived(bed, Node::B, id)?).replace('\r', "")).map(drop)
}

/// The destination's agent makes FIFOs instead of a log; `ctr task attach` reads them.
fn stdio_fifos_and_attach(bed: &Bed) -> Result<()> {
    let id = "sa1";
    output::forget(bed, id)?;
    Run::new(bed, id, "probe").log()?.args(&["ts-probe", "flood"]).start(Node::A)?;
    output::wait_flood(bed, id)?;
    bed.stop_agent(Node::B)?;
    let agent = "(cat /etc/transship/agent.toml; echo 'stdio = \"fifo\"') > /run/fifo.toml; \
                 rm -f /run/transship/agent.sock; echo $$ > /run/fifo.pid; \
                 exec transship agent --config /run/fifo.toml";
    let mut agent = background(bed, Node::B, agent)?;
    let moved = wait_for(Duration::from_secs(10), "the agent", || {
        Ok(bed.path(Node::B, "/run/transship/agent.sock")?.exists())
    })
    .and_then(|()| moves::migrate(bed, id, Node::A, Node::B));
    bed.sh(Node::B, "kill $(cat /run/fifo.pid)")?;
    ended(&mut agent, "the agent with FIFOs")?;
    bed.start_agent(Node::B)?;
    moved?;
    let taken = bed.shared()?.join("sa1.taken");
    let attach = format!("exec ctr task attach {id} > {0} 2>&1", taken.display());
    let mut reader = background(bed, Node::B, &attach)?;
    wait_for(Duration::from_secs(10), "output through FIFOs", || {
        Ok(std::fs::metadata(&taken).is_ok_and(|m| m.len() > 50_000))
    })?;
    bed.ok(Node::B, &["ctr", "task", "kill", "--signal", "TERM", id])?;
    ended(&mut reader, "ctr task attach")?;
    container::delete(bed, Node::B, id)?;
    output::flood(&(container::log(bed, id)? + &std::fs::read_to_string(&taken)?)).map(drop)
}
