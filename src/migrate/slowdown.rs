//! How much the first round may slow the container down: each page that is copied is protected, and costs its writer a fault when it
//! is written again. So a writer of all its memory is slowed down in proportion to how fast that is copied, and the first round, in
//! which all of it is, waits now and then. Later rounds are what a migration converges by, and are not held up.
//! Whether the copying takes the processor away is [`super::background`]'s business.

use std::time::{Duration, Instant};

use crate::memory::tracker;
use crate::procstat::field;

/// What one fault costs the thread that takes it, where that cannot be tried: as measured on a virtual machine (Xeon, mitigations on).
const FAULT: Duration = Duration::from_nanos(1200);
/// In a container it costs more than in the trial, whose 2 MB are in the processor's caches, as are the kernel's records of them: there
/// 0.63 to 0.87 us, in a writer of 1 GiB 1.2 to 1.4 (its slow-down over the pages that were copied in a second, in quiet minutes).
const COLD: f64 = 2.0;
/// Faults may take so much of the processors that the container uses, of one at least.
const SHARE: f64 = 0.1;
/// No more often are its tasks asked for what they did,
const LOOK: Duration = Duration::from_millis(50);
/// and so much of the time (a twentieth) may be spent on that.
const EFFORT: u32 = 20;
/// Waited at once: somebody may want the migration to end, and the peer hears nothing meanwhile.
const AT_ONCE: Duration = Duration::from_millis(100);

/// What a container's tasks have done since they were started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Done {
    faults: u64,
    busy: Duration,
}

impl Done {
    /// Of all these tasks (thread group leaders), of which some may have ended.
    fn of(pids: &[i32]) -> Done {
        let stat = |pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        pids.iter().filter_map(|pid| parse(&stat(pid)?)).fold(Done::default(), |all, one| Done {
            faults: all.faults + one.faults,
            busy: all.busy + one.busy,
        })
    }

    /// Since an earlier look. A task that has ended takes its part along: then it was nothing.
    fn since(self, before: Done) -> Done {
        Done {
            faults: self.faults.saturating_sub(before.faults),
            busy: self.busy.saturating_sub(before.busy),
        }
    }
}

/// proc_pid_stat(5): minflt is field 10, utime and stime are 14 and 15, in ticks of USER_HZ (100 everywhere).
fn parse(stat: &str) -> Option<Done> {
    let ticks = field::<u64>(stat, 14)? + field::<u64>(stat, 15)?;
    Some(Done { faults: field(stat, 10)?, busy: Duration::from_millis(ticks * 10) })
}

/// How long to wait, when in `elapsed` (of which `waited` were waits) tasks that used the processor for `busy` spent `faults` of it on
/// what the copying costs them. Never so long that copying takes more than twice its time.
fn owed(faults: Duration, busy: Duration, elapsed: Duration, waited: Duration) -> Duration {
    let elapsed = elapsed.as_secs_f64();
    let cores = if elapsed > 0.0 { (busy.as_secs_f64() / elapsed).max(1.0) } else { 1.0 };
    let due = faults.as_secs_f64() / (SHARE * cores);
    let most = elapsed - 2.0 * waited.as_secs_f64();
    Duration::from_secs_f64((due - elapsed).min(most).max(0.0))
}

/// Watches the container's tasks while they are copied.
pub(super) struct Slowdown {
    /// Faults a second without our doing.
    usual: f64,
    /// What one costs.
    fault: Duration,
    pids: Vec<i32>,
    begun: Instant,
    before: Done,
    waited: Duration,
    next: Instant,
}

/// What the tasks do before they are copied.
pub(super) struct Usual {
    at: Instant,
    done: Done,
    pids: Vec<i32>,
}

impl Usual {
    /// Begins to watch.
    pub fn watch(pids: Vec<i32>) -> Usual {
        Usual { at: Instant::now(), done: Done::of(&pids), pids }
    }

    /// The copying begins.
    pub fn copying(self) -> Slowdown {
        let fault = tracker::write_fault().map_or(FAULT, |warm| warm.mul_f64(COLD));
        let (before, begun) = (Done::of(&self.pids), Instant::now());
        let usual = before.since(self.done).faults as f64 / (begun - self.at).as_secs_f64().max(1e-3);
        let (waited, next) = (Duration::ZERO, begun + LOOK);
        Slowdown { usual, fault, pids: self.pids, begun, before, waited, next }
    }
}

impl Slowdown {
    /// To be waited now.
    pub fn owed(&mut self) -> Duration {
        let now = Instant::now();
        if now < self.next {
            return Duration::ZERO;
        }
        let done = Done::of(&self.pids).since(self.before);
        let elapsed = now - self.begun;
        let faults = (done.faults as f64 - self.usual * elapsed.as_secs_f64()).max(0.0);
        let wait = owed(self.fault.mul_f64(faults), done.busy, elapsed, self.waited).min(AT_ONCE);
        self.waited += wait;
        self.next = now + wait + LOOK.max(now.elapsed() * EFFORT);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn faults_of_a_tenth_of_the_time_are_free() {
        assert_eq!(owed(MS(100), MS(1000), MS(1000), MS(0)), MS(0));
        assert_eq!(owed(MS(150), MS(1000), MS(1000), MS(0)), MS(500));
        // who uses four is slowed down by a quarter of it; who uses hardly one could use it
        assert_eq!(owed(MS(150), MS(4000), MS(1000), MS(0)), MS(0));
        assert_eq!(owed(MS(150), MS(10), MS(1000), MS(0)), MS(500));
        assert_eq!(owed(MS(0), MS(10), MS(1000), MS(0)), MS(0));
        assert_eq!(owed(MS(5), MS(0), MS(0), MS(0)), MS(0));
    }

    #[test]
    fn the_round_takes_twice_as_long_at_most() {
        assert_eq!(owed(MS(1_000_000), MS(1000), MS(1000), MS(0)), MS(1000));
        assert_eq!(owed(MS(1_000_000), MS(2000), MS(2000), MS(1000)), MS(0));
        assert_eq!(owed(MS(1_000_000), MS(2000), MS(2000), MS(700)), MS(600));
    }

    #[test]
    fn a_line_of_proc() {
        let stat = "75 (a) b) S 1 75 75 0 -1 4194560 1234 99 7 8 21 4 5 6 20 0 1 0 1 2 3";
        assert_eq!(parse(stat), Some(Done { faults: 1234, busy: MS(250) }));
        assert_eq!(parse("75 (a) S 1"), None);
    }

    #[test]
    fn our_own_faults_are_seen() {
        let me = std::process::id() as i32;
        let before = Done::of(&[me, -1]);
        // so much comes from the kernel, and not from what was freed before
        let pages = vec![1u8; 64 << 20];
        assert!(std::hint::black_box(&pages)[4095] == 1);
        let now = Done::of(&[me]);
        // fewer than pages where there are huge ones
        assert!(now.since(before).faults > 0, "{before:?} {now:?}");
        assert_eq!(before.since(now).faults, 0);
        let mut slowdown = Usual::watch(vec![me]).copying();
        assert_eq!(slowdown.owed(), MS(0), "it was asked just now");
    }
}
