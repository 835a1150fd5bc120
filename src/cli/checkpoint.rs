//! `transship checkpoint`: a container's state in one file.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::{Common, Namespace, unexpected, units};
use crate::agent::api::{CheckpointRequest, EncryptTo, ErrorReport, ExitCode, Reply, Request};
use crate::migrate::seal;

/// Write a container's state to a file.
///
/// The file holds the container's memory, its files and its environment. It is root's alone (mode 0600), and encrypted with
/// --encrypt-to or --passphrase-file. Until it is complete it is called .FILE.XXXXXX.part.
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
    /// Encrypt the file to this public key (age1..., as age-keygen prints it), or to those in this file, one a line; more than once: to each
    #[arg(long, value_name = "RECIPIENT|FILE")]
    pub encrypt_to: Vec<String>,
    /// Encrypt the file with the passphrase that is the first line of this file
    #[arg(long, value_name = "FILE", conflicts_with = "encrypt_to")]
    pub passphrase_file: Option<PathBuf>,
}

impl Checkpoint {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let checkpoint = CheckpointRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            output: absolute(&self.output)?,
            leave_running: !self.stop,
        };
        let request = match self.encrypt()? {
            Some(to) => Request::CheckpointEncrypted { checkpoint, to },
            None => Request::Checkpoint(checkpoint),
        };
        let mut progress = Progress::new(common.json);
        match common.call(&request, &mut progress)? {
            Reply::Checkpointed(report) => {
                let mut text = String::new();
                for warning in report.warnings.iter().filter(|w| !progress.warnings.contains(w)) {
                    text.push_str(&format!("warning: {warning}\n"));
                }
                text.push_str(&format!(
                    "{} ({}{}); {} was frozen for {} and {}",
                    report.output.display(),
                    units::bytes(report.bytes),
                    if report.encrypted { ", encrypted" } else { "" },
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

impl Checkpoint {
    /// For whom the file is to be.
    fn encrypt(&self) -> Result<Option<EncryptTo>, ErrorReport> {
        if let Some(file) = &self.passphrase_file {
            return Ok(Some(EncryptTo::PassphraseFile(absolute(file)?)));
        }
        if self.encrypt_to.is_empty() {
            return Ok(None);
        }
        let keys = self.encrypt_to.iter().map(|given| recipients(given)).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(EncryptTo::Recipients(keys.concat())))
    }
}

/// A public key, or what is in a file of them. Never with the file's content in an error: it may be the wrong file.
fn recipients(given: &str) -> Result<Vec<String>, ErrorReport> {
    let wrong = |what: String| {
        ErrorReport::new(ExitCode::Usage, format!("--encrypt-to: {what}"))
            .state("nothing was begun")
            .advice("give a public key of age's (age-keygen makes a pair), or a file with one a line")
    };
    let looks_like_a_key = ["age1", "ssh-", "AGE-SECRET-KEY-"].iter().any(|p| given.starts_with(p));
    if looks_like_a_key && !std::path::Path::new(given).exists() {
        return seal::recipients(given).map_err(|e| wrong(e.root_cause().to_string()));
    }
    let text = std::fs::read_to_string(given).map_err(|e| wrong(format!("{given}: {e}")))?;
    seal::recipients(&text).map_err(|e| wrong(format!("{given}: {e:#}")))
}

/// The agent has another working directory than this command.
pub(super) fn absolute(path: &std::path::Path) -> Result<PathBuf, ErrorReport> {
    std::path::absolute(path)
        .map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(encrypt_to: &[&str]) -> Result<Option<EncryptTo>, ErrorReport> {
        let encrypt_to = encrypt_to.iter().map(|s| (*s).to_owned()).collect();
        Checkpoint {
            container: "c".into(),
            output: "/o".into(),
            namespace: Namespace { namespace: None },
            stop: false,
            encrypt_to,
            passphrase_file: None,
        }
        .encrypt()
    }

    #[test]
    fn recipients_come_as_they_are_or_in_files() {
        let keys: Vec<String> =
            (0..3).map(|_| age::x25519::Identity::generate().to_public().to_string()).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, format!("# the backup's\n{}\n\n{}\n", keys[1], keys[2])).unwrap();
        assert_eq!(asked(&[]).unwrap(), None);
        let both = asked(&[&keys[0], file.to_str().unwrap()]).unwrap();
        assert_eq!(both, Some(EncryptTo::Recipients(keys)));
        std::fs::write(&file, "PASSWORD=hunter2\n").unwrap();
        for (given, word) in [
            (file.to_str().unwrap(), "line 1"),
            ("age1x", "begins with age1"),
            ("/no/such/file", "No such file"),
            ("AGE-SECRET-KEY-1QQQ", "secret key"),
        ] {
            let error = format!("{:?}", asked(&[given]).unwrap_err());
            assert!(error.contains(word) && !error.contains("hunter2") && !error.contains("1QQQ"), "{error}");
        }
    }
}
