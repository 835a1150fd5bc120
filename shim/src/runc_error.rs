//! What a runc run that failed has said: its exit status, its output, and its reason. runc writes its own errors as JSON lines into the
//! bundle's `log.json`; what one run has added there is what its error says.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use serde::Deserialize;

/// A runc run that failed.
#[derive(Debug, Clone)]
pub struct RuncError {
    program: String,
    status: u32,
    output: String,
    /// The last error in what the run added to its log.
    logged: Option<String>,
}

impl RuncError {
    /// A run of `program` that ended with `status`; what it has added to its log after `start` bytes is the reason.
    pub fn new(program: &str, status: u32, output: String, log: &Path, start: u64) -> Self {
        Self { program: program.to_owned(), status, output, logged: last_logged_error(log, start) }
    }

    /// The error for a client: `what` and runc's own reason.
    pub fn explain(&self, what: &str) -> String {
        match &self.logged {
            Some(reason) => format!("{what}: {reason}"),
            None => format!("{what}: {self}"),
        }
    }

    /// Whether the reason or the output contains `text` (any case).
    pub fn mentions(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        self.output.to_lowercase().contains(&text)
            || self.logged.as_ref().is_some_and(|l| l.to_lowercase().contains(&text))
    }
}

impl std::fmt::Display for RuncError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} did not terminate successfully: exit status {}", self.program, self.status)?;
        if !self.output.is_empty() {
            write!(f, ": {}", self.output)?;
        }
        Ok(())
    }
}

impl std::error::Error for RuncError {}

/// How long runc's log is before a run.
pub fn log_size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

/// The last line of level error that was added to runc's log after its first `start` bytes.
fn last_logged_error(log: &Path, start: u64) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut file = fs::File::open(log).ok()?;
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut text = String::new();
    file.take(1 << 20).read_to_string(&mut text).ok()?;
    text.lines()
        .filter_map(|l| serde_json::from_str::<Line>(l).ok())
        .rfind(|l| l.level == "error" || l.level == "fatal")
        .map(|l| l.msg.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_the_reason_of_this_run_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let old = "{\"level\":\"error\",\"msg\":\"old\",\"time\":\"t\"}\n";
        fs::write(&log, old).unwrap();
        assert_eq!(last_logged_error(&log, old.len() as u64), None);
        let new = format!(
            "{old}{{\"level\":\"warning\",\"msg\":\"w\"}}\n{{\"level\":\"error\",\"msg\":\" new \"}}\n"
        );
        fs::write(&log, new).unwrap();
        assert_eq!(last_logged_error(&log, old.len() as u64).as_deref(), Some("new"));
    }

    #[test]
    fn an_error_prefers_runcs_own_reason() {
        let mut e = RuncError { program: "runc".into(), status: 1, output: "boom".into(), logged: None };
        assert_eq!(
            e.explain("OCI runtime create failed"),
            "OCI runtime create failed: runc did not terminate successfully: exit status 1: boom"
        );
        e.logged = Some("no such file".into());
        assert_eq!(e.explain("OCI runtime create failed"), "OCI runtime create failed: no such file");
        assert!(e.mentions("BOOM") && e.mentions("no such"));
    }
}
