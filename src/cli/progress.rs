//! Phases and bytes while the agent works, on stderr: a moving line on a terminal, plain lines elsewhere, nothing with `--json`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units;
use crate::agent::api::Event;

/// How often a plain line about the same thing is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(1);

/// Shows events as they come, and remembers when phases began.
#[derive(Debug)]
pub struct Progress {
    display: Display,
    /// Phases as they began: name and milliseconds since the request.
    pub phases: Vec<(String, u64)>,
    /// Warnings in the order they came.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
enum Display {
    Silent,
    Plain { next: Instant },
    Bar { bar: ProgressBar, began: Instant },
}

impl Progress {
    /// As the streams allow.
    pub fn new(json: bool) -> Self {
        let display = if json {
            Display::Silent
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(120));
            Display::Bar { bar, began: Instant::now() }
        } else {
            Display::Plain { next: Instant::now() }
        };
        Self { display, phases: Vec::new(), warnings: Vec::new() }
    }

    /// Takes one event in.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Phase { name, at_ms } => self.phase(name, *at_ms),
            Event::Progress { what, done, total } => self.bytes(what, *done, *total),
            Event::Warning { message } => {
                self.line(&format!("warning: {message}"));
                self.warnings.push(message.clone());
            }
            Event::Round { .. } | Event::RoundDone { .. } => {}
            Event::Done { .. } | Event::Failed { .. } => {}
        }
    }

    /// Nothing follows.
    pub fn finish(&mut self, succeeded: bool) {
        if succeeded {
            self.close_phase();
        }
        if let Display::Bar { bar, .. } = &self.display {
            bar.finish_and_clear();
        }
    }

    fn phase(&mut self, name: &str, at_ms: u64) {
        self.close_phase();
        match &mut self.display {
            Display::Silent => {}
            Display::Plain { next } => {
                let _ = writeln!(std::io::stderr(), "[{at_ms:>7} ms] {name}");
                *next = Instant::now() + PLAIN_EVERY;
            }
            Display::Bar { bar, began } => {
                *began = Instant::now();
                bar.unset_length();
                bar.set_position(0);
                bar.set_style(style("{spinner} {msg}"));
                bar.set_message(name.to_string());
            }
        }
        self.phases.push((name.to_string(), at_ms));
    }

    /// A phase that ended leaves its line on the terminal.
    fn close_phase(&mut self) {
        if let (Display::Bar { bar, began }, Some((name, _))) = (&self.display, self.phases.last()) {
            let done = match bar.position() {
                0 => String::new(),
                n => units::bytes(n),
            };
            let ms = began.elapsed().as_secs_f64() * 1000.0;
            bar.println(format!("{name:<12} {:>10}  {done}", units::ms(ms)).trim_end());
        }
    }

    fn bytes(&mut self, what: &str, done: u64, total: Option<u64>) {
        match &mut self.display {
            Display::Silent => {}
            Display::Plain { next } => {
                let complete = total == Some(done);
                if complete || Instant::now() >= *next {
                    let _ = writeln!(std::io::stderr(), "             {}", amount(what, done, total));
                    *next = Instant::now() + PLAIN_EVERY;
                }
            }
            Display::Bar { bar, .. } => {
                match total {
                    Some(total) => {
                        bar.set_style(style(
                            "{spinner} {msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
                        ));
                        bar.set_length(total);
                    }
                    None => bar.set_style(style("{spinner} {msg} {bytes} {bytes_per_sec}")),
                }
                bar.set_position(done);
                let phase = self.phases.last().map_or("", |p| p.0.as_str());
                bar.set_message(format!("{phase}: {what}"));
            }
        }
    }

    fn line(&self, text: &str) {
        match &self.display {
            Display::Silent => {}
            Display::Plain { .. } => drop(writeln!(std::io::stderr(), "{text}")),
            Display::Bar { bar, .. } => bar.println(text),
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a mistake in one costs looks, not the migration.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn amount(what: &str, done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) if total > 0 => {
            let percent = done as f64 / total as f64 * 100.0;
            format!("{what}: {} of {} ({percent:.0}%)", units::bytes(done), units::bytes(total))
        }
        _ => format!("{what}: {}", units::bytes(done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_with_and_without_a_total() {
        assert_eq!(amount("memory", 500, Some(1000)), "memory: 500 B of 1.0 kB (50%)");
        assert_eq!(amount("layer", 5, None), "layer: 5 B");
        assert_eq!(amount("blobs", 0, Some(0)), "blobs: 0 B");
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
}
