//! `transship migrate`: asks the agent for the move, shows how far it is, and ends with a table.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::output::{Answer, error_text};
use super::peer::Peer;
use super::picture::Picture;
use super::progress::Progress;
use super::summary::summary;
use super::tuning::Options;
use super::{Common, Namespace, ask, unexpected};
use crate::agent::api::{ErrorReport, ExitCode, MigrateRequest, Reply, Report, Request};

/// Move a container to another node.
///
/// Interrupting this command does not stop the move: see `transship ps`.
#[derive(Args, Debug, Clone)]
pub struct Migrate {
    /// The container's id
    pub container: String,
    /// The destination's agent; port 7420 unless given, IPv6 addresses in brackets
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: Peer,
    /// Where containerd keeps it.
    #[command(flatten)]
    pub namespace: Namespace,
    /// What `transship ticket` printed on the destination, if this node is not listed there
    #[arg(long, value_name = "TICKET", default_value = "", hide_default_value = true)]
    pub ticket: String,
    /// Move it also when it does not run: record, image and writable layer
    #[arg(long)]
    pub cold: bool,
    /// Do not compare the nodes' CPU features (it may die of an illegal instruction)
    #[arg(long)]
    pub ignore_cpu: bool,
    /// End a phase after so many seconds without progress [default: the agent's]
    #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub silence: u64,
    /// Largest open-but-deleted file that is carried along, in bytes [default: the agent's]
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
    pub ghost_limit: u64,
    /// Draw the move's timeline into FILE.svg or FILE.html
    #[arg(long, value_name = "FILE")]
    pub report: Option<Picture>,
    /// When it does not run, move it cold without asking
    #[arg(short, long)]
    pub yes: bool,
    /// How memory moves.
    #[command(flatten)]
    pub tuning: Options,
}

impl Migrate {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        // what cannot be written is found out before anything moves
        let drawing = self.report.as_ref().map(Picture::begin).transpose()?;
        let (mut report, progress) = match self.attempt(common, self.cold) {
            Err(error) if error.code == ExitCode::NotRunning && !self.cold => {
                if !self.wants_cold(common, &error) {
                    return Err(offer_cold(error));
                }
                self.attempt(common, true)?
            }
            other => other?,
        };
        if let Some(Err(error)) = drawing.map(|drawing| drawing.write(&report)) {
            report.warnings.push(error);
        }
        let unseen: Vec<_> =
            report.warnings.iter().filter(|w| !progress.warnings.contains(w)).cloned().collect();
        let text = summary(&report, &progress.phases, &unseen);
        Ok(Answer::new(json!({ "report": report }), text))
    }

    fn wants_cold(&self, common: &Common, error: &ErrorReport) -> bool {
        if self.yes {
            return true;
        }
        if common.json || !ask::possible() {
            return false;
        }
        let _ = writeln!(std::io::stderr(), "{}", error_text(error));
        ask::yes(&format!("Move {} to {} cold, without memory?", self.container, self.to))
    }

    fn attempt(&self, common: &Common, cold: bool) -> Result<(Report, Progress), ErrorReport> {
        let request = Request::Migrate(MigrateRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            to: self.to.to_string(),
            ticket: self.ticket.clone(),
            cold,
            ignore_cpu: self.ignore_cpu,
            silence_seconds: self.silence,
            ghost_limit: self.ghost_limit,
            tuning: self.tuning.asked(),
        });
        let mut progress = Progress::new(common.json);
        match common.call(&request, &mut progress)? {
            Reply::Migrated(report) => Ok((*report, progress)),
            other => Err(unexpected(&other)),
        }
    }
}

/// The agent's error with the way out, unless it named it itself.
fn offer_cold(mut error: ErrorReport) -> ErrorReport {
    if !error.advice.contains("--cold") {
        if !error.advice.is_empty() {
            error.advice.push_str("; ");
        }
        error.advice.push_str("move it without memory by --cold (or --yes), or start it first");
    }
    error
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::agent::api::{Event, read_frame, write_frame};
    use crate::cli::summary::tests::report;
    use crate::migrate::tuning::Mode;

    /// An agent that answers one connection after the other; what it was asked comes back.
    fn fake_agent(socket: &std::path::Path, answers: Vec<Event>) -> std::thread::JoinHandle<Vec<Request>> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let asked = answers.into_iter().map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let request = read_frame(&mut stream).unwrap();
                write_frame(&mut stream, &Event::Phase { name: "preflight".into(), at_ms: 0 }).unwrap();
                write_frame(&mut stream, &answer).unwrap();
                request
            });
            asked.collect()
        })
    }

    fn migrate(socket: &std::path::Path, yes: bool) -> (Common, Migrate) {
        let common = Common { json: true, agent_socket: Some(socket.into()) };
        let migrate = Migrate {
            container: "redis".into(),
            to: "node-b".parse().unwrap(),
            namespace: Namespace { namespace: Some("k8s.io".into()) },
            ticket: "t".into(),
            cold: false,
            ignore_cpu: true,
            silence: 7,
            ghost_limit: 0,
            tuning: Options { mode: Some(Mode::PreCopy), ..Options::default() },
            report: None,
            yes,
        };
        (common, migrate)
    }

    #[test]
    fn one_that_does_not_run_is_moved_cold_only_when_that_was_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let stopped =
            || Event::Failed { error: ErrorReport::new(ExitCode::NotRunning, "redis does not run") };
        let moved = Event::Done { reply: Reply::Migrated(Box::new(Report { cold: true, ..report() })) };

        let socket = dir.path().join("yes.sock");
        let agent = fake_agent(&socket, vec![stopped(), moved]);
        let (common, verb) = migrate(&socket, true);
        let answer = verb.run(&common).unwrap();
        assert_eq!(answer.fields["report"]["cold"], json!(true));
        let asked = agent.join().unwrap();
        let [Request::Migrate(first), Request::Migrate(second)] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!((first.cold, second.cold), (false, true));
        assert_eq!((first.to.as_str(), first.namespace.as_str()), ("node-b:7420", "k8s.io"));
        assert_eq!((first.ignore_cpu, first.silence_seconds, first.ticket.as_str()), (true, 7, "t"));
        assert_eq!((first.tuning.mode, first.tuning.compress), (Some(Mode::PreCopy), None));

        let socket = dir.path().join("no.sock");
        let agent = fake_agent(&socket, vec![stopped()]);
        let (common, verb) = migrate(&socket, false);
        let error = verb.run(&common).unwrap_err();
        assert_eq!(error.code, ExitCode::NotRunning);
        assert!(error.advice.contains("--cold"), "{}", error.advice);
        assert_eq!(agent.join().unwrap().len(), 1);
    }

    #[test]
    fn the_timeline_is_drawn_where_it_was_asked_for_and_nothing_is_left_of_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let picture = dir.path().join("move.html");
        let socket = dir.path().join("good.sock");
        let moved = Event::Done { reply: Reply::Migrated(Box::new(report())) };
        let agent = fake_agent(&socket, vec![moved]);
        let (common, mut verb) = migrate(&socket, true);
        verb.report = Some(picture.to_str().unwrap().parse().unwrap());
        verb.run(&common).unwrap();
        agent.join().unwrap();
        assert!(std::fs::read_to_string(&picture).unwrap().contains("redis: node-a to node-b"));

        let socket = dir.path().join("bad.sock");
        let failed = Event::Failed { error: ErrorReport::new(ExitCode::Lost, "12.0 MB were lost") };
        let agent = fake_agent(&socket, vec![failed]);
        let (common, mut verb) = migrate(&socket, true);
        verb.report = Some(dir.path().join("never.svg").to_str().unwrap().parse().unwrap());
        assert_eq!(verb.run(&common).unwrap_err().code, ExitCode::Lost);
        agent.join().unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|f| f.file_name()).collect();
        assert_eq!(left.len(), 3, "two sockets and one picture: {left:?}");

        let (_, mut verb) = migrate(&socket, true);
        verb.report = Some("/nonexistent/x.svg".parse().unwrap());
        assert_eq!(verb.run(&common).unwrap_err().code, ExitCode::Usage);
    }

    #[test]
    fn the_cold_way_is_offered_once() {
        let error = offer_cold(ErrorReport::new(ExitCode::NotRunning, "redis does not run"));
        assert!(error.advice.contains("--cold"));
        assert_eq!(offer_cold(error.clone()), error);
    }
}
