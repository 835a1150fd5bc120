//! What a container that moves has written: on the node where it started into the log that the test asked for, on every
//! node that it has come to since into the agent's log for it (`stdio = "log"`, its default).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, Node, wait_for};
use crate::container;

/// Where the agent of a node puts the output of a container that came to it.
pub fn arrived_path(bed: &Bed, node: Node, id: &str) -> Result<PathBuf> {
    bed.path(node, &format!("/var/log/transship/default/{id}.log"))
}

/// What it has written on this node since it came there; nothing if it never did.
pub fn arrived(bed: &Bed, node: Node, id: &str) -> Result<String> {
    match std::fs::read(arrived_path(bed, node, id)?) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e).context("the log of an arrived container"),
    }
}

/// Waits until the log of an arrived container holds `text`.
pub fn wait_arrived(bed: &Bed, node: Node, id: &str, text: &str) -> Result<()> {
    let what = format!("{text:?} in the log of {id} on node {}", node.name());
    wait_for(Duration::from_secs(10), &what, || Ok(arrived(bed, node, id)?.contains(text)))
}

/// Forgets what containers of this name have written on either node.
pub fn forget(bed: &Bed, id: &str) -> Result<()> {
    for path in
        [container::log_path(bed, id)?, arrived_path(bed, Node::A, id)?, arrived_path(bed, Node::B, id)?]
    {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Waits until `ts-probe flood` has filled some of its log. How much, not with what: as both streams are mixed in any way, there is no line that is
/// sure to be whole.
pub fn wait_flood(bed: &Bed, id: &str) -> Result<()> {
    wait_for(Duration::from_secs(10), &format!("output in the log of {id}"), || {
        Ok(std::fs::metadata(container::log_path(bed, id)?).is_ok_and(|log| log.len() > 50_000))
    })
}

/// What `ts-probe flood` wrote, both streams mixed in any way: fails unless each of them is 1, 2, 3 ... with nothing missing,
/// twice or torn, and both equally long; the last number.
pub fn flood(text: &str) -> Result<u64> {
    let (digits, letters): (String, String) = text.chars().partition(|c| c.is_ascii_digit() || *c == '\n');
    let out = counts(&digits, '\n').context("stdout")?;
    let digit = |c| if c == ';' { c } else { char::from((c as u8).wrapping_sub(b'a' - b'0')) };
    let err = counts(&letters.chars().map(digit).collect::<String>(), ';').context("stderr")?;
    ensure!(out == err, "stdout ends with {out}, stderr with {err}");
    Ok(out)
}

/// Fails unless the numbers, each followed by `end`, are 1, 2, 3 ...; the last one.
pub fn counts(text: &str, end: char) -> Result<u64> {
    let mut last = 0;
    for number in text.split_terminator(end) {
        ensure!(number.parse() == Ok(last + 1), "after {last} comes {number:?}");
        last += 1;
    }
    ensure!(text.is_empty() || text.ends_with(end), "the last number is torn");
    Ok(last)
}

/// Fails unless `text` has rounds of a ts-probe workload, all of them with `wrong=0`; how many.
pub fn all_right(text: &str, workload: &str) -> Result<usize> {
    let start = format!("{workload} round=");
    let rounds: Vec<&str> = text.lines().filter(|l| l.starts_with(&start)).collect();
    ensure!(!rounds.is_empty(), "no round of {workload} in\n{text}");
    match rounds.iter().find(|l| !l.split(' ').any(|w| w == "wrong=0")) {
        Some(bad) => anyhow::bail!("{bad}"),
        None => Ok(rounds.len()),
    }
}

/// Waits until an arrived container has said `more` rounds of each of these workloads since `before` bytes of its log.
pub fn wait_rounds(bed: &Bed, node: Node, id: &str, before: usize, workloads: &[&str]) -> Result<()> {
    for workload in workloads {
        let start = format!("{workload} round=");
        let what = format!("two rounds of {workload} on node {}", node.name());
        wait_for(Duration::from_secs(10), &what, || {
            let text = arrived(bed, node, id)?;
            let new = text.get(before..).unwrap_or_default();
            Ok(new.lines().filter(|l| l.starts_with(&start)).count() >= 2)
        })?;
    }
    Ok(())
}
