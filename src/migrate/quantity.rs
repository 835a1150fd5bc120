//! Durations and rates as people write them: `300ms`, `1.5s`, `100MB/s`, `1Gbit/s`. Pure; used by the command line and the
//! agent's configuration alike. How quantities are shown is the command line's business.

/// What no limit is called, where a rate is expected.
pub const UNLIMITED: &str = "unlimited";

/// Milliseconds of `300ms`, `1.5s`, `2m`. A plain number is refused: nobody remembers which unit it would have.
///
/// # Errors
/// A sentence that says what was expected.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    let (value, unit) =
        split(text).ok_or_else(|| format!("{text:?} is no duration; write 300ms, 1.5s or 2m"))?;
    let factor = match unit {
        "ms" => 1.0,
        "s" => 1e3,
        "m" | "min" => 60e3,
        "" => return Err(format!("{text:?} has no unit; write {text}ms or {text}s")),
        _ => return Err(format!("{unit:?} is no unit of time; write ms, s or m")),
    };
    whole(value * factor).ok_or_else(|| format!("{text:?} is too long"))
}

/// Bytes in a second of `100MB/s`, `12.5MiB/s`, `1Gbit/s`; `None` for `unlimited`. `k`, `M`, `G` are powers of 1000, `Ki`,
/// `Mi`, `Gi` of 1024; `/s` may be left out.
///
/// # Errors
/// A sentence that says what was expected. A rate of nothing is one: the move would never end.
pub fn rate(text: &str) -> Result<Option<u64>, String> {
    if text.trim().eq_ignore_ascii_case(UNLIMITED) {
        return Ok(None);
    }
    let expected = "write 100MB/s, 12MiB/s, 1Gbit/s or unlimited";
    let (value, unit) = split(text).ok_or_else(|| format!("{text:?} is no rate; {expected}"))?;
    let amount = unit.strip_suffix("/s").unwrap_or(unit);
    let (scale, bits) = match amount.strip_suffix("bit") {
        Some(scale) => (scale, true),
        None => match amount.strip_suffix('B') {
            Some(scale) => (scale, false),
            None if amount.is_empty() => return Err(format!("{text:?} has no unit; {expected}")),
            None => return Err(format!("{unit:?} is no unit of a rate; {expected}")),
        },
    };
    let factor = match scale {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("{unit:?} is no unit of a rate; {expected}")),
    };
    let bytes = value * factor / if bits { 8.0 } else { 1.0 };
    match whole(bytes) {
        None => Err(format!("{text:?} is too fast to be meant; {expected}")),
        Some(0) => {
            Err(format!("{text:?} is less than a byte in a second: nothing would ever arrive; {expected}"))
        }
        Some(bytes) => Ok(Some(bytes)),
    }
}

/// A number without sign or exponent, and the unit behind it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let value = number.parse::<f64>().ok().filter(|v| v.is_finite())?;
    Some((value, unit.trim_start()))
}

fn whole(value: f64) -> Option<u64> {
    let value = value.round();
    // beyond this a f64 no longer holds every whole number
    (value < 9e15).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in
            [("300ms", 300), ("1.5s", 1500), ("2m", 120_000), (" 0 ms ", 0), ("0.4ms", 0), (".5s", 500)]
        {
            assert_eq!(duration_ms(text), Ok(ms), "{text}");
        }
        for (text, word) in [
            ("300", "300ms"),
            ("", "no duration"),
            ("ms", "no duration"),
            ("-1s", "no duration"),
            ("1h", "\"h\""),
            ("1.2.3s", "no duration"),
            ("99999999999999999999s", "too long"),
        ] {
            let error = duration_ms(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn rates() {
        for (text, bytes) in [
            ("100MB/s", 100_000_000),
            ("1Gbit/s", 125_000_000),
            ("1 Gbit", 125_000_000),
            ("12.5MiB/s", 13_107_200),
            ("500kB/s", 500_000),
            ("1B/s", 1),
        ] {
            assert_eq!(rate(text), Ok(Some(bytes)), "{text}");
        }
        assert_eq!(rate("unlimited"), Ok(None));
        for (text, word) in [
            ("100", "no unit"),
            ("0MB/s", "nothing would ever arrive"),
            ("1bit/s", "nothing would ever arrive"),
            ("fast", "no rate"),
            ("1XB/s", "\"XB/s\""),
            ("1M", "no unit of a rate"),
            ("100Mbps", "no unit of a rate"),
            ("-5MB/s", "no rate"),
            ("999999999TB/s", "too fast"),
        ] {
            let error = rate(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
