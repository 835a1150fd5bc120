//! The redis client outside of the nodes (tests/tools, ts-client): one connection, every reply checked.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bed::{Bed, patient, wait_for};

/// A client that is running; stopped when dropped.
pub struct Client {
    child: Child,
    events: PathBuf,
}

impl Client {
    /// Connects to `ip` and runs until [`Client::finish`]; returns once the first reply is there. `options`: ts-client's.
    pub fn start(bed: &Bed, ip: &str, options: &[&str]) -> Result<Client> {
        let events = bed.shared()?.join(format!("client-{ip}.jsonl"));
        let _ = std::fs::remove_file(&events);
        let path = events.to_str().context("path")?;
        let address = format!("{ip}:6379");
        let line = ["client", "ts-client", &address, "--progress", path];
        let child =
            bed.nodes(line.iter().chain(options)).stdout(Stdio::piped()).spawn().context("ts-client")?;
        let mut client = Client { child, events };
        wait_for(Duration::from_secs(60), "the client's first reply", || {
            if let Some(status) = client.child.try_wait()? {
                bail!("ts-client ended: {status}");
            }
            Ok(client.events()?.iter().any(|e| e["event"] == "running"))
        })?;
        Ok(client)
    }

    /// What it has told so far: connected, filled, running, tick, gap.
    pub fn events(&self) -> Result<Vec<Value>> {
        let text = std::fs::read_to_string(&self.events).unwrap_or_default();
        // the last line may be half written
        Ok(text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect())
    }

    /// Asks it to stop; its report.
    pub fn finish(mut self) -> Result<Value> {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < patient(Duration::from_secs(60)), "ts-client does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut text = String::new();
        let mut stdout = self.child.stdout.take().context("stdout")?;
        std::io::Read::read_to_string(&mut stdout, &mut text)?;
        serde_json::from_str(text.trim()).with_context(|| format!("ts-client said {text:?}"))
    }

    /// Asks it to stop; fails unless the connection survived and nothing was lost or wrong.
    pub fn finish_intact(self) -> Result<Value> {
        let report = self.finish()?;
        let intact = report["connection_survived"] == true && report["lost"] == 0 && report["wrong"] == 0;
        ensure!(intact, "the client saw: {report}");
        Ok(report)
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        // hack/nodes and ip netns exec become the client by exec: the child's pid is ts-client's
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
