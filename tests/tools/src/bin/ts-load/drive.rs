//! Paces the work: so many steps a second in ticks of a millisecond, or as fast as it goes. What a stall left undone is not made
//! up for: the rate after a move is the rate before it.

use std::time::Duration;

use serde_json::{Value, json};
use transship_testtools::signals;

use crate::control::Control;
use crate::meter::{Meter, clock};
use crate::pages::Verdict;

/// Something that works in steps and can be checked.
pub trait Work {
    fn step(&mut self) -> Result<(), String>;
    fn verify(&mut self) -> Result<Verdict, String>;
}

const TICK: Duration = Duration::from_millis(1);
/// Steps that are late by more than this are not made up for.
const DEBT: Duration = Duration::from_millis(20);

/// How many steps are due; pure, so that it can be tested.
struct Pace {
    /// Steps a second; nothing: unlimited.
    rate: Option<f64>,
    begin: Duration,
    done: f64,
}

impl Pace {
    fn due(&mut self, now: Duration) -> u64 {
        let Some(rate) = self.rate else { return u64::MAX };
        let due = now.saturating_sub(self.begin).as_secs_f64() * rate - self.done;
        if due > (DEBT.as_secs_f64() * rate).max(1.0) {
            // start afresh from the last tick
            (self.begin, self.done) = (now.saturating_sub(TICK), 0.0);
            return (TICK.as_secs_f64() * rate).max(1.0) as u64;
        }
        due.max(0.0) as u64
    }
}

fn verdict(result: Result<Verdict, String>) -> Value {
    match result {
        Ok(v) => json!({"pages": v.pages, "wrong": v.wrong, "named": v.named}),
        Err(e) => json!({"wrong": 1, "named": [e]}),
    }
}

/// Works until TERM, `stop`, or for `seconds`; then checks once more and says the result on stdout.
pub fn run(mut work: impl Work, rate: Option<f64>, port: u16, seconds: Option<f64>) -> Result<(), String> {
    let control = Control::open(port)?;
    let begin = clock();
    let mut meter = Meter::new(begin);
    let mut pace = Pace { rate, begin, done: 0.0 };
    let (mut stop, mut now) = (false, begin);
    while !stop && signals::stops() == 0 && seconds.is_none_or(|s| (now - begin).as_secs_f64() < s) {
        let tick_end = now + TICK;
        let due = pace.due(now);
        let mut n = 0;
        while n < due && now < tick_end {
            work.step()?;
            let end = clock();
            meter.step(now, end);
            now = end;
            n += 1;
        }
        pace.done += n as f64;
        if rate.is_some() {
            // short of the tick's end there is nothing to do
            if let Some(rest) = tick_end.checked_sub(clock()) {
                let wait = libc::timespec { tv_sec: 0, tv_nsec: rest.as_nanos() as libc::c_long };
                // SAFETY: `wait` is a valid timespec; the rest of a sleep cut short is not asked for.
                unsafe { libc::nanosleep(&wait, std::ptr::null_mut()) };
            }
            now = clock();
            meter.look(now);
        }
        let asked = control.poll(|command| match command {
            "status" => meter.json(),
            "reset" => {
                meter.reset(clock());
                json!({"ok": true})
            }
            "verify" => verdict(work.verify()),
            "stop" => {
                stop = true;
                json!({"ok": true})
            }
            other => json!({"error": format!("no command {other:?}")}),
        });
        if asked {
            now = clock();
            meter.skip(now);
        }
    }
    let end = verdict(work.verify());
    println!(
        "{}",
        json!({"steps": meter.json()["steps"], "longest": meter.json()["longest"], "verdict": end})
    );
    if end["wrong"] == 0 { Ok(()) } else { Err(format!("memory is wrong: {}", end["named"])) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_stall_is_not_made_up_for() {
        let mut pace = Pace { rate: Some(2500.0), begin: Duration::ZERO, done: 0.0 };
        let mut now = Duration::ZERO;
        let run = |pace: &mut Pace, now: &mut Duration, ticks: u32| {
            let mut steps = 0;
            for _ in 0..ticks {
                *now += TICK;
                let due = pace.due(*now);
                pace.done += due as f64;
                steps += due;
            }
            steps
        };
        assert_eq!(run(&mut pace, &mut now, 1000), 2500);
        now += Duration::from_secs(3);
        let steps = run(&mut pace, &mut now, 1000);
        assert!((2499..=2503).contains(&steps), "{steps}");
    }
}
