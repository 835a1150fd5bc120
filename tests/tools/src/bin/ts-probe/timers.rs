//! Timers of every kind, each to go off every 20 ms: an interval timer (SIGALRM), a POSIX timer (SIGRTMIN) and a timerfd. One that
//! no longer goes off is wrong.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use transship_testtools::args::Args;

use crate::say;

const PERIOD_NS: libc::c_long = 20_000_000;

static TICKS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

extern "C" fn on_alarm(_: libc::c_int) {
    TICKS[0].fetch_add(1, Relaxed);
}

extern "C" fn on_timer(_: libc::c_int) {
    TICKS[1].fetch_add(1, Relaxed);
}

fn check(result: i32, what: &str) -> Result<i32, String> {
    if result < 0 { Err(format!("{what}: {}", std::io::Error::last_os_error())) } else { Ok(result) }
}

fn start() -> Result<i32, String> {
    let period = libc::timespec { tv_sec: 0, tv_nsec: PERIOD_NS };
    let every = libc::itimerspec { it_interval: period, it_value: period };
    let micros = libc::timeval { tv_sec: 0, tv_usec: PERIOD_NS / 1000 };
    let interval = libc::itimerval { it_interval: micros, it_value: micros };
    // SAFETY: all structures are valid and outlive the calls; the handlers only touch atomics.
    unsafe {
        for (signal, handler) in
            [(libc::SIGALRM, on_alarm as extern "C" fn(i32)), (libc::SIGRTMIN(), on_timer)]
        {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            check(libc::sigaction(signal, &action, std::ptr::null_mut()), "sigaction")?;
        }
        check(
            libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const interval, 0) as i32,
            "setitimer",
        )?;
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGRTMIN();
        let mut timer: libc::timer_t = std::mem::zeroed();
        check(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), "timer_create")?;
        check(libc::timer_settime(timer, 0, &every, std::ptr::null_mut()), "timer_settime")?;
        let fd = check(libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK), "timerfd_create")?;
        check(libc::timerfd_settime(fd, 0, &every, std::ptr::null_mut()), "timerfd_settime")?;
        Ok(fd)
    }
}

pub fn run(args: &Args) -> Result<(), String> {
    let fd = start()?;
    let (mut wrong, mut before) = ([0; 3], [0; 2]);
    say::rounds("timers", args, |n| {
        let now = [TICKS[0].load(Relaxed), TICKS[1].load(Relaxed)];
        let mut expirations = 0u64;
        // SAFETY: a timerfd gives 8 bytes, and there is room for them.
        let read = unsafe { libc::read(fd, (&raw mut expirations).cast(), 8) };
        let silent = [now[0] == before[0], now[1] == before[1], read != 8];
        for (wrong, silent) in wrong.iter_mut().zip(silent) {
            *wrong += u64::from(silent && n > 1);
        }
        before = now;
        let [alarm, timer, timerfd] = wrong;
        Ok(format!("wrong={} alarm={alarm} timer={timer} timerfd={timerfd}", alarm + timer + timerfd))
    })
}
