//! A histogram of durations in a fixed, small memory: 32 buckets for each power of two of nanoseconds, so that a percentile is
//! right within 3 %. It never allocates after it was made: a workload that measures itself must not grow by that.

use std::time::Duration;

const SUB: u32 = 5;

/// See the module.
pub struct Latency {
    counts: Vec<u32>,
    total: u64,
    max: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: vec![0; (64 << SUB) as usize], total: 0, max: 0 }
    }
}

fn bucket(ns: u64) -> usize {
    let ns = ns.max(1 << SUB);
    let exponent = ns.ilog2() - SUB;
    // the leading one is dropped, the SUB bits behind it choose the bucket
    ((exponent << SUB) as u64 + (ns >> exponent) - (1 << SUB)) as usize
}

/// The largest value of a bucket.
fn top(bucket: usize) -> u64 {
    let (exponent, rest) = (bucket as u64 >> SUB, bucket as u64 & ((1 << SUB) - 1));
    // the last bucket ends where u64 does
    u64::try_from((u128::from((1 << SUB) + rest + 1) << exponent) - 1).unwrap_or(u64::MAX)
}

impl Latency {
    /// Counts one duration.
    pub fn add(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.total, self.max) = (0, 0);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The longest, exactly.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The duration that `fraction` (0 to 1) of all do not exceed; zero when none was counted.
    pub fn percentile(&self, fraction: f64) -> Duration {
        let wanted = ((self.total as f64 * fraction).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += u64::from(*n);
            if seen >= wanted {
                return Duration::from_nanos(top(i).min(self.max));
            }
        }
        Duration::ZERO
    }

    /// As JSON: count, and p50, p99 and the longest in milliseconds.
    pub fn json(&self) -> serde_json::Value {
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        serde_json::json!({
            "count": self.total, "p50_ms": ms(self.percentile(0.5)), "p99_ms": ms(self.percentile(0.99)), "max_ms": ms(self.max()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_within_3_percent() {
        let mut latency = Latency::default();
        assert_eq!(latency.percentile(0.99), Duration::ZERO);
        for us in 1..=1000u64 {
            latency.add(Duration::from_micros(us));
        }
        for (fraction, us) in [(0.5, 500.0), (0.99, 990.0), (0.01, 10.0)] {
            let got = latency.percentile(fraction).as_secs_f64() * 1e6;
            assert!((got / us - 1.0).abs() < 0.035, "{fraction}: {got} instead of {us}");
        }
        assert_eq!((latency.count(), latency.max()), (1000, Duration::from_micros(1000)));
        assert_eq!(latency.percentile(1.0), Duration::from_micros(1000));
    }

    #[test]
    fn any_duration_has_a_bucket() {
        let mut latency = Latency::default();
        for ns in [0, 1, 31, 32, 33, 63, 64, u64::MAX] {
            latency.add(Duration::from_nanos(ns));
            assert!(top(bucket(ns)) >= ns || ns == u64::MAX);
        }
        latency.clear();
        assert_eq!((latency.count(), latency.max()), (0, Duration::ZERO));
    }
}
