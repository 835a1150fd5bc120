//! Migrations through `transship migrate`, and redis as the container that is moved.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bed::{Bed, Node, patient, wait_for};
use crate::container::{self, Run};

/// A redis that runs in a pod of its own.
pub struct Redis {
    /// The container, and the pod's network namespace.
    pub id: String,
    /// Its address, wherever it runs.
    pub ip: String,
}

/// Starts a redis at 10.77.x.y and waits until it answers.
pub fn start_redis(bed: &Bed, node: Node, id: &str, ip: &str) -> Result<Redis> {
    container::pod(bed, node, id, ip)?;
    Run::new(bed, id, "redis").pod(id).options(&["--null-io"]).start(node)?;
    wait_for(Duration::from_secs(10), &format!("{id} answers"), || {
        Ok(container::exec(bed, node, id, &["redis-cli", "ping"])?.stdout.starts_with(b"PONG"))
    })?;
    Ok(Redis { id: id.into(), ip: ip.into() })
}

/// Removes it and its pod.
pub fn stop_redis(bed: &Bed, node: Node, redis: &Redis) -> Result<()> {
    container::delete(bed, node, &redis.id)?;
    container::unpod(bed, node, &redis.id)
}

/// What `transship migrate --json` came to.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub code: i32,
    /// The object it printed.
    pub json: Value,
    /// What it said beside.
    pub stderr: String,
}

/// `transship migrate`, whatever it comes to. `options`: further options of it.
pub fn attempt(bed: &Bed, id: &str, from: Node, to: &str, options: &[&str]) -> Result<Outcome> {
    let limit = patient(Duration::from_secs(120)).as_secs().to_string();
    let line = ["timeout", &limit, "transship", "migrate", id, "--to", to, "--json"];
    let output = bed.run(from, &line.iter().chain(options).copied().collect::<Vec<_>>())?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let json = stdout.lines().last().map_or(Ok(Value::Null), serde_json::from_str);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = json.with_context(|| format!("transship migrate said {stdout}{stderr}"))?;
    Ok(Outcome { code: output.status.code().unwrap_or(-1), json, stderr })
}

/// Moves a container, which must succeed; the report. Afterwards it runs there and is not known here.
pub fn migrate(bed: &Bed, id: &str, from: Node, to: Node) -> Result<Value> {
    let outcome = attempt(bed, id, from, to.address(), &[])?;
    ensure!(outcome.code == 0, "migrate {id}: exit {}: {}{}", outcome.code, outcome.json, outcome.stderr);
    let there = container::status(bed, to, id)?;
    ensure!(there.as_deref() == Some("RUNNING"), "{id} on node {}: {there:?}", to.name());
    let here = container::status(bed, from, id)?;
    ensure!(here.is_none(), "{id} still on node {}: {here:?}", from.name());
    Ok(outcome.json["report"].clone())
}
