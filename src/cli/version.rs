//! `transship version`: of this program, and of what the agent finds on this node.

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::{Common, unexpected};
use crate::agent::api::{ErrorReport, Reply, Request, VersionReport};

/// Show the versions on this node.
#[derive(Args, Debug, Clone)]
pub struct Version {}

/// This program's version.
const CLI: &str = env!("CARGO_PKG_VERSION");

impl Version {
    /// Runs it. An agent that does not answer is no error: this program's version is known all the same.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        match common.call(&Request::Version, &mut Progress::new(true)) {
            Ok(Reply::Version(agent)) => {
                let text = words(&agent);
                Ok(Answer::new(json!({ "version": CLI, "agent": agent }), text))
            }
            Ok(other) => Err(unexpected(&other)),
            Err(e) => Ok(Answer::new(
                json!({ "version": CLI, "agent": null, "agent_error": e.message }),
                format!("transship  {CLI}\nagent      {}", e.message),
            )),
        }
    }
}

fn words(agent: &VersionReport) -> String {
    let or = |text: &str| if text.is_empty() { "not found".to_string() } else { text.to_string() };
    let (oldest, newest) = agent.protocol;
    format!(
        "transship  {CLI}\nagent      {} (node {})\nprotocol   {oldest} to {newest}\ncontainerd {}\ncriu       {}\nrunc       {}\nkernel     {}",
        agent.agent,
        or(&agent.node),
        or(&agent.containerd),
        or(&agent.criu),
        or(&agent.runc),
        or(&agent.kernel)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let text =
            words(&VersionReport { agent: "0.1.0".into(), protocol: (1, 2), ..VersionReport::default() });
        assert!(text.contains("protocol   1 to 2") && text.contains("criu       not found"), "{text}");
    }
}
