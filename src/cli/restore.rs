//! `transship restore`: a container made of a checkpoint file.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::checkpoint::absolute;
use super::output::Answer;
use super::progress::Progress;
use super::{Common, unexpected, units};
use crate::agent::api::{ErrorReport, Reply, Request, RestoreRequest};

/// Make a container of a checkpoint file.
///
/// Nothing is made of a file that is not whole: all of it is read, and its checksums or (if it is encrypted) its authentication, before
/// anything else is done.
#[derive(Args, Debug, Clone)]
pub struct Restore {
    /// The checkpoint file
    pub file: PathBuf,
    /// The new container's id [default: the file's]
    #[arg(long, value_name = "CONTAINER")]
    pub name: Option<String>,
    /// containerd's namespace [default: the file's]
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
    /// Do not compare CPU features with those of the node where the file was made
    #[arg(long)]
    pub ignore_cpu: bool,
    /// The file with the identity (secret key) of an encrypted file
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    pub identity: Option<PathBuf>,
    /// The file whose first line is the passphrase of an encrypted file
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

impl Restore {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let request = Request::Restore(RestoreRequest {
            namespace: self.namespace.clone().unwrap_or_default(),
            file: absolute(&self.file)?,
            container: self.name.clone().unwrap_or_default(),
            ignore_cpu: self.ignore_cpu,
            keys: self
                .identity
                .as_ref()
                .or(self.passphrase_file.as_ref())
                .map(|f| absolute(f))
                .transpose()?,
        });
        let mut progress = Progress::new(common.json);
        match common.call(&request, &mut progress)? {
            Reply::Restored(report) => {
                let mut text = String::new();
                for warning in report.warnings.iter().filter(|w| !progress.warnings.contains(w)) {
                    text.push_str(&format!("warning: {warning}\n"));
                }
                text.push_str(&format!(
                    "{} runs in namespace {} (pid {}, {})",
                    report.container,
                    report.namespace,
                    report.pid,
                    units::ms(report.total_ms)
                ));
                if !report.stdio.is_empty() {
                    text.push_str(&format!("\nits output: {}", report.stdio));
                }
                Ok(Answer::new(json!({ "report": report }), text))
            }
            other => Err(unexpected(&other)),
        }
    }
}
