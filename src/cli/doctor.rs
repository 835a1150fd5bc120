//! `transship doctor`: the findings of [`crate::doctor`] as a table with advice.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Common;
use super::output::Answer;
use super::table::{Align, render};
use crate::agent::api::{ErrorReport, ExitCode};
use crate::agent::config::DEFAULT_PATH;
use crate::doctor::{Finding, Level, Options, examine, fit, tracker};

/// Is this node fit, and what to do about it.
///
/// Tries what a migration needs for real: CRIU by a dump of a process with connected sockets, the fence and overlayfs in
/// namespaces of their own, the freezer on an empty cgroup. Leaves nothing behind. Ends with 0 when the node is fit.
#[derive(Args, Debug, Clone)]
pub struct Doctor {
    /// The agent's configuration file
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
    /// containerd's socket [default: the agent's configuration]
    #[arg(long, value_name = "PATH")]
    pub containerd: Option<PathBuf>,
}

impl Doctor {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let options = Options {
            config: self.config.clone(),
            agent_socket: common.agent_socket.clone(),
            containerd: self.containerd.clone(),
        };
        let quiet = common.json || !std::io::stderr().is_terminal();
        let findings = examine(&options, |subject| {
            if !quiet {
                let _ = write!(std::io::stderr(), "\r\x1b[Klooking at {subject} ..\r");
            }
        });
        if !quiet {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
        let code = if fit(&findings) { ExitCode::Ok } else { ExitCode::Unfit };
        let fields = json!({
            "fit": fit(&findings),
            "tracker": tracker::choice(&tracker::gather()),
            "findings": findings,
        });
        Ok(Answer::new(fields, show(&findings)).code(code))
    }
}

/// The table, then the advice by its number, then the judgement.
fn show(findings: &[Finding]) -> String {
    let columns = [("check", Align::Left), ("", Align::Left), ("found", Align::Left)];
    let rows: Vec<_> = findings
        .iter()
        .map(|f| vec![f.check.to_string(), f.level.word().to_string(), f.found.replace('\n', " ")])
        .collect();
    let mut text = render(&columns, &rows);
    let advised: Vec<_> = findings.iter().filter_map(|f| f.advice.as_ref().map(|a| (f, a))).collect();
    if !advised.is_empty() {
        text.push('\n');
    }
    for (finding, advice) in advised {
        text.push_str(&format!("{} {}: {advice}\n", finding.level.word(), finding.check));
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let judgement = if fit(findings) { "fit" } else { "unfit" };
    text.push_str(&format!(
        "\nThis node is {judgement}: {} ok, {} to know, {} in the way.\n",
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_on_fixed_input() {
        let findings = [
            Finding::ok("kernel", "Linux 6.18"),
            Finding::warn("capabilities", "CAP_SYS_RESOURCE is missing", "oom scores stay"),
            Finding::fail("runc", "not on\nPATH", "install it"),
        ];
        assert_eq!(
            show(&findings),
            "\
check               found
kernel        ok    Linux 6.18
capabilities  warn  CAP_SYS_RESOURCE is missing
runc          fail  not on PATH

warn capabilities: oom scores stay
fail runc: install it

This node is unfit: 1 ok, 1 to know, 1 in the way.
"
        );
    }

    #[test]
    fn a_healthy_node_needs_no_advice() {
        assert!(
            show(&[Finding::ok("x", "y")])
                .ends_with("x      ok  y\n\nThis node is fit: 1 ok, 0 to know, 0 in the way.\n")
        );
    }
}
