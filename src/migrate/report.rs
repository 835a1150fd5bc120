//! What a migration did: phases with start and duration, rounds, what the freeze was spent on, bytes, pages, faults. Data and
//! arithmetic only; how it is shown is the CLI's business.
//!
//! Units: milliseconds (with fractions), bytes, bytes in a second. Every field that was not in the first version has a
//! default, so that reports of older shims are read as well.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// One phase, in milliseconds from the start of the migration on that side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `connect`, `freeze`, `dump`, `files`, `layer`, `restore`, ...
    pub name: String,
    /// Start, ms.
    pub start_ms: f64,
    /// Duration, ms.
    pub ms: f64,
}

/// A round of copying while the container runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Round {
    /// Counted from 1.
    pub n: u32,
    /// Start, ms from the start of the migration.
    pub start_ms: f64,
    /// Duration, ms.
    pub ms: f64,
    /// Pages looked at: those with content and the zero ones.
    pub pages: u64,
    /// Bytes of these pages.
    pub bytes: u64,
    /// Bytes that went over the link for them, after compression.
    pub wire_bytes: u64,
    /// Pages of them that hold nothing but zeros.
    pub zero_pages: u64,
    /// Bytes that were written again while the round ran: what is left after it.
    pub dirty_after_bytes: u64,
    /// Bytes written in a second while it ran.
    pub dirty_rate: u64,
    /// Bytes of the writable layer.
    pub layer_bytes: u64,
    /// Entries of the writable layer.
    pub layer_entries: u64,
    /// Bytes of content of tmpfs files.
    pub tmpfs_bytes: u64,
}

/// Which node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The one that the container leaves.
    #[default]
    Source,
    /// The one that it moves to.
    Destination,
}

/// One thing that the freeze was spent on. Items of both sides, and of different threads, overlap.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Item {
    /// One of [`items`], or another plain word.
    pub name: String,
    /// Start, ms from the beginning of the freeze.
    pub start_ms: f64,
    /// Duration, ms.
    pub ms: f64,
    /// Where.
    pub side: Side,
}

/// Names of [`Item`]s, in about the order in which they happen.
pub mod items {
    /// The cgroup's tasks are stopped.
    pub const FREEZE: &str = "freeze";
    /// The network is fenced: no packet in or out.
    pub const FENCE: &str = "fence";
    /// Output of the container is drained.
    pub const QUIESCE: &str = "quiesce";
    /// The tracker's last look: what was written since the last round.
    pub const FINAL_SCAN: &str = "final scan";
    /// CRIU dumps everything but memory.
    pub const CRIU_DUMP: &str = "CRIU dump";
    /// What was written last is read and sent.
    pub const FINAL_PAGES: &str = "final pages";
    /// Pages that CRIU knows of and that nobody has sent.
    pub const LATE_PAGES: &str = "late pages";
    /// The rest of the writable layer.
    pub const LAYER: &str = "layer";
    /// Shared memory is compared with what the destination has.
    pub const SHARED: &str = "shared memory";
    /// What changed last in tmpfs files.
    pub const TMPFS: &str = "tmpfs";
    /// CRIU's images.
    pub const FILES: &str = "files";
    /// Bytes under way that neither side works on meanwhile.
    pub const TRANSFER: &str = "transfer";
    /// The destination decides which page comes when.
    pub const PLAN: &str = "plan";
    /// `runc restore`, held before CRIU's work, is let go on.
    pub const GATE: &str = "gate";
    /// CRIU makes the tasks.
    pub const CRIU_RESTORE: &str = "CRIU restore";
    /// The two nodes agree that it is the destination's.
    pub const COMMIT: &str = "commit";
    /// Fence down, addresses announced, connections woken.
    pub const NETWORK: &str = "network";
    /// The tasks are let go.
    pub const RESUME: &str = "resume";
}

/// Pages that restored tasks waited for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// Served from the destination's page store.
    pub local: u64,
    /// Asked of the source.
    pub remote: u64,
    /// Pages that never had content.
    pub zero: u64,
    /// How long a page of the store took, median and 99th percentile, microseconds.
    pub local_us: (u64, u64),
    /// The same of pages that were asked of the source.
    pub remote_us: (u64, u64),
}

impl Faults {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.local.saturating_add(self.remote).saturating_add(self.zero)
    }
}

/// What followed after the container ran on the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PostCopy {
    /// Duration, ms, from the first instruction on the destination.
    pub ms: f64,
    /// Pages.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that never arrived. 0 unless the source or the link was lost.
    pub lost: u64,
    /// How it went on, oldest first; may be empty. See [`PostCopy::sample`].
    pub samples: Vec<Sample>,
}

/// A moment of the post-copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// Milliseconds from its beginning.
    pub at_ms: f64,
    /// Bytes that are still on the source.
    pub left_bytes: u64,
    /// Faults asked of the source so far.
    pub faults: u64,
}

/// The most samples that are kept.
const SAMPLES: usize = 256;

impl PostCopy {
    /// Notes how far it is. The number of samples stays bounded: when it grows too large, every other one goes.
    pub fn sample(&mut self, sample: Sample) {
        if self.samples.len() >= SAMPLES {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.samples.push(sample);
    }
}

/// The report of one migration, as the source's shim measured it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The migration.
    pub migration_id: String,
    /// Milliseconds from the freeze until the destination had its tasks running.
    pub freeze_ms: f64,
    /// Milliseconds in all, on the source's shim.
    pub total_ms: f64,
    /// The source's phases.
    pub phases: Vec<Phase>,
    /// The destination's phases (its own clock and start).
    #[serde(default)]
    pub destination_phases: Vec<Phase>,
    /// Bytes sent, frames' headers included, before encryption.
    pub bytes_sent: u64,
    /// What those bytes were.
    #[serde(default)]
    pub sent: super::protocol::Final,
    /// Processes that moved.
    #[serde(default)]
    pub processes: usize,
    /// Things worth telling that were no failure.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How memory really moved: `stop-and-copy`, `pre-copy` or `post-copy` (with rounds before it or not).
    #[serde(default)]
    pub mode: Option<String>,
    /// What told dirty memory from clean: `uffd-wp`, `soft-dirty`, `hash`.
    #[serde(default)]
    pub tracker: Option<String>,
    /// How memory was packed.
    #[serde(default)]
    pub compression: Option<String>,
    /// The rounds before the freeze.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// When the freeze began, ms from the start of the migration; absent where nobody noted it.
    #[serde(default)]
    pub freeze_start_ms: Option<f64>,
    /// What the freeze was spent on.
    #[serde(default)]
    pub freeze: Vec<Item>,
    /// The destination's start on the source's clock, ms: added to its phases they are comparable with the source's.
    #[serde(default)]
    pub destination_offset_ms: f64,
    /// Packets for the container that came in the freeze and were passed on.
    #[serde(default)]
    pub packets: u64,
    /// Pages that the restored tasks waited for.
    #[serde(default)]
    pub faults: Faults,
    /// What followed after the container ran on the destination.
    #[serde(default)]
    pub post_copy: Option<PostCopy>,
    /// The most bytes that the destination's page store held.
    #[serde(default)]
    pub store_peak_bytes: u64,
    /// Bytes that the destination put into place in the background.
    #[serde(default)]
    pub fill_bytes: u64,
    /// Milliseconds from the first instruction there until every page was in its place.
    #[serde(default)]
    pub fill_ms: f64,
}

impl Report {
    /// When the freeze began, on the source's clock: as noted, else where a phase of that name began.
    pub fn frozen_at(&self) -> Option<f64> {
        let phase = || self.phases.iter().find(|p| p.name == items::FREEZE).map(|p| p.start_ms);
        self.freeze_start_ms.or_else(phase)
    }

    /// What the freeze was spent on, in the order in which it began. A shim that noted no items is helped out with the phases
    /// that fell into the freeze.
    pub fn freeze_items(&self) -> Vec<Item> {
        let mut all = self.freeze.clone();
        if all.is_empty()
            && let Some(from) = self.frozen_at()
        {
            let end = from + self.freeze_ms;
            let mut add = |phases: &[Phase], offset: f64, side: Side| {
                let shifted = phases.iter().map(|p| (p, p.start_ms + offset - from));
                let inside = shifted.filter(|(p, at)| *at >= -0.001 && *at < end - from && p.ms > 0.0);
                all.extend(inside.map(|(p, at)| {
                    let (start_ms, ms) = (at.max(0.0), p.ms.min(end - from - at));
                    Item { name: p.name.clone(), start_ms, ms, side }
                }));
            };
            add(&self.phases, 0.0, Side::Source);
            if self.destination_offset_ms > 0.0 {
                add(&self.destination_phases, self.destination_offset_ms, Side::Destination);
            }
        }
        all.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        all
    }

    /// Bytes that the container wrote in a second while it was copied: the mean over the rounds, by their lengths.
    pub fn dirty_rate(&self) -> Option<u64> {
        let ms: f64 = self.rounds.iter().map(|r| r.ms).sum();
        let written: f64 = self.rounds.iter().map(|r| r.dirty_rate as f64 * r.ms).sum();
        (ms > 0.0).then(|| (written / ms) as u64)
    }
}

/// Phases with those of single rounds (`round 7`) put together, so that a hundred of them are one.
pub fn fused(phases: &[Phase]) -> Vec<Phase> {
    let of_round = |name: &str| {
        name.strip_prefix("round ").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut all: Vec<Phase> = Vec::new();
    for phase in phases {
        match all.last_mut() {
            Some(last) if last.name == "rounds" && of_round(&phase.name) => {
                last.ms = phase.start_ms + phase.ms - last.start_ms;
            }
            _ if of_round(&phase.name) => all.push(Phase { name: "rounds".into(), ..phase.clone() }),
            _ => all.push(phase.clone()),
        }
    }
    all
}

/// Measures phases one after the other.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    phases: Vec<Phase>,
    open: Option<(String, Instant)>,
}

impl Clock {
    /// Starts now, with no phase.
    pub fn start() -> Clock {
        Clock { start: Instant::now(), phases: Vec::new(), open: None }
    }

    /// Ends the phase that is open and begins `name`.
    pub fn phase(&mut self, name: &str) {
        self.end();
        self.open = Some((name.to_owned(), Instant::now()));
    }

    /// Ends the phase that is open.
    pub fn end(&mut self) {
        if let Some((name, at)) = self.open.take() {
            let start_ms = millis(at - self.start);
            self.phases.push(Phase { name, start_ms, ms: millis(at.elapsed()) });
        }
    }

    /// The name of the phase that is open, or of the last one.
    pub fn current(&self) -> &str {
        let last = self.phases.last().map(|p| p.name.as_str());
        self.open.as_ref().map(|o| o.0.as_str()).or(last).unwrap_or("start")
    }

    /// Milliseconds since the start.
    pub fn now_ms(&self) -> f64 {
        millis(self.start.elapsed())
    }

    /// All phases that ended, and milliseconds since the start.
    pub fn done(&mut self) -> (Vec<Phase>, f64) {
        self.end();
        (self.phases.clone(), millis(self.start.elapsed()))
    }
}

/// A duration in milliseconds, rounded to a microsecond.
pub fn millis(d: std::time::Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_the_first_version_is_read() {
        let old = r#"{"migration_id":"m","freeze_ms":2.0,"total_ms":9.0,"bytes_sent":5,
            "phases":[{"name":"freeze","start_ms":1.5,"ms":0.1}]}"#;
        let report: Report = serde_json::from_str(old).unwrap();
        assert_eq!((report.rounds.len(), report.mode.clone(), report.frozen_at()), (0, None, Some(1.5)));
        assert_eq!(report.dirty_rate(), None);
        assert_eq!(serde_json::from_str::<Report>(&serde_json::to_string(&report).unwrap()).unwrap(), report);
    }

    #[test]
    fn the_dirty_rate_weighs_rounds_by_their_length() {
        let round = |ms, dirty_rate| Round { ms, dirty_rate, ..Round::default() };
        let report = Report { rounds: vec![round(900.0, 100), round(100.0, 1100)], ..Report::default() };
        assert_eq!(report.dirty_rate(), Some(200));
        assert_eq!(Report { freeze_start_ms: Some(3.0), ..Report::default() }.frozen_at(), Some(3.0));
    }

    #[test]
    fn a_shim_without_items_is_helped_out_with_its_phases() {
        let phase = |name: &str, start_ms, ms| Phase { name: name.into(), start_ms, ms };
        let mut report = Report {
            freeze_ms: 50.0,
            phases: vec![
                phase("prepare", 0.0, 10.0),
                phase("freeze", 10.0, 5.0),
                phase("dump", 15.0, 30.0),
                phase("commit", 45.0, 99.0),
            ],
            destination_phases: vec![phase("receive", 0.0, 40.0), phase("restore", 40.0, 12.0)],
            ..Report::default()
        };
        let names = |r: &Report| {
            r.freeze_items().iter().map(|i| (i.name.clone(), i.start_ms, i.ms)).collect::<Vec<_>>()
        };
        let own =
            [("freeze".to_string(), 0.0, 5.0), ("dump".into(), 5.0, 30.0), ("commit".into(), 35.0, 15.0)];
        assert_eq!(names(&report), own);
        // the destination's only when its clock is known
        report.destination_offset_ms = 2.0;
        assert_eq!(names(&report)[2], ("restore".to_string(), 32.0, 12.0));
        report.freeze = vec![
            Item { name: "b".into(), start_ms: 2.0, ..Item::default() },
            Item { name: "a".into(), ..Item::default() },
        ];
        assert_eq!(report.freeze_items()[0].name, "a");
    }

    #[test]
    fn rounds_are_one_phase_when_put_together() {
        let phase = |name: &str, start_ms, ms| Phase { name: name.into(), start_ms, ms };
        let all = [
            phase("prepare", 0.0, 1.0),
            phase("round 1", 1.0, 5.0),
            phase("round 2", 6.5, 2.0),
            phase("round trip", 9.0, 1.0),
        ];
        let fused = fused(&all);
        assert_eq!(fused.len(), 3);
        assert_eq!(fused[1], phase("rounds", 1.0, 7.5));
        assert_eq!(fused[2], all[3], "no round, whatever it is called");
    }

    #[test]
    fn samples_stay_few_and_keep_their_ends() {
        let mut post = PostCopy::default();
        for n in 0..10_000u64 {
            post.sample(Sample { at_ms: n as f64, left_bytes: 10_000 - n, faults: n });
        }
        assert!(post.samples.len() <= SAMPLES && post.samples.len() > SAMPLES / 2);
        assert_eq!((post.samples[0].faults, post.samples.last().unwrap().faults), (0, 9999));
        assert!(post.samples.windows(2).all(|w| w[0].at_ms < w[1].at_ms));
    }

    #[test]
    fn phases_follow_each_other_without_gaps_in_the_list() {
        let mut c = Clock::start();
        assert_eq!(c.current(), "start");
        c.phase("freeze");
        c.phase("dump");
        assert_eq!(c.current(), "dump");
        let (phases, total) = c.done();
        assert_eq!(phases.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["freeze", "dump"]);
        assert!(phases[1].start_ms >= phases[0].start_ms + phases[0].ms - 0.01 && total >= phases[1].ms);
        assert_eq!(c.current(), "dump");
    }
}
