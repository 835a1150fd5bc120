//! Bytes and milliseconds in words.

/// `512 B`, `1.5 MB`, `2.0 GB`: powers of ten.
pub fn bytes(n: u64) -> String {
    let (mut value, mut unit) = (n as f64, "B");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 999.95 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

/// `12.3 ms`, `4.56 s`.
pub fn ms(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

/// Bytes in a second; `None` when no time passed.
pub fn per_second(bytes: u64, ms: f64) -> Option<u64> {
    (ms > 0.0).then(|| (bytes as f64 / ms * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_into_the_next_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1500), "1.5 kB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(268_435_456), "268.4 MB");
        assert_eq!(bytes(u64::MAX), "18446744.1 TB");
    }

    #[test]
    fn times_and_rates() {
        assert_eq!(ms(12.34), "12.3 ms");
        assert_eq!(ms(4560.0), "4.56 s");
        assert_eq!(per_second(1000, 500.0), Some(2000));
        assert_eq!(per_second(1000, 0.0), None);
    }
}
