//! When to stop copying and freeze: a pure decision after each pre-copy round.
//!
//! Each round sends what the one before it left; while the container writes less than the link takes, rounds become shorter
//! and so does what a freeze would have to send. The budget is a limit, not an aim: what fits it is frozen only when one
//! more round would not make the freeze noticeably shorter. That costs little: rounds that shrink by a third each take, all
//! together, no more than three times the first of them.

use std::time::Duration;

use crate::migrate::tuning::Mode;

/// One round that is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RoundStats {
    /// Bytes of memory that were copied (before compression; zero pages do not count).
    pub bytes: u64,
    /// Pages of it.
    pub pages: u64,
    /// How long it took, from its look at the tracker to the last byte handed to the link.
    pub seconds: f64,
    /// What was written meanwhile, by the look after it: what a freeze now, or the next round, has to copy.
    pub dirty_after_bytes: u64,
}

impl RoundStats {
    /// Stands for "no round yet": what the first look found. With it in front, a memory that is sent in a moment is frozen
    /// without any round.
    pub fn first_look(found_bytes: u64) -> RoundStats {
        RoundStats { dirty_after_bytes: found_bytes, ..RoundStats::default() }
    }

    /// How fast the container writes (each page once), bytes per second.
    pub fn dirty_rate(&self) -> f64 {
        if self.seconds > 0.0 { self.dirty_after_bytes as f64 / self.seconds } else { 0.0 }
    }
}

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Budget {
    /// How long the container may stand still.
    pub max_downtime: Duration,
    /// What a freeze takes without any memory: dump, restore, network.
    pub fixed: Duration,
    /// No more rounds than this.
    pub max_rounds: u32,
    /// Rounds end when they have taken this long together.
    pub max_time: Duration,
    /// What may be left behind.
    pub mode: Mode,
}

impl Budget {
    /// With what a freeze takes on its own, and a limit of half an hour for the rounds.
    pub fn new(max_downtime: Duration, max_rounds: u32, mode: Mode) -> Budget {
        let (fixed, max_time) = (Duration::from_millis(60), Duration::from_secs(1800));
        Budget { max_downtime, fixed, max_rounds, max_time, mode }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// One more round.
    Another,
    /// Freeze, and send the rest before the commit.
    Freeze,
    /// Freeze, and leave the rest for after the commit.
    FreezePostCopy,
}

/// A transfer this short is not worth another round: the fixed part of a freeze is many times longer.
const ENOUGH: f64 = 0.004;
/// A round that leaves more than this part of what the one before it left does not shrink.
const SHRINKS: f64 = 0.7;
/// A round that leaves so much of all that was ever copied at once was for nothing, and so would be the next one. (Where memory is
/// protected as it is read, a writer of all of it finds no time for the last pages: of one that writes each page seven times a
/// round, a seventh.) More than was copied is a container that grows.
const HOPELESS: std::ops::RangeInclusive<f64> = 0.75..=1.1;
/// Assumed while nothing was measured, bytes per second: 1 Gbit/s.
const UNKNOWN_LINK: f64 = 117e6;

/// How long a freeze would have to send `bytes`, in seconds.
fn transfer(bytes: u64, link_rate: Option<f64>) -> f64 {
    bytes as f64 / link_rate.filter(|r| *r > 0.0).unwrap_or(UNKNOWN_LINK)
}

/// Decides after each round (and, with [`RoundStats::first_look`], before the first). `link_rate`: memory bytes per second
/// that reach the peer (after whatever compression gains); none: not known yet.
///
/// Post-copy has no rounds at all: it is for those who want the container to run on the destination now, whatever it writes,
/// with every byte sent once. Who wants most of the memory there first has `auto`, which is that with rounds in front.
pub fn decide(rounds: &[RoundStats], budget: &Budget, link_rate: Option<f64>) -> Decision {
    let post_copy = budget.mode == Mode::PostCopy;
    let Some(last) = rounds.last() else {
        return if post_copy { Decision::FreezePostCopy } else { Decision::Another };
    };
    let rest = transfer(last.dirty_after_bytes, link_rate);
    if rest <= ENOUGH {
        // also in post-copy: leaving this behind would cost more than it saves
        return Decision::Freeze;
    }
    if post_copy {
        return Decision::FreezePostCopy;
    }
    let fits = rest + budget.fixed.as_secs_f64() <= budget.max_downtime.as_secs_f64();
    let rest_goes =
        if fits || budget.mode == Mode::PreCopy { Decision::Freeze } else { Decision::FreezePostCopy };
    let made = rounds.iter().filter(|r| r.bytes > 0).count();
    let spent: f64 = rounds.iter().map(|r| r.seconds).sum();
    if made as u32 >= budget.max_rounds || spent + rest > budget.max_time.as_secs_f64() && made > 0 {
        return rest_goes;
    }
    // a burst of writes is no trend: what does not fit gets a second chance, what fits is frozen before it grows. Where nearly all
    // memory was written again and what is left may follow, another round costs the container its write faults once more and
    // gains nothing.
    let whole = rounds.iter().map(|r| r.bytes).max().unwrap_or(0);
    let hopeless =
        budget.mode == Mode::Auto && HOPELESS.contains(&(last.dirty_after_bytes as f64 / whole as f64));
    let chances = if fits || hopeless { 1 } else { 2 };
    if idle_rounds(rounds) >= chances { rest_goes } else { Decision::Another }
}

/// How many rounds at the end did not shrink what is left.
fn idle_rounds(rounds: &[RoundStats]) -> usize {
    let shrank = |i: usize| {
        // the first round is measured by what it copied, each later one by what was left before it
        let before = if i == 0 { rounds[0].bytes } else { rounds[i - 1].dirty_after_bytes };
        rounds[i].dirty_after_bytes as f64 <= before as f64 * SHRINKS
    };
    let first_look = usize::from(rounds.first().is_some_and(|r| r.bytes == 0));
    (first_look..rounds.len()).rev().take_while(|i| !shrank(*i)).count()
}

/// After the decision to freeze the destination prepares itself for a moment, and the container writes on: does a short round
/// over what was written meanwhile pay, before the freeze?
pub fn top_up(written_bytes: u64, link_rate: Option<f64>) -> bool {
    transfer(written_bytes, link_rate) > ENOUGH
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn budget(mode: Mode) -> Budget {
        Budget::new(Duration::from_millis(300), 30, mode)
    }

    /// Plays a migration: `memory` bytes, of which `rate` bytes a second are written at random, and a scan of 10 ms a round.
    fn play(memory: u64, rate: f64, link: f64, budget: &Budget) -> (Vec<RoundStats>, Decision) {
        let mut rounds = vec![RoundStats::first_look(memory)];
        loop {
            let decision = decide(&rounds, budget, Some(link));
            if decision != Decision::Another {
                return (rounds, decision);
            }
            let bytes = rounds.last().unwrap().dirty_after_bytes;
            let seconds = bytes as f64 / link + 0.01;
            // writes at random hit the same page again
            let dirty = memory as f64 * (1.0 - (-rate * seconds / memory as f64).exp());
            rounds.push(RoundStats { bytes, pages: bytes / 4096, seconds, dirty_after_bytes: dirty as u64 });
            assert!(rounds.len() < 100);
        }
    }

    fn rest_ms(rounds: &[RoundStats], link: f64) -> f64 {
        transfer(rounds.last().unwrap().dirty_after_bytes, Some(link)) * 1e3
    }

    #[test]
    fn an_idle_container_gets_one_round_and_a_tiny_one_none() {
        let (rounds, decision) = play(1000 * MB, 0.0, 1e9, &budget(Mode::Auto));
        assert_eq!((rounds.len(), decision), (2, Decision::Freeze));
        let (rounds, decision) = play(3 * MB, 0.0, 1e9, &budget(Mode::PreCopy));
        assert_eq!((rounds.len(), decision), (1, Decision::Freeze));
        // it would fit the budget at once, but a round makes the freeze far shorter
        let (rounds, decision) = play(200 * MB, 0.0, 1e9, &budget(Mode::Auto));
        assert_eq!((rounds.len(), decision), (2, Decision::Freeze));
    }

    #[test]
    fn writers_that_the_link_outruns_are_frozen_with_little_left() {
        for (memory, rate, link, most) in
            [(1000 * MB, 100e6, 1e9, 5.0), (1000 * MB, 500e6, 1e9, 20.0), (8000 * MB, 50e6, 117e6, 15.0)]
        {
            for mode in [Mode::Auto, Mode::PreCopy] {
                let (rounds, decision) = play(memory, rate, link, &budget(mode));
                assert_eq!(decision, Decision::Freeze);
                let rest = rest_ms(&rounds, link);
                assert!(rest < most && rounds.len() < 20, "{rate} {link}: {rest} ms after {}", rounds.len());
                let last = rounds.last().unwrap();
                assert!(last.seconds < 0.1, "the last round is short: {}", last.seconds);
            }
        }
    }

    #[test]
    fn a_writer_that_outruns_the_link_is_not_chased() {
        let (rounds, decision) = play(4000 * MB, 300e6, 117e6, &budget(Mode::Auto));
        assert_eq!(decision, Decision::FreezePostCopy);
        assert!(rounds.len() <= 5, "{}", rounds.len());
        let (rounds, decision) = play(4000 * MB, 300e6, 117e6, &budget(Mode::PreCopy));
        assert_eq!((decision, rounds.len() <= 5), (Decision::Freeze, true));
    }

    #[test]
    fn a_writer_of_all_its_memory_gets_one_round_if_the_rest_may_follow() {
        let (rounds, decision) = play(1000 * MB, 4e9, 600e6, &budget(Mode::Auto));
        assert_eq!((rounds.len(), decision), (2, Decision::FreezePostCopy), "the first look, and a round");
        // in pre-copy what is left makes the freeze longer: that it was a burst is worth a try
        let (rounds, decision) = play(1000 * MB, 4e9, 600e6, &budget(Mode::PreCopy));
        assert_eq!((rounds.len(), decision), (3, Decision::Freeze));
        // one that leaves a third of it alone is followed
        let (rounds, _) = play(1000 * MB, 700e6, 600e6, &budget(Mode::Auto));
        assert!(rounds.len() > 2);
        // one that is still filling its memory, too
        let filling = RoundStats { bytes: 3000 * MB, pages: 0, seconds: 18.0, dirty_after_bytes: 4900 * MB };
        assert_eq!(decide(&[filling], &budget(Mode::Auto), Some(300e6)), Decision::Another);
    }

    #[test]
    fn one_burst_is_no_trend_unless_it_fits_anyway() {
        let round =
            |bytes, dirty_after_bytes| RoundStats { bytes, pages: 0, seconds: 0.5, dirty_after_bytes };
        let large = [round(1000 * MB, 500 * MB), round(500 * MB, 600 * MB)];
        assert_eq!(decide(&large, &budget(Mode::Auto), Some(1e9)), Decision::Another);
        let again = [large[0], large[1], round(600 * MB, 550 * MB)];
        assert_eq!(decide(&again, &budget(Mode::Auto), Some(1e9)), Decision::FreezePostCopy);
        assert_eq!(decide(&again, &budget(Mode::PreCopy), Some(1e9)), Decision::Freeze);
        let small = [round(1000 * MB, 50 * MB), round(50 * MB, 60 * MB)];
        assert_eq!(decide(&small, &budget(Mode::Auto), Some(1e9)), Decision::Freeze);
    }

    #[test]
    fn rounds_and_time_have_an_end() {
        let round = |dirty| RoundStats { bytes: 2 * dirty, pages: 0, seconds: 1.0, dirty_after_bytes: dirty };
        let rounds: Vec<_> = (0..5).map(|n| round((1000 * MB) >> n)).collect();
        let mut b = budget(Mode::Auto);
        assert_eq!(decide(&rounds, &b, Some(100e6)), Decision::Another);
        b.max_rounds = 5;
        assert_eq!(decide(&rounds, &b, Some(100e6)), Decision::FreezePostCopy);
        assert_eq!(decide(&rounds, &b, Some(1e9)), Decision::Freeze, "63 ms fit the budget");
        b = Budget { max_time: Duration::from_millis(5500), ..budget(Mode::PreCopy) };
        assert_eq!(decide(&rounds, &b, Some(100e6)), Decision::Freeze);
    }

    #[test]
    fn post_copy_leaves_everything_but_a_moments_worth() {
        let b = budget(Mode::PostCopy);
        assert_eq!(decide(&[], &b, None), Decision::FreezePostCopy);
        assert_eq!(decide(&[RoundStats::first_look(100 * MB)], &b, Some(1e9)), Decision::FreezePostCopy);
        assert_eq!(decide(&[RoundStats::first_look(MB)], &b, Some(1e9)), Decision::Freeze);
    }

    #[test]
    fn the_wait_for_the_destination_is_used() {
        assert!(top_up(20 * MB, Some(1e9)) && !top_up(2 * MB, Some(1e9)));
        assert!(top_up(MB, None), "an unknown link is taken for a slow one");
    }
}
