//! The bandwidth limit: a token bucket. Pure: time is an argument, waiting the caller's business.

use std::time::{Duration, Instant};

/// What may be sent at once after a pause, as a time at the full rate.
const BURST: Duration = Duration::from_millis(50);

/// Allows so many bytes a second, evenly.
#[derive(Clone, Debug)]
pub struct Limiter {
    /// Bytes per second; none: no limit.
    rate: Option<f64>,
    /// Bytes that may be sent now; below zero: a debt.
    tokens: f64,
    last: Option<Instant>,
}

impl Limiter {
    /// No more than `rate` bytes a second; 0: no limit.
    pub fn new(rate: u64) -> Limiter {
        let rate = (rate > 0).then_some(rate as f64);
        Limiter { rate, tokens: rate.unwrap_or(0.0) * BURST.as_secs_f64(), last: None }
    }

    /// No limit.
    pub fn unlimited() -> Limiter {
        Limiter::new(0)
    }

    /// Bytes per second, if there is a limit.
    pub fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// `bytes` are sent: how long to wait (before them or after, always the same) to keep to the rate. They may be more
    /// than a burst: the debt is waited for.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let since = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(self.last.map_or(now, |last| last.max(now)));
        let full = rate * BURST.as_secs_f64();
        self.tokens = (self.tokens + since.as_secs_f64() * rate).min(full) - bytes as f64;
        match self.tokens < 0.0 {
            true => Duration::try_from_secs_f64(-self.tokens / rate).unwrap_or(Duration::MAX),
            false => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes sent in `seconds` by somebody who sends pieces as fast as allowed.
    fn sent(limiter: &mut Limiter, piece: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let (mut now, mut total) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            now += limiter.take(piece, now) + Duration::from_micros(1);
            total += piece;
        }
        total
    }

    #[test]
    fn the_rate_is_kept_for_small_and_large_pieces() {
        for piece in [100, 4096, 1 << 20, 50 << 20] {
            let total = sent(&mut Limiter::new(10_000_000), piece, 20) as f64;
            let most = 200e6 + 0.5e6 + 2.0 * piece as f64;
            assert!(total <= most && total >= 190e6, "{piece}: {total}");
        }
    }

    #[test]
    fn a_pause_earns_one_burst_and_no_more() {
        let mut limiter = Limiter::new(1_000_000);
        let now = Instant::now();
        assert_eq!(limiter.take(50_000, now), Duration::ZERO);
        let later = now + Duration::from_secs(3600);
        assert_eq!(limiter.take(50_000, later), Duration::ZERO);
        assert_eq!(limiter.take(10_000, later).as_millis(), 10);
        // a clock that went backwards earns nothing
        assert!(limiter.take(10_000, now).as_millis() >= 20);
    }

    #[test]
    fn no_limit_never_waits() {
        assert_eq!(Limiter::unlimited().take(u64::MAX, Instant::now()), Duration::ZERO);
        assert!(Limiter::new(1).take(u64::MAX, Instant::now()) > Duration::from_secs(1));
    }
}
