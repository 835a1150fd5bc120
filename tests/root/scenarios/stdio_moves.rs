//! The output and input of a container that moves: each line arrives once, in order, where the container then runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, ended, wait_for};
use crate::container::{self, Run};
use crate::moves;
use crate::output;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "stdio_file", needs: Needs::Migration, run: stdio_file },
    Scenario { name: "stdio_logger", needs: Needs::Migration, run: stdio_logger },
    Scenario { name: "stdio_null", needs: Needs::Migration, run: stdio_null },
    Scenario { name: "stdio_stuck_reader", needs: Needs::Migration, run: stdio_stuck_reader },
    Scenario { name: "stdio_after_a_failed_move", needs: Needs::Migration, run: stdio_after_a_failed_move },
];

/// A writer that never waits.
const FLOOD: &[&str] = &["ts-probe", "flood"];

/// Lets the writer end after a whole pair of lines, and waits until its last output has arrived and it is deleted.
pub fn end(bed: &Bed, node: Node, id: &str) -> Result<()> {
    bed.ok(node, &["ctr", "task", "kill", "--signal", "TERM", id])?;
    container::wait_status(bed, node, id, "STOPPED")?;
    container::delete(bed, node, id)
}

/// ctr removes its FIFOs with the task; it finds none after a move. Call it when ctr has ended.
pub fn forget_ctrs_fifos(bed: &Bed) -> Result<()> {
    bed.sh(Node::A, "rm -rf /run/containerd/fifo/*").map(drop)
}

/// Waits until the log there has grown by some lines.
pub fn wait_more(bed: &Bed, node: Node, id: &str) -> Result<()> {
    let before = output::arrived(bed, node, id)?.len();
    wait_for(Duration::from_secs(10), &format!("output on node {}", node.name()), || {
        Ok(output::arrived(bed, node, id)?.len() > before + 10_000)
    })
}

fn stdio_file(bed: &Bed) -> Result<()> {
    let id = "sf1";
    output::forget(bed, id)?;
    Run::new(bed, id, "probe").log()?.args(FLOOD).start(Node::A)?;
    output::wait_flood(bed, id)?;
    moves::migrate(bed, id, Node::A, Node::B)?;
    let first = container::log(bed, id)?;
    wait_more(bed, Node::B, id)?;
    ensure!(container::log(bed, id)? == first, "the source's log was written to after the move");
    moves::migrate(bed, id, Node::B, Node::A)?;
    let second = output::arrived(bed, Node::B, id)?;
    wait_more(bed, Node::A, id)?;
    moves::migrate(bed, id, Node::A, Node::B)?;
    wait_more(bed, Node::B, id)?;
    end(bed, Node::B, id)?;
    let (third, all) = (output::arrived(bed, Node::A, id)?, output::arrived(bed, Node::B, id)?);
    let fourth = all.strip_prefix(&second).context("the log of the first visit was changed")?;
    output::flood(&(first + &second + &third + fourth)).map(drop)
}

/// `binary://`: a program that gets both streams as descriptors 3 and 4 and says that it is ready by closing 5.
fn stdio_logger(bed: &Bed) -> Result<()> {
    let id = "sl1";
    output::forget(bed, id)?;
    let shared = bed.shared()?;
    let (program, out, err) = (shared.join("logger"), shared.join("sl1.out"), shared.join("sl1.err"));
    let script = format!(
        "#!/bin/bash\ncat <&3 >> {} 5>&- & cat <&4 >> {} 5>&- & exec 5>&-; wait\n",
        out.display(),
        err.display()
    );
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    for file in [&out, &err] {
        let _ = std::fs::remove_file(file);
    }
    let uri = format!("binary://{}", program.display());
    Run::new(bed, id, "probe").options(&["--log-uri", &uri]).args(FLOOD).start(Node::A)?;
    let read = || anyhow::Ok([std::fs::read_to_string(&out)?, std::fs::read_to_string(&err)?]);
    wait_for(Duration::from_secs(10), "the logger's files", || {
        Ok(read().is_ok_and(|all| all.iter().all(|t| t.len() > 50_000)))
    })?;
    moves::migrate(bed, id, Node::A, Node::B)?;
    wait_more(bed, Node::B, id)?;
    end(bed, Node::B, id)?;
    output::flood(&(read()?.concat() + &output::arrived(bed, Node::B, id)?)).map(drop)
}

fn stdio_null(bed: &Bed) -> Result<()> {
    let id = "sn1";
    output::forget(bed, id)?;
    Run::new(bed, id, "probe").options(&["--null-io"]).args(FLOOD).start(Node::A)?;
    for (from, to) in [(Node::A, Node::B), (Node::B, Node::A)] {
        moves::migrate(bed, id, from, to)?;
        for fd in ["0", "1", "2"] {
            let link = container::exec(bed, to, id, &["readlink", &format!("/proc/1/fd/{fd}")])?;
            ensure!(link.stdout == b"/dev/null\n", "descriptor {fd}: {link:?}");
        }
        ensure!(output::arrived(bed, to, id)?.is_empty(), "a log of a container without streams");
    }
    end(bed, Node::A, id)
}

/// Nobody reads the FIFOs at the source: the writer stands still, the move does not, and what was written travels.
fn stdio_stuck_reader(bed: &Bed) -> Result<()> {
    let id = "ss1";
    output::forget(bed, id)?;
    let taken = bed.shared()?.join("ss1.taken");
    // the reader that ctr is stops for good once the container runs
    let run = format!(
        "ctr run --runtime {} localhost/probe:1 {id} ts-probe flood > {} 2>&1 & echo $!; exec > /dev/null 2>&1; wait",
        crate::requirements::runtime(),
        taken.display()
    );
    let mut reader =
        bed.command(Node::A, &["bash", "-c", &run]).stdout(std::process::Stdio::piped()).spawn()?;
    let mut pid = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(reader.stdout.take().context("stdout")?),
        &mut pid,
    )?;
    wait_for(Duration::from_secs(10), "output through a FIFO", || {
        Ok(std::fs::metadata(&taken).is_ok_and(|m| m.len() > 100_000))
    })?;
    bed.ok(Node::A, &["kill", "-STOP", pid.trim()])?;
    let first = loop {
        // full pipes on the way: the writer stands still
        let text = std::fs::read_to_string(&taken)?;
        std::thread::sleep(Duration::from_millis(100));
        if std::fs::metadata(&taken)?.len() == text.len() as u64 {
            break text;
        }
    };
    let report = moves::migrate(bed, id, Node::A, Node::B)?;
    ensure!(report["freeze_ms"].as_f64().is_some_and(|ms| ms < 3000.0), "{report}");
    wait_more(bed, Node::B, id)?;
    bed.ok(Node::A, &["kill", "-CONT", pid.trim()])?;
    ended(&mut reader, "ctr run")?;
    forget_ctrs_fifos(bed)?;
    end(bed, Node::B, id)?;
    // what was in the FIFOs is the source's: its reader gets it when it goes on
    let mut first_all = std::fs::read_to_string(&taken)?;
    ensure!(first_all.starts_with(&first), "the reader's file was changed");
    // ctr finds no container to remove any more, and says so behind the output
    first_all.truncate(first_all.find("ctr: ").unwrap_or(first_all.len()));
    output::flood(&(first_all + &output::arrived(bed, Node::B, id)?)).map(drop)
}

/// A runc that cannot restore, in place of the node's.
const BREAK_RUNC: &str = r#"
    at=$(command -v runc)
    cp "$at" /run/runc-whole
    printf '#!/bin/bash\ncase " $* " in *" restore "*) sleep 0.2; exit 1 ;; esac\nexec /run/runc-whole "$@"\n' > /run/runc-broken
    chmod 755 /run/runc-broken
    mount --bind /run/runc-broken "$at""#;

/// The destination fails late (it cannot restore), the source goes on: nothing lost, nothing twice.
fn stdio_after_a_failed_move(bed: &Bed) -> Result<()> {
    let id = "sr1";
    output::forget(bed, id)?;
    Run::new(bed, id, "probe").log()?.args(FLOOD).start(Node::A)?;
    output::wait_flood(bed, id)?;
    bed.sh(Node::B, BREAK_RUNC)?;
    let outcome = moves::attempt(bed, id, Node::A, Node::B.address(), &[]);
    let lines = container::log(bed, id)?.len();
    bed.sh(Node::B, "umount \"$(command -v runc)\"")?;
    let outcome = outcome?;
    ensure!(outcome.code != 0, "it moved: {}", outcome.json);
    wait_for(Duration::from_secs(10), "output after the failure", || {
        Ok(container::log(bed, id)?.len() > lines + 10_000)
    })?;
    ensure!(output::arrived(bed, Node::B, id)?.is_empty(), "output at a destination that failed");
    moves::migrate(bed, id, Node::A, Node::B)?;
    wait_more(bed, Node::B, id)?;
    end(bed, Node::B, id)?;
    output::flood(&(container::log(bed, id)? + &output::arrived(bed, Node::B, id)?)).map(drop)
}
