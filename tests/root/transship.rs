//! The command `transship` in a node, as a script would use it: `--json`, the exit status, and one object as the last line.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bed::{Bed, Node, patient};

/// What a run of it came to.
pub struct Said {
    /// The exit status.
    pub code: i32,
    /// The object.
    pub json: Value,
    /// Everything on stderr.
    pub stderr: String,
}

impl Said {
    /// The error's text; empty without one.
    pub fn error(&self) -> &str {
        self.json["error"]["message"].as_str().unwrap_or_default()
    }
}

/// Runs `transship ARGS --json`, whatever it ends with. Fails unless stdout is exactly one line that is one object, which has the
/// exit status in it.
pub fn attempt(bed: &Bed, node: Node, args: &[&str]) -> Result<Said> {
    let limit = patient(Duration::from_secs(60)).as_secs().to_string();
    attempt_with(bed, node, &["timeout", &limit, "transship"], args)
}

/// The same with another beginning of the command line (`env X=Y transship`).
pub fn attempt_with(bed: &Bed, node: Node, program: &[&str], args: &[&str]) -> Result<Said> {
    let line: Vec<&str> = program.iter().chain(args).copied().chain(["--json"]).collect();
    let output = bed.run(node, &line)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = stdout.lines().last().with_context(|| format!("{line:?} printed nothing\n{stderr}"))?;
    let json: Value = serde_json::from_str(last).with_context(|| format!("{line:?} printed {stdout}"))?;
    ensure!(json.is_object() && stdout.lines().count() == 1, "{line:?} printed {stdout}");
    let code = output.status.code().context("killed")?;
    ensure!(json["exit"] == code && json["ok"] == (code == 0), "{line:?} ended with {code}: {json}");
    Ok(Said { code, json, stderr })
}

/// Runs it; it must succeed.
pub fn ok(bed: &Bed, node: Node, args: &[&str]) -> Result<Value> {
    let said = attempt(bed, node, args)?;
    ensure!(said.code == 0, "transship {args:?}: exit {}: {}{}", said.code, said.json, said.stderr);
    Ok(said.json)
}

/// Runs it; it must end with exit status `code` and say `text`.
pub fn refused(bed: &Bed, node: Node, args: &[&str], code: i32, text: &str) -> Result<()> {
    let said = attempt(bed, node, args)?;
    ensure!(
        said.code == code && said.json.to_string().contains(text),
        "transship {args:?}: wanted exit {code} and {text:?}, got {}: {}",
        said.code,
        said.json
    );
    Ok(())
}
