//! What a request's client is told: phases with their times, progress (not too often), the end (once).

use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::api::{ErrorReport, Event, PhaseTime, Reply, Report};
use crate::migrate::report::millis;

/// The least time between two messages of progress about the same thing.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The sending end; a client that is gone is no error.
#[derive(Debug)]
pub struct Reporter {
    to: mpsc::UnboundedSender<Event>,
    start: Instant,
    phases: Vec<(String, Instant)>,
    progressed: Option<(String, Instant)>,
    warnings: Vec<String>,
    ended: bool,
}

impl Reporter {
    /// Starts now; the events come out of the other end.
    pub fn new() -> (Reporter, mpsc::UnboundedReceiver<Event>) {
        let (to, events) = mpsc::unbounded_channel();
        let (start, phases) = (Instant::now(), Vec::new());
        (Reporter { to, start, phases, progressed: None, warnings: Vec::new(), ended: false }, events)
    }

    /// A phase begins; the same one again is nothing new.
    pub fn phase(&mut self, name: &str) {
        if self.phases.last().is_none_or(|(last, _)| last != name) {
            let now = Instant::now();
            self.phases.push((name.into(), now));
            let at_ms = (now - self.start).as_millis() as u64;
            self.say(Event::Phase { name: name.into(), at_ms });
        }
    }

    /// The phase that runs.
    pub fn phase_name(&self) -> String {
        self.phases.last().map(|(name, _)| name.clone()).unwrap_or_default()
    }

    /// Sends progress, unless some was sent just now.
    pub fn progress(&mut self, what: &str, done: u64, total: Option<u64>) {
        let now = Instant::now();
        let recent =
            self.progressed.as_ref().is_some_and(|(last, at)| last == what && now - *at < PROGRESS_EVERY);
        if !recent || total == Some(done) {
            self.progressed = Some((what.into(), now));
            self.say(Event::Progress { what: what.into(), done, total });
        }
    }

    /// A round begins: its progress counts from nothing.
    pub fn round(&mut self, n: u32, total: Option<u64>) {
        self.progressed = None;
        self.say(Event::Round { n, total });
    }

    /// Sends an event.
    pub fn say(&mut self, event: Event) {
        if let Event::Warning { message } = &event {
            log::warn!("{message}");
            self.warnings.push(message.clone());
        }
        if !self.ended {
            let _ = self.to.send(event);
        }
    }

    /// Sends the end; a second one is only logged.
    pub fn end(&mut self, result: Result<Reply, ErrorReport>) {
        let event = match result {
            Ok(reply) => Event::Done { reply },
            Err(error) => Event::Failed { error },
        };
        if self.ended {
            log::info!("afterwards: {event:?}");
        }
        self.say(event);
        self.ended = true;
    }

    /// Milliseconds since the start.
    pub fn elapsed_ms(&self) -> f64 {
        millis(self.start.elapsed())
    }

    /// Puts times and warnings into a report.
    pub fn fill(&self, report: &mut Report) {
        report.total_ms = self.elapsed_ms();
        let ends = self.phases.iter().skip(1).map(|(_, at)| *at).chain([Instant::now()]);
        report.phases = self
            .phases
            .iter()
            .zip(ends)
            .map(|((name, at), end)| PhaseTime { name: name.clone(), ms: millis(end - *at) })
            .collect();
        for warning in &self.warnings {
            if !report.warnings.contains(warning) {
                report.warnings.push(warning.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::api::ExitCode;

    #[test]
    fn one_end_and_not_too_much_progress() {
        let (mut reporter, mut events) = Reporter::new();
        reporter.phase("prepare");
        reporter.phase("prepare");
        for done in 0..100 {
            reporter.progress("blobs", done, Some(100));
        }
        reporter.progress("blobs", 100, Some(100));
        reporter.end(Err(ErrorReport::new(ExitCode::Undecided, "x")));
        reporter.end(Err(ErrorReport::new(ExitCode::Failed, "y")));
        let mut got = Vec::new();
        while let Ok(event) = events.try_recv() {
            got.push(event);
        }
        assert_eq!(got.len(), 4, "{got:?}");
        assert!(matches!(&got[3], Event::Failed { error } if error.code == ExitCode::Undecided));
        let mut report = Report::default();
        reporter.fill(&mut report);
        assert_eq!(report.phases.len(), 1);
    }
}
