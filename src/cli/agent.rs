//! `transship agent`: the node's daemon, run in the foreground (systemd's unit is in `examples/`).

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Common;
use super::output::Answer;
use crate::agent::api::{ErrorReport, ExitCode};
use crate::agent::config::{Config, DEFAULT_PATH};

/// Run the node's agent.
///
/// Peers connect to its TCP port, this command line to its unix socket. Logs go to stderr; RUST_LOG chooses how much
/// (error, warn, info, debug, trace).
#[derive(Args, Debug, Clone)]
pub struct Agent {
    /// The configuration file; the default one may be missing
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
}

impl Agent {
    /// Runs it until it is told to end by SIGTERM or SIGINT.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
        let mut config = Config::load(&self.config).map_err(|e| {
            ErrorReport::new(ExitCode::Usage, format!("{e:#}"))
                .advice("examples/agent.toml explains every key of the configuration")
        })?;
        if let Some(socket) = &common.agent_socket {
            config.socket = socket.clone();
        }
        crate::agent::run(config).map_err(|e| ErrorReport::new(ExitCode::Failed, format!("{e:#}")))?;
        Ok(Answer::new(json!({}), ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_names_every_key_and_differs_from_the_defaults_only_where_it_says_so() {
        let text = include_str!("../../examples/agent.toml");
        let config = Config::parse(text).unwrap();
        assert_eq!(config, Config { bridge: Some("cni0".into()), ..Config::default() });
        // A key whose default is no fixed value stands there as a comment: it must parse as well.
        let uncommented = text.replace("# node =", "node =").replace("# criu =", "criu =");
        let config = Config::parse(&uncommented).unwrap();
        assert_eq!((config.node.as_str(), config.criu.is_some()), ("node-a", true));
        // The debug form lists the fields: each has to be in the file.
        for field in
            format!("{:?}", Config::default()).split([' ', '{', ',']).filter_map(|w| w.strip_suffix(':'))
        {
            let there = text.contains(&format!("{field} =")) || text.contains(&format!("[{field}]"));
            assert!(there, "examples/agent.toml lacks {field}");
        }
    }
}
