//! Phases, rounds and bytes while the agent works, on stderr: one moving bar at a time on a terminal, each leaving a line behind;
//! plain lines elsewhere; nothing with `--json`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units;
use crate::agent::api::Event;
use crate::migrate::report::Round;

/// How often a plain line about the same thing is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(1);

/// Shows events as they come, and remembers when phases began.
#[derive(Debug)]
pub struct Progress {
    display: Display,
    /// What is under way: a phase, or a round within it.
    current: Option<Current>,
    /// Phases as they began: name and milliseconds since the request.
    pub phases: Vec<(String, u64)>,
    /// Warnings in the order they came.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
enum Display {
    Silent,
    Plain { next: Instant },
    Bar(ProgressBar),
}

/// A phase or a round.
#[derive(Debug)]
struct Current {
    name: String,
    began: Instant,
    /// What was counted, and how far.
    amount: Option<Amount>,
}

/// How far something is.
#[derive(Clone, Debug, PartialEq)]
struct Amount {
    what: String,
    /// What had been done when it was first heard of: the rate is of what came since.
    first: u64,
    done: u64,
    total: Option<u64>,
}

impl Progress {
    /// As the streams allow.
    pub fn new(json: bool) -> Self {
        let display = if json {
            Display::Silent
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(120));
            Display::Bar(bar)
        } else {
            Display::Plain { next: Instant::now() }
        };
        Self { display, current: None, phases: Vec::new(), warnings: Vec::new() }
    }

    /// Takes one event in.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Phase { name, at_ms } => {
                self.begin(name.clone(), None);
                if let Display::Plain { .. } = self.display {
                    self.line(&format!("[{at_ms:>7} ms] {name}"));
                }
                self.phases.push((name.clone(), *at_ms));
            }
            Event::Round { n, total } => self.begin(format!("round {n}"), *total),
            Event::RoundDone { round } => {
                // its own line says more than what was counted
                self.current = None;
                self.line(&format!("{}{}", self.margin(), told(round)));
            }
            Event::Progress { what, done, total } => self.bytes(what, *done, *total),
            Event::Warning { message } => {
                self.line(&format!("warning: {message}"));
                self.warnings.push(message.clone());
            }
            Event::Done { .. } | Event::Failed { .. } => {}
        }
    }

    /// Nothing follows.
    pub fn finish(&mut self, succeeded: bool) {
        if succeeded {
            self.end();
        }
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }

    fn begin(&mut self, name: String, total: Option<u64>) {
        self.end();
        match &mut self.display {
            Display::Silent => {}
            Display::Plain { next } => *next = Instant::now() + PLAIN_EVERY,
            Display::Bar(bar) => {
                bar.unset_length();
                bar.set_position(0);
                bar.set_style(style("{spinner} {msg}"));
                bar.set_message(name.clone());
            }
        }
        let amount =
            total.map(|total| Amount { what: "memory".into(), first: 0, done: 0, total: Some(total) });
        self.current = Some(Current { name, began: Instant::now(), amount });
    }

    /// What ended leaves its line on the terminal.
    fn end(&mut self) {
        let Some(current) = self.current.take() else { return };
        if let Display::Bar(bar) = &self.display {
            let ms = current.began.elapsed().as_secs_f64() * 1000.0;
            let done = current.amount.map_or(0, |a| a.done);
            let done = if done == 0 { String::new() } else { units::bytes(done) };
            bar.println(format!("{:<12} {:>10}  {done}", current.name, units::ms(ms)).trim_end());
        }
    }

    fn bytes(&mut self, what: &str, done: u64, total: Option<u64>) {
        let Some(current) = &mut self.current else { return };
        let first = match &current.amount {
            Some(a) if a.what == what && a.first <= done => a.first,
            // what only grows from the start of the migration on has no rate until the second time
            _ if total.is_none() => done,
            _ => 0,
        };
        let total = total.or_else(|| current.amount.as_ref().and_then(|a| a.total)).filter(|t| *t >= done);
        let amount = Amount { what: what.into(), first, done, total };
        let text = amount.text(current.began.elapsed());
        current.amount = Some(amount);
        match &mut self.display {
            Display::Silent => {}
            Display::Plain { next } => {
                if total == Some(done) || Instant::now() >= *next {
                    let line = format!("             {}: {text}", current.name);
                    *next = Instant::now() + PLAIN_EVERY;
                    self.line(&line);
                }
            }
            Display::Bar(bar) => {
                match total {
                    Some(total) => {
                        bar.set_style(style("{spinner} {prefix:<12} {bar:30} {percent:>3}% {msg}"));
                        bar.set_length(total);
                    }
                    None => bar.set_style(style("{spinner} {prefix:<12} {msg}")),
                }
                bar.set_position(done);
                bar.set_prefix(current.name.clone());
                bar.set_message(text);
            }
        }
    }

    /// Plain lines stand below the phases' times.
    fn margin(&self) -> &'static str {
        if let Display::Plain { .. } = self.display { "             " } else { "" }
    }

    fn line(&self, text: &str) {
        match &self.display {
            Display::Silent => {}
            Display::Plain { .. } => drop(writeln!(std::io::stderr(), "{text}")),
            Display::Bar(bar) => bar.println(text),
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a mistake in one costs looks, not the migration.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

impl Amount {
    /// `memory 500.0 MB of 1.0 GB, 250.0 MB/s, 2 s left`; `took` is how long it has been under way.
    fn text(&self, took: Duration) -> String {
        let mut text = format!("{} {}", self.what, units::bytes(self.done));
        if let Some(total) = self.total {
            text.push_str(&format!(" of {}", units::bytes(total)));
        }
        let came = self.done - self.first;
        // the first moments say nothing about the rate
        let rate = units::per_second(came, took.as_secs_f64() * 1000.0)
            .filter(|rate| *rate > 0 && took >= Duration::from_millis(200));
        if let Some(rate) = rate {
            text.push_str(&format!(", {}/s", units::bytes(rate)));
            if let Some(left) = self.total.map(|t| t - self.done).filter(|left| *left > 0) {
                text.push_str(&format!(", {} left", seconds(left.div_ceil(rate))));
            }
        }
        text
    }
}

/// `7 s`, `3 min 20 s`.
fn seconds(s: u64) -> String {
    if s < 60 { format!("{s} s") } else { format!("{} min {} s", s / 60, s % 60) }
}

/// A round in one line.
fn told(round: &Round) -> String {
    let rate = units::per_second(round.wire_bytes, round.ms)
        .map_or(String::new(), |r| format!(" at {}/s", units::bytes(r)));
    let files = match round.layer_bytes + round.tmpfs_bytes {
        0 => String::new(),
        n => format!(" and {} of files", units::bytes(n)),
    };
    format!(
        "{:<12} {:>10}  {}{files}{rate}, {} written again",
        format!("round {}", round.n),
        units::ms(round.ms),
        units::bytes(round.bytes),
        units::bytes(round.dirty_after_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(first: u64, done: u64, total: Option<u64>) -> Amount {
        Amount { what: "memory".into(), first, done, total }
    }

    #[test]
    fn amounts_with_and_without_a_total() {
        let second = Duration::from_secs(1);
        assert_eq!(
            amount(0, 500_000_000, Some(1_000_000_000)).text(2 * second),
            "memory 500.0 MB of 1.0 GB, 250.0 MB/s, 2 s left"
        );
        assert_eq!(amount(0, 5, None).text(second), "memory 5 B, 5 B/s");
        // nothing came yet, it is complete, it has just begun
        assert_eq!(amount(0, 0, Some(0)).text(second), "memory 0 B of 0 B");
        assert_eq!(amount(0, 10, Some(10)).text(second), "memory 10 B of 10 B, 10 B/s");
        assert_eq!(amount(0, 10, Some(20)).text(second / 10), "memory 10 B of 20 B");
        // only what came since counts
        assert_eq!(amount(700, 1000, None).text(second), "memory 1.0 kB, 300 B/s");
        assert_eq!(seconds(200), "3 min 20 s");
    }

    #[test]
    fn phases_and_warnings_are_remembered_also_when_silent() {
        let mut progress = Progress::new(true);
        progress.event(&Event::Phase { name: "freeze".into(), at_ms: 7 });
        progress.event(&Event::Progress { what: "memory".into(), done: 1, total: None });
        progress.event(&Event::Warning { message: "w".into() });
        progress.finish(true);
        assert_eq!(progress.phases, [("freeze".to_string(), 7)]);
        assert_eq!(progress.warnings, ["w"]);
    }

    #[test]
    fn a_round_counts_for_itself_against_its_total() {
        let mut progress = Progress::new(true);
        let memory = |done, total| Event::Progress { what: "memory".into(), done, total };
        let seen = |p: &Progress| p.current.as_ref().and_then(|c| c.amount.clone()).unwrap();
        progress.event(&Event::Phase { name: "pre-copy".into(), at_ms: 0 });
        progress.event(&memory(4096, None));
        assert_eq!(seen(&progress), amount(4096, 4096, None));
        progress.event(&Event::Round { n: 1, total: Some(1000) });
        assert_eq!(seen(&progress), amount(0, 0, Some(1000)));
        progress.event(&memory(300, None));
        assert_eq!(seen(&progress), amount(0, 300, Some(1000)));
        // more than was announced: no bar beyond its end
        progress.event(&memory(1500, None));
        assert_eq!(seen(&progress).total, None);
        progress.event(&Event::RoundDone { round: Round { n: 1, ..Round::default() } });
        assert!(progress.current.is_none());
        progress.event(&memory(1, None)); // late: of nothing
        progress.event(&Event::Round { n: 2, total: None });
        progress.event(&memory(200, Some(900)));
        assert_eq!(seen(&progress), amount(0, 200, Some(900)));
        assert_eq!(progress.phases.len(), 1);
    }

    #[test]
    fn a_round_in_one_line() {
        let round = Round {
            n: 3,
            ms: 500.0,
            bytes: 268_435_456,
            wire_bytes: 100_000_000,
            dirty_after_bytes: 20_000_000,
            layer_bytes: 1_400_000,
            tmpfs_bytes: 100_000,
            ..Round::default()
        };
        assert_eq!(
            told(&round),
            "round 3        500.0 ms  268.4 MB and 1.5 MB of files at 200.0 MB/s, 20.0 MB written again"
        );
    }
}
