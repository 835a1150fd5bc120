//! The operator's command line. One file a verb; what it does is asked of the agent on its unix socket, except for `doctor`,
//! `cert` and `agent` itself.
//!
//! | file | what lives there |
//! |---|---|
//! | [`migrate`], [`ticket`], [`checkpoint`], [`restore`], [`ps`], [`resolve`], [`doctor`], [`cert`], [`agent`], [`version`] | the verbs |
//! | [`exit`] | exit statuses, as the help and the README show them |
//! | [`output`] | the end of every command: one JSON object, or words for a person |
//! | [`progress`] | phases and bytes while the agent works |
//! | [`summary`], [`tables`] | what a move came to: words and tables |
//! | [`timeline`], [`picture`] | the same drawn; the file that it goes to |
//! | [`table`], [`units`] | columns; bytes and milliseconds in words |
//! | [`peer`] | `HOST[:PORT]` |
//! | [`tuning`] | the options of a live migration |
//! | [`ask`] | a question on the terminal |
//!
//! Results go to stdout, progress and errors to stderr. With `--json` stdout carries exactly one line: one object, also for
//! errors and for wrong arguments.

pub mod agent;
pub mod ask;
pub mod cert;
pub mod checkpoint;
pub mod doctor;
pub mod exit;
pub mod migrate;
pub mod output;
pub mod peer;
pub mod picture;
pub mod progress;
pub mod ps;
pub mod resolve;
pub mod restore;
pub mod summary;
pub mod table;
pub mod tables;
pub mod ticket;
pub mod timeline;
pub mod tuning;
pub mod units;
pub mod version;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, error::ErrorKind};

use crate::agent::api::{Client, DEFAULT_SOCKET, ErrorReport, ExitCode, Reply, Request};
use output::{Answer, Output};
use progress::Progress;

/// Live migration of containers between containerd nodes.
///
/// A container moves with its memory, open files, writable layer, output, addresses and established connections. Until the
/// destination has said that all of it is there, every failure leaves the container running where it was.
#[derive(Parser, Debug)]
#[command(name = "transship", version, after_help = exit::HELP.as_str(), arg_required_else_help = true)]
pub struct Cli {
    /// What all commands understand.
    #[command(flatten)]
    pub common: Common,
    /// The verb.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every command.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// Print one JSON object instead of words (errors too)
    #[arg(long, global = true)]
    pub json: bool,
    /// The agent's unix socket [default: /run/transship/agent.sock]
    #[arg(long, global = true, alias = "socket", value_name = "PATH")]
    pub agent_socket: Option<PathBuf>,
}

/// The verbs.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Move a container to another node
    Migrate(migrate::Migrate),
    /// Allow another node to move one container here, once
    Ticket(ticket::Ticket),
    /// Write a container's state to a file
    Checkpoint(checkpoint::Checkpoint),
    /// Make a container of a checkpoint file
    Restore(restore::Restore),
    /// List the containers that run under transship
    Ps(ps::Ps),
    /// Decide a migration whose outcome this node could not learn
    Resolve(resolve::Resolve),
    /// Is this node fit, and what to do about it
    Doctor(doctor::Doctor),
    /// Make the CA and the nodes' certificates, revoke them
    Cert(cert::Cert),
    /// Run the node's agent
    Agent(agent::Agent),
    /// Show the versions on this node
    Version(version::Version),
}

impl Verb {
    /// The word on the command line, as in the JSON object's `command`.
    pub fn name(&self) -> &'static str {
        match self {
            Verb::Migrate(_) => "migrate",
            Verb::Ticket(_) => "ticket",
            Verb::Checkpoint(_) => "checkpoint",
            Verb::Restore(_) => "restore",
            Verb::Ps(_) => "ps",
            Verb::Resolve(_) => "resolve",
            Verb::Doctor(_) => "doctor",
            Verb::Cert(_) => "cert",
            Verb::Agent(_) => "agent",
            Verb::Version(_) => "version",
        }
    }
}

/// Option of the verbs that name a container.
#[derive(Args, Debug, Clone)]
pub struct Namespace {
    /// containerd's namespace, as with ctr [default: $CONTAINERD_NAMESPACE, else `default`]
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
}

impl Namespace {
    /// As ctr chooses it: the option, else the environment, else `default`.
    pub fn or_default(&self) -> String {
        choose_namespace(self.namespace.clone(), std::env::var("CONTAINERD_NAMESPACE").ok())
    }
}

fn choose_namespace(option: Option<String>, env: Option<String>) -> String {
    option.or(env).filter(|n| !n.is_empty()).unwrap_or_else(|| "default".into())
}

impl Common {
    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.agent_socket.clone().unwrap_or_else(|| DEFAULT_SOCKET.into())
    }

    /// Has the agent do something while `progress` shows how far it is.
    pub fn call(&self, request: &Request, progress: &mut Progress) -> Result<Reply, ErrorReport> {
        let result = Client::connect(&self.socket())?.call(request, |event| progress.event(event));
        progress.finish(result.is_ok());
        result
    }
}

/// The error of a verb whose request was answered with another verb's reply.
pub(crate) fn unexpected(reply: &Reply) -> ErrorReport {
    let text: String = format!("{reply:?}").chars().take(80).collect();
    ErrorReport::new(ExitCode::Failed, format!("the agent gave another answer than was asked for: {text}"))
        .advice("command line and agent are of different versions: restart the agent")
}

/// The whole program: reads the arguments, runs the verb, prints its end, returns its exit status.
pub fn main() -> std::process::ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => run(cli),
        Err(e) => reject(&e, std::env::args_os().any(|a| a == "--json")),
    };
    std::process::ExitCode::from(code.code())
}

fn run(cli: Cli) -> ExitCode {
    let output = Output { json: cli.common.json, command: cli.verb.name() };
    let common = &cli.common;
    let result: Result<Answer, ErrorReport> = match &cli.verb {
        Verb::Migrate(verb) => verb.run(common),
        Verb::Ticket(verb) => verb.run(common),
        Verb::Checkpoint(verb) => verb.run(common),
        Verb::Restore(verb) => verb.run(common),
        Verb::Ps(verb) => verb.run(common),
        Verb::Resolve(verb) => verb.run(common),
        Verb::Doctor(verb) => verb.run(common),
        Verb::Cert(verb) => verb.run(),
        Verb::Agent(verb) => verb.run(common),
        Verb::Version(verb) => verb.run(common),
    };
    output.end(result)
}

/// Help and version are no errors; a wrong argument is one, in JSON when that was asked for.
fn reject(error: &clap::Error, json: bool) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::Ok
        }
        _ if json => {
            let text = error.render().to_string();
            let report =
                ErrorReport::new(ExitCode::Usage, first_paragraph(&text)).advice("see transship --help");
            Output { json, command: "" }.end(Err(report))
        }
        _ => {
            let _ = error.print();
            ExitCode::Usage
        }
    }
}

/// What clap says before it shows the usage, on one line.
fn first_paragraph(text: &str) -> String {
    let words = text.lines().take_while(|l| !l.trim().is_empty()).flat_map(str::split_whitespace);
    words.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_parses_and_options_may_stand_after_it() {
        for line in [
            "transship migrate redis --to node-b",
            "transship migrate redis --to [::1]:7420 -n k8s.io --cold --ignore-cpu --yes --json",
            "transship migrate redis --to b --mode pre-copy --max-downtime 1s --bandwidth 1Gbit/s --compress zstd",
            "transship migrate redis --to b --on-post-copy-failure thaw --bandwidth unlimited --report r.svg",
            "transship migrate redis --to b --ticket b:1:2",
            "transship ticket redis --from node-a --valid 120m -n k8s.io",
            "transship ticket --list --json",
            "transship ticket --withdraw 0f3c",
            "transship checkpoint redis --output /tmp/x --stop --json",
            "transship restore /tmp/x --name other",
            "transship ps --json",
            "transship resolve redis --run-here --yes",
            "transship resolve redis --moved",
            "transship doctor --json",
            "transship cert ca --dir /x",
            "transship cert node node-a --address 10.0.0.1 --address a.example",
            "transship cert revoke node-a --ca /x",
            "transship agent --config /etc/transship/agent.toml",
            "transship version --agent-socket /x.sock",
            "transship --json ps --socket /x.sock",
        ] {
            let cli = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(line.contains("--json"), cli.common.json, "{line}");
            assert!(line.contains(cli.verb.name()));
        }
    }

    #[test]
    fn contradictions_and_lacks_are_refused() {
        for line in [
            "transship migrate redis",
            "transship migrate redis --to node-b:port",
            "transship migrate redis --to b --mode sideways",
            "transship migrate redis --to b --max-downtime 300",
            "transship migrate redis --to b --bandwidth 0MB/s",
            "transship migrate redis --to b --compress gzip",
            "transship migrate redis --to b --report r.pdf",
            "transship migrate redis --to b --on-post-copy-failure panic",
            "transship ticket redis",
            "transship ticket --from node-a",
            "transship ticket redis --list",
            "transship ticket redis --from node-a --withdraw 0f3c",
            "transship ticket --list --withdraw 0f3c",
            "transship ticket redis --from node-a --valid 5",
            "transship checkpoint redis",
            "transship resolve redis",
            "transship resolve redis --run-here --moved",
            "transship cert",
            "transship sink redis",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_usage_error_is_one_line() {
        let error = parse("transship migrate redis").unwrap_err();
        let text = first_paragraph(&error.render().to_string());
        assert_eq!(text, "the following required arguments were not provided: --to <HOST[:PORT]>");
    }

    #[test]
    fn the_namespace_is_chosen_as_ctr_does() {
        let some = |s: &str| Some(s.to_string());
        assert_eq!(choose_namespace(None, None), "default");
        assert_eq!(choose_namespace(None, some("k8s.io")), "k8s.io");
        assert_eq!(choose_namespace(some("x"), some("k8s.io")), "x");
        assert_eq!(choose_namespace(None, some("")), "default");
    }
}
