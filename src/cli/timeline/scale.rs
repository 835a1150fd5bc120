//! From milliseconds and bytes to places in the picture, and round numbers for the axes. Pure.

/// A part of the picture's width that shows a span of time.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// Left end, where 0 ms is.
    pub left: f64,
    /// Right end.
    pub right: f64,
    /// Milliseconds at the right end; more than 0.
    pub span: f64,
}

impl Time {
    /// A scale; a span that is no positive number becomes 1 ms.
    pub fn new(left: f64, right: f64, span: f64) -> Time {
        Time { left, right, span: if span.is_finite() && span > 0.0 { span } else { 1.0 } }
    }

    /// Where a moment is; what lies outside is at the nearer end.
    pub fn x(&self, ms: f64) -> f64 {
        let share = (ms / self.span).clamp(0.0, 1.0);
        // a NaN stays one through clamp
        self.left + if share.is_nan() { 0.0 } else { share } * (self.right - self.left)
    }

    /// Left end and width of a bar; at least a hairline, so that what took place is seen.
    pub fn bar(&self, start_ms: f64, ms: f64) -> (f64, f64) {
        const HAIR: f64 = 1.0;
        let (from, to) = (self.x(start_ms), self.x(start_ms + ms.max(0.0)));
        let width = (to - from).max(HAIR);
        (from.min(self.right - width), width)
    }

    /// Round numbers of milliseconds along the span.
    pub fn ticks(&self, about: usize) -> Vec<f64> {
        let step = round_step(self.span / about.max(1) as f64);
        let count = (self.span / step + 1e-9).floor() as usize;
        (0..=count.min(1000)).map(|n| n as f64 * step).collect()
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|s| *s >= least * 0.999).unwrap_or(power * 10.0)
}

/// A part of the picture's height that shows bytes, each power of ten as high as the next: a first round of gigabytes and a last
/// one of megabytes are both to be read.
#[derive(Clone, Copy, Debug)]
pub struct Bytes {
    /// Where the greatest number is.
    pub top: f64,
    /// Where nothing is.
    pub bottom: f64,
    low: f64,
    high: f64,
}

impl Bytes {
    /// A scale for these numbers.
    pub fn new(top: f64, bottom: f64, values: impl Iterator<Item = u64> + Clone) -> Bytes {
        let most = values.clone().max().unwrap_or(0).max(10) as f64;
        let least = values.filter(|v| *v > 0).min().unwrap_or(1) as f64;
        // never more than about six powers: a few bytes at the end would push everything else together
        let low = least.log10().floor().max(most.log10().ceil() - 6.0);
        Bytes { top, bottom, low, high: most.log10().max(low + 1.0) }
    }

    /// Where a number is.
    pub fn y(&self, bytes: u64) -> f64 {
        let share = ((bytes.max(1) as f64).log10() - self.low) / (self.high - self.low);
        self.bottom - share.clamp(0.0, 1.0) * (self.bottom - self.top)
    }

    /// The powers of ten in it.
    pub fn ticks(&self) -> Vec<u64> {
        (self.low as u32..=self.high as u32).filter_map(|n| 10u64.checked_pow(n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_proportional_and_never_outside() {
        let time = Time::new(100.0, 1100.0, 2000.0);
        assert_eq!(time.bar(500.0, 1000.0), (350.0, 500.0));
        assert_eq!(time.bar(0.0, 0.0), (100.0, 1.0));
        for (start, ms) in
            [(-50.0, 10.0), (1999.9, 5000.0), (2000.0, 0.0), (9e300, 1.0), (f64::NAN, 1.0), (1.0, -9.0)]
        {
            let (x, width) = time.bar(start, ms);
            assert!(x >= 100.0 && x + width <= 1100.0 && width >= 1.0, "{start} {ms}: {x} {width}");
        }
        assert_eq!(Time::new(0.0, 1.0, f64::NAN).span, 1.0);
    }

    #[test]
    fn ticks_are_round_and_within_the_span() {
        assert_eq!(Time::new(0.0, 1.0, 68.0).ticks(7), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
        assert_eq!(Time::new(0.0, 1.0, 0.9).ticks(2), [0.0, 0.5]);
        for span in [1e-6, 3.3, 1000.0, 4.2e7] {
            let ticks = Time::new(0.0, 1.0, span).ticks(8);
            assert!((4..=9).contains(&ticks.len()), "{span}: {ticks:?}");
            assert!(*ticks.last().unwrap() <= span * 1.001);
        }
    }

    #[test]
    fn bytes_over_many_powers_of_ten() {
        let bytes = Bytes::new(0.0, 120.0, [1_000_000_000u64, 1_000_000].into_iter());
        assert_eq!((bytes.y(1_000_000_000), bytes.y(1_000_000), bytes.y(0)), (0.0, 120.0, 120.0));
        assert_eq!(bytes.ticks(), [1_000_000, 10_000_000, 100_000_000, 1_000_000_000]);
        let nothing = Bytes::new(0.0, 120.0, std::iter::empty());
        assert!(nothing.y(0) <= 120.0 && nothing.y(u64::MAX) >= 0.0);
        assert!(Bytes::new(0.0, 1.0, [1, u64::MAX].into_iter()).ticks().len() <= 7);
    }
}
