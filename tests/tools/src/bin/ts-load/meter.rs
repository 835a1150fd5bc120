//! What a workload sees of its own interruption: the longest stall, the pace in slices of 100 ms, how much of them it ran its own
//! code, and how long single steps took.
//!
//! A stall is the time between two looks at the clock. It must be the wall clock: CRIU restores a container into a time namespace
//! in which the monotonic clocks (CLOCK_BOOTTIME among them) go on from where they were dumped, and a process sees little of its own
//! absence by those. The latency "after" is that of the 5 seconds behind the longest stall: what is slow because memory is still being brought.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::{Value, json};
use transship_testtools::{latency::Latency, time};

/// How long after the longest stall steps count as "after" it.
const AFTER: Duration = Duration::from_secs(5);
const SLICE: Duration = Duration::from_millis(100);
/// Slices kept: ten minutes.
const SLICES: usize = 6000;
/// Stalls longer than this are listed.
const LISTED: Duration = Duration::from_millis(5);
const STALLS: usize = 1000;

/// CLOCK_REALTIME.
pub fn clock() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// The processor time that this process has spent in its own code. A restored process begins at 0 again.
fn user_time() -> Duration {
    // SAFETY: all zeros are a rusage, and getrusage(2) writes one there.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    Duration::from_secs(usage.ru_utime.tv_sec as u64) + Duration::from_micros(usage.ru_utime.tv_usec as u64)
}

struct Slice {
    /// The wall clock at its end.
    end: f64,
    steps: u64,
    busy: Duration,
    user: Duration,
}

struct Stall {
    end: f64,
    length: Duration,
}

pub struct Meter {
    last: Duration,
    slice_end: Duration,
    steps: u64,
    busy: Duration,
    /// At the begin of the slice.
    user: Duration,
    slices: VecDeque<Slice>,
    longest: Option<Stall>,
    longest_end: Duration,
    stalls: VecDeque<Stall>,
    all: Latency,
    after: Latency,
    total_steps: u64,
    since: f64,
}

impl Meter {
    pub fn new(now: Duration) -> Self {
        Self {
            last: now,
            slice_end: now + SLICE,
            steps: 0,
            busy: Duration::ZERO,
            user: user_time(),
            slices: VecDeque::with_capacity(SLICES + 1),
            longest: None,
            longest_end: now,
            stalls: VecDeque::with_capacity(STALLS + 1),
            all: Latency::default(),
            after: Latency::default(),
            total_steps: 0,
            since: time::realtime(),
        }
    }

    /// Measures anew from `now` on; the pace of before stays known.
    pub fn reset(&mut self, now: Duration) {
        self.longest = None;
        self.longest_end = now;
        self.stalls.clear();
        self.all.clear();
        self.after.clear();
        self.since = time::realtime();
        self.skip(now);
    }

    /// What happened since the last look was our own doing (a check of all memory, say) and no stall.
    pub fn skip(&mut self, now: Duration) {
        self.last = now;
        (self.steps, self.busy, self.user) = (0, Duration::ZERO, user_time());
        self.slice_end = now + SLICE;
    }

    /// The process looks at the clock.
    pub fn look(&mut self, now: Duration) {
        let length = now.saturating_sub(self.last);
        self.last = now;
        if length > LISTED || self.longest.as_ref().is_none_or(|l| length > l.length) {
            let end = time::realtime();
            if length > LISTED {
                self.stalls.push_back(Stall { end, length });
                if self.stalls.len() > STALLS {
                    self.stalls.pop_front();
                }
            }
            if self.longest.as_ref().is_none_or(|l| length > l.length) {
                self.longest = Some(Stall { end, length });
                self.longest_end = now;
                self.after.clear();
            }
        }
        if now >= self.slice_end {
            let user = user_time().saturating_sub(self.user);
            self.slices.push_back(Slice { end: time::realtime(), steps: self.steps, busy: self.busy, user });
            if self.slices.len() > SLICES {
                self.slices.pop_front();
            }
            self.skip(now);
        }
    }

    /// A step of the work from `begin` to `end`; `end` is a look at the clock, too.
    #[inline]
    pub fn step(&mut self, begin: Duration, end: Duration) {
        let length = end.saturating_sub(begin);
        self.steps += 1;
        self.total_steps += 1;
        self.busy += length;
        self.look(end);
        self.all.add(length);
        // not the step in which the stall was
        if begin >= self.longest_end && end < self.longest_end + AFTER {
            self.after.add(length);
        }
    }

    pub fn json(&self) -> Value {
        let stall = |s: &Stall| json!({"ms": time::ms(s.length), "realtime_end": s.end});
        let us = |time: Duration| time.as_micros() as u64;
        let slices: Vec<Value> =
            self.slices.iter().map(|s| json!([s.end, s.steps, us(s.busy), us(s.user)])).collect();
        json!({
            "longest": self.longest.as_ref().map(stall),
            "stalls": self.stalls.iter().map(stall).collect::<Vec<_>>(),
            "all": self.all.json(), "after": self.after.json(),
            "steps": self.total_steps, "since": self.since, "slices": slices,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn the_longest_stall_and_the_latency_after_it() {
        let mut meter = Meter::new(MS(0));
        for t in 1..100 {
            meter.step(MS(t), MS(t));
        }
        // a stall of 300 ms between two steps, then one of 50, then 2 ms steps
        meter.step(MS(400), MS(400));
        meter.step(MS(400), MS(450));
        for t in 0..100 {
            meter.step(MS(450 + 2 * t), MS(452 + 2 * t));
        }
        let json = meter.json();
        assert_eq!(json["longest"]["ms"], 301.0);
        assert_eq!(json["stalls"].as_array().map(Vec::len), Some(2));
        assert_eq!(json["after"]["count"], 102);
        assert_eq!(json["after"]["max_ms"], 50.0);
        meter.reset(MS(1000));
        meter.step(MS(1001), MS(1002));
        assert_eq!(meter.json()["longest"]["ms"], 2.0);
    }

    #[test]
    fn slices_know_how_long_their_process_ran() {
        let mut meter = Meter::new(clock());
        let begin = user_time();
        while user_time() < begin + MS(150) {
            meter.step(clock(), clock());
        }
        meter.look(meter.slice_end);
        std::thread::sleep(MS(300));
        meter.look(meter.slice_end);
        let slices = meter.json()["slices"].clone();
        let user: Vec<_> = slices.as_array().unwrap().iter().map(|s| s[3].as_u64().unwrap()).collect();
        let (last, all) = (user[user.len() - 1], user.iter().sum::<u64>());
        // other tests of this process may run meanwhile
        assert!(all >= 150_000 && user.len() > 1 && last < all, "{slices}");
    }

    #[test]
    fn own_doing_is_no_stall_and_old_steps_are_not_after_it() {
        let mut meter = Meter::new(MS(0));
        meter.skip(MS(5000));
        meter.step(MS(5001), MS(5001));
        assert_eq!(meter.json()["longest"]["ms"], 1.0);
        meter.step(MS(5002), MS(5102));
        assert_eq!(meter.json()["longest"]["ms"], 101.0);
        // the step that was stalled is not one of those after it, nor is one more than 5 s later
        assert_eq!(meter.json()["after"]["count"], 0);
        for t in 1..=200 {
            meter.step(MS(5102 + t * 50), MS(5102 + t * 50));
        }
        assert_eq!(meter.json()["after"]["count"], 99);
    }
}
