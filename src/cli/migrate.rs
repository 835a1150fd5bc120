//! `transship migrate`: asks the agent for the move, shows how far it is, and ends with a table.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::output::{Answer, error_text};
use super::peer::Peer;
use super::progress::Progress;
use super::table::{Align, render};
use super::tuning::Options;
use super::{Common, Namespace, ask, unexpected, units};
use crate::agent::api::{ErrorReport, ExitCode, MigrateRequest, Reply, Report, Request};
use crate::migrate::report::Report as ShimReport;

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
    /// How memory moves.
    #[command(flatten)]
    pub tuning: Options,
    /// When it does not run, move it cold without asking
    #[arg(short, long)]
    pub yes: bool,
}

impl Migrate {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        match self.attempt(common, self.cold) {
            Err(error) if error.code == ExitCode::NotRunning && !self.cold => {
                if self.wants_cold(common, &error) {
                    self.attempt(common, true)
                } else {
                    Err(offer_cold(error))
                }
            }
            other => other,
        }
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

    fn attempt(&self, common: &Common, cold: bool) -> Result<Answer, ErrorReport> {
        let request = Request::Migrate(MigrateRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            to: self.to.to_string(),
            cold,
            ignore_cpu: self.ignore_cpu,
            silence_seconds: self.silence,
            ghost_limit: self.ghost_limit,
            tuning: self.tuning.asked(),
        });
        let mut progress = Progress::new(common.json);
        match common.call(&request, &mut progress)? {
            Reply::Migrated(report) => {
                let unseen: Vec<_> =
                    report.warnings.iter().filter(|w| !progress.warnings.contains(w)).cloned().collect();
                let text = summary(&report, &progress.phases, &unseen);
                Ok(Answer::new(json!({ "report": report }), text))
            }
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

/// The table at the end. `began`: phases with the millisecond in which this command heard of them.
fn summary(report: &Report, began: &[(String, u64)], warnings: &[String]) -> String {
    let mut rows = Vec::new();
    let mut sum = 0.0;
    for phase in &report.phases {
        // What was heard is exact; without it (a name that was not announced) the phases follow each other.
        let start = began.iter().find(|(n, _)| *n == phase.name).map_or(sum, |(_, at)| *at as f64);
        sum = start + phase.ms;
        rows.push(vec![phase.name.clone(), format!("{start:.0}"), format!("{:.1}", phase.ms)]);
    }
    let shim = report.shim.as_ref().and_then(|v| serde_json::from_value::<ShimReport>(v.clone()).ok());
    if let Some(shim) = &shim {
        for (side, phases) in [("source", &shim.phases), ("dest", &shim.destination_phases)] {
            for phase in phases {
                rows.push(vec![
                    format!("  {side}: {}", phase.name),
                    format!("{:.0}", phase.start_ms),
                    format!("{:.1}", phase.ms),
                ]);
            }
        }
    }
    let columns = [("phase", Align::Left), ("start", Align::Right), ("ms", Align::Right)];
    let mut text = if rows.is_empty() { String::new() } else { render(&columns, &rows) + "\n" };
    // Bytes flow between the shims: their own time says how fast, not the agent's preparations.
    let sending = shim.as_ref().map_or(report.total_ms, |s| s.total_ms);
    let rate = units::per_second(report.bytes_sent, sending)
        .map(|r| format!(" ({}/s)", units::bytes(r)))
        .unwrap_or_default();
    if report.cold {
        text.push_str(&format!("sent    {}{rate}, cold\n", units::bytes(report.bytes_sent)));
    } else {
        text.push_str(&format!("freeze  {}\n", units::ms(report.freeze_ms)));
        text.push_str(&format!("sent    {}{rate}\n", units::bytes(report.bytes_sent)));
    }
    if report.blob_bytes > 0 {
        text.push_str(&format!("image   {}\n", units::bytes(report.blob_bytes)));
    }
    for warning in warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    let what = if report.cold { "lies" } else { "runs" };
    text.push_str(&format!(
        "{} {what} on {} now (from {}, {})\n",
        report.container,
        report.to,
        report.from,
        units::ms(report.total_ms)
    ));
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::agent::api::{Event, PhaseTime, read_frame, write_frame};
    use crate::migrate::tuning::Mode;

    fn report() -> Report {
        let phase = |name: &str, ms| PhaseTime { name: name.into(), ms };
        Report {
            container: "redis".into(),
            from: "node-a".into(),
            to: "node-b".into(),
            total_ms: 812.0,
            freeze_ms: 231.4,
            bytes_sent: 268_435_456,
            phases: vec![phase("preflight", 12.0), phase("prepare", 300.0), phase("transfer", 500.0)],
            ..Report::default()
        }
    }

    #[test]
    fn the_table_on_fixed_input() {
        let began =
            [("preflight".to_string(), 0), ("prepare".to_string(), 12), ("transfer".to_string(), 312)];
        assert_eq!(
            summary(&report(), &began, &["the clock jumped".into()]),
            "\
phase      start     ms
preflight      0   12.0
prepare       12  300.0
transfer     312  500.0

freeze  231.4 ms
sent    268.4 MB (330.6 MB/s)
warning: the clock jumped
redis runs on node-b now (from node-a, 812.0 ms)
"
        );
    }

    #[test]
    fn without_events_phases_follow_each_other_and_the_shims_are_shown() {
        let mut report = report();
        report.shim = Some(json!({
            "migration_id": "m", "freeze_ms": 231.4, "total_ms": 400.0, "bytes_sent": 1,
            "phases": [{ "name": "dump", "start_ms": 1.0, "ms": 58.0 }],
            "destination_phases": [{ "name": "restore", "start_ms": 60.0, "ms": 20.0 }],
        }));
        let text = summary(&report, &[], &[]);
        assert!(text.contains("transfer           312  500.0\n"), "{text}");
        assert!(text.contains("  source: dump       1   58.0\n"), "{text}");
        assert!(text.contains("  dest: restore     60   20.0\n"), "{text}");
        assert!(text.contains("(671.1 MB/s)"), "{text}");
    }

    #[test]
    fn a_report_of_an_unknown_shape_is_no_obstacle() {
        let report = Report { shim: Some(json!("?")), phases: vec![], cold: true, ..report() };
        let text = summary(&report, &[], &[]);
        assert!(
            text.starts_with("sent ") && text.contains("cold") && text.contains("lies on node-b"),
            "{text}"
        );
    }

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
            cold: false,
            ignore_cpu: true,
            silence: 7,
            ghost_limit: 0,
            tuning: Options { mode: Some(Mode::PreCopy), ..Options::default() },
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
        assert_eq!((first.ignore_cpu, first.silence_seconds), (true, 7));
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
    fn the_cold_way_is_offered_once() {
        let error = offer_cold(ErrorReport::new(ExitCode::NotRunning, "redis does not run"));
        assert!(error.advice.contains("--cold"));
        assert_eq!(offer_cold(error.clone()), error);
    }
}
