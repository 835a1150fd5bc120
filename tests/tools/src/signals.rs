//! The two signals the test programs know: TERM (or INT) asks to stop, USR1 ends a pause early.
//! A container's process 1 has no default action for TERM, so a handler is needed for it to stop at all.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static STOPS: AtomicU32 = AtomicU32::new(0);
static WAKES: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_stop(_: libc::c_int) {
    STOPS.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn on_wake(_: libc::c_int) {
    WAKES.fetch_add(1, Ordering::Relaxed);
}

fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) {
    // SAFETY: an all-zero sigaction is valid; the handlers only touch an atomic, which is async-signal-safe.
    // No SA_RESTART: a pause must end when a signal arrives.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

/// Installs the handlers.
pub fn install() {
    handle(libc::SIGTERM, on_stop);
    handle(libc::SIGINT, on_stop);
    handle(libc::SIGUSR1, on_wake);
}

/// How often we have been asked to stop.
pub fn stops() -> u32 {
    STOPS.load(Ordering::Relaxed)
}

/// Sleeps, but no longer than until the next of the two signals. Others do not end it, nor does a sleep that was cut short
/// without any (CRIU does that to every sleep it restores). Time in which the process was frozen hardly counts: what is to
/// happen in a pause gets its time.
pub fn pause(duration: Duration) {
    const STEP: Duration = Duration::from_millis(20);
    let signals = || (STOPS.load(Ordering::Relaxed), WAKES.load(Ordering::Relaxed));
    let (before, mut left) = (signals(), duration);
    while signals() == before && !left.is_zero() {
        let step = left.min(STEP);
        let wait = libc::timespec { tv_sec: 0, tv_nsec: step.as_nanos() as libc::c_long };
        let start = Instant::now();
        // SAFETY: `wait` is a valid timespec, and the remaining time is not asked for.
        unsafe { libc::nanosleep(&wait, std::ptr::null_mut()) };
        left -= start.elapsed().min(step);
    }
}
