//! What a migration did: phases with start and duration, bytes, pages. Data and arithmetic only; how it is shown is
//! the CLI's business.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// One phase, in milliseconds from the start of the migration on that side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `connect`, `freeze`, `dump`, `files`, `layer`, `restore`, ...
    pub name: String,
    /// Start, ms.
    pub start_ms: f64,
    /// Duration, ms.
    pub ms: f64,
}

/// The report of one migration, as the source's shim measured it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The migration.
    pub migration_id: String,
    /// Milliseconds from the freeze until the destination had its tasks running.
    pub freeze_ms: f64,
    /// Milliseconds in all, on the source's shim.
    pub total_ms: f64,
    /// The source's phases.
    pub phases: Vec<Phase>,
    /// The destination's phases (its own clock and start).
    #[serde(default)]
    pub destination_phases: Vec<Phase>,
    /// Bytes sent, frames' headers included, before encryption.
    pub bytes_sent: u64,
    /// What those bytes were.
    #[serde(default)]
    pub sent: super::protocol::Final,
    /// Processes that moved.
    #[serde(default)]
    pub processes: usize,
    /// Things worth telling that were no failure.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Measures phases one after the other.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    phases: Vec<Phase>,
    open: Option<(String, Instant)>,
}

impl Clock {
    /// Starts now, with no phase.
    pub fn start() -> Clock {
        Clock { start: Instant::now(), phases: Vec::new(), open: None }
    }

    /// Ends the phase that is open and begins `name`.
    pub fn phase(&mut self, name: &str) {
        self.end();
        self.open = Some((name.to_owned(), Instant::now()));
    }

    /// Ends the phase that is open.
    pub fn end(&mut self) {
        if let Some((name, at)) = self.open.take() {
            let start_ms = millis(at - self.start);
            self.phases.push(Phase { name, start_ms, ms: millis(at.elapsed()) });
        }
    }

    /// The name of the phase that is open, or of the last one.
    pub fn current(&self) -> &str {
        let last = self.phases.last().map(|p| p.name.as_str());
        self.open.as_ref().map(|o| o.0.as_str()).or(last).unwrap_or("start")
    }

    /// All phases that ended, and milliseconds since the start.
    pub fn done(&mut self) -> (Vec<Phase>, f64) {
        self.end();
        (self.phases.clone(), millis(self.start.elapsed()))
    }
}

/// A duration in milliseconds, rounded to a microsecond.
pub fn millis(d: std::time::Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_without_gaps_in_the_list() {
        let mut c = Clock::start();
        assert_eq!(c.current(), "start");
        c.phase("freeze");
        c.phase("dump");
        assert_eq!(c.current(), "dump");
        let (phases, total) = c.done();
        assert_eq!(phases.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["freeze", "dump"]);
        assert!(phases[1].start_ms >= phases[0].start_ms + phases[0].ms - 0.01 && total >= phases[1].ms);
        assert_eq!(c.current(), "dump");
    }
}
