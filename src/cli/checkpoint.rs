//! `transship checkpoint`: a container's state in one file.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::{Common, Namespace, unexpected, units};
use crate::agent::api::{CheckpointRequest, ErrorReport, ExitCode, Reply, Request};

/// Write a container's state to a file.
///
/// The file holds the container's memory and is written with mode 0600.
#[derive(Args, Debug, Clone)]
pub struct Checkpoint {
    /// The container's id
    pub container: String,
    /// The file to write; it must not exist
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Where containerd keeps it.
    #[command(flatten)]
    pub namespace: Namespace,
    /// Stop the container once the file is complete
    #[arg(long)]
    pub stop: bool,
}

impl Checkpoint {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let request = Request::Checkpoint(CheckpointRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            output: absolute(&self.output)?,
            leave_running: !self.stop,
        });
        let mut progress = Progress::new(common.json);
        match common.call(&request, &mut progress)? {
            Reply::Checkpointed(report) => {
                let mut text = String::new();
                for warning in report.warnings.iter().filter(|w| !progress.warnings.contains(w)) {
                    text.push_str(&format!("warning: {warning}\n"));
                }
                text.push_str(&format!(
                    "{} ({}); {} was frozen for {} and {}",
                    report.output.display(),
                    units::bytes(report.bytes),
                    report.container,
                    units::ms(report.freeze_ms),
                    if report.running { "runs on" } else { "is stopped" }
                ));
                Ok(Answer::new(json!({ "report": report }), text))
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// The agent has another working directory than this command.
pub(super) fn absolute(path: &std::path::Path) -> Result<PathBuf, ErrorReport> {
    std::path::absolute(path)
        .map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{}: {e}", path.display())))
}
