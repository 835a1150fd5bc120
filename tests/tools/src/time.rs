//! Clocks: the wall clock as seconds since 1970, so that events of different programs on one machine can be laid side by side.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// CLOCK_REALTIME in seconds.
pub fn realtime() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Milliseconds with microseconds behind the point.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
