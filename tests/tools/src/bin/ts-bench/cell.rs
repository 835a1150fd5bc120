//! One measurement: one workload, one system, one move from node a to node b, everything measured alike.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bed::Bed;
use crate::memory::Sampler;
use crate::systems::{Move, System};
use crate::workload::{self, Watch, Workload};

/// How long the workload runs undisturbed before the move: its usual pace.
const BASELINE: Duration = Duration::from_secs(2);
/// After the move, until its figures are asked for: longer than what counts as "after".
const AFTERWARDS: Duration = Duration::from_millis(5300);
/// A pre-copy shorter than this says nothing about the pace in it.
const LEAST: f64 = 0.25;
/// A workload that runs its own code for less of its time sleeps now and then: what it loses it can make up for.
const BUSY: f64 = 0.8;

/// The figures of one move. What could not be measured is absent.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub freeze_ms: f64,
    pub gap_ms: f64,
    pub p99_ms: Option<f64>,
    pub total_ms: f64,
    pub bytes: u64,
    /// How much less the workload wrote in a second between the move's begin and its freeze.
    pub slowdown_pct: Option<f64>,
    /// How much longer a single write took then.
    pub write_cost_pct: Option<f64>,
    /// Of a workload that is always busy: how much less of its time it ran its own code (user time) then. What it lost is the kernel's
    /// for the faults, or was spent waiting for a processor; how fast the machine is at that moment does not change it.
    pub lost_time_pct: Option<f64>,
    pub extra_bytes: u64,
    /// Wrong pages or replies, lost ones included. Anything but 0 is a failure.
    pub wrong: u64,
    pub detail: Value,
}

impl Figures {
    pub fn json(&self) -> Value {
        json!({
            "freeze_ms": self.freeze_ms, "gap_ms": self.gap_ms, "p99_after_ms": self.p99_ms, "total_ms": self.total_ms,
            "bytes": self.bytes, "slowdown_pct": self.slowdown_pct, "write_cost_pct": self.write_cost_pct,
            "lost_time_pct": self.lost_time_pct, "extra_bytes": self.extra_bytes, "wrong": self.wrong, "detail": self.detail,
        })
    }
}

struct Pace {
    /// Steps a second.
    steps: f64,
    /// Microseconds a step.
    cost: f64,
    /// The part of the time that the workload ran its own code.
    user: f64,
}

/// Of the slices (of 100 ms) that lie in [`from`, `to`].
fn pace(slices: &Value, from: f64, to: f64) -> Option<Pace> {
    let (mut n, mut steps, mut busy, mut user) = (0.0, 0.0, 0.0, 0.0);
    for slice in slices.as_array()? {
        let end = slice[0].as_f64()?;
        if end - 0.1 >= from && end <= to {
            n += 1.0;
            steps += slice[1].as_f64()?;
            busy += slice[2].as_f64()?;
            user += slice[3].as_f64()?;
        }
    }
    (n > 0.0 && steps > 0.0).then(|| Pace {
        steps: steps / n * 10.0,
        cost: busy / steps,
        user: user / n / 1e5,
    })
}

fn percent(before: f64, during: f64) -> f64 {
    ((during / before - 1.0) * 1e3).round() / 10.0
}

/// Of ts-load's status: what the pace before the stall was beside that before the move.
fn slowdown(figures: &mut Figures, status: &Value, begin: f64, stall: &Value) -> Option<()> {
    let freeze = stall["realtime_end"].as_f64()? - stall["ms"].as_f64()? / 1e3;
    if freeze - begin < LEAST {
        return None;
    }
    let before = pace(&status["slices"], begin - BASELINE.as_secs_f64(), begin)?;
    let during = pace(&status["slices"], begin, freeze)?;
    figures.slowdown_pct = Some(-percent(before.steps, during.steps));
    figures.write_cost_pct = Some(percent(before.cost, during.cost));
    figures.lost_time_pct = (before.user > BUSY).then(|| -percent(before.user, during.user));
    Some(())
}

fn measure_load(figures: &mut Figures, moved: &Move, bed: &mut Bed) -> Result<(), String> {
    // the switch knows the address by the port where it saw it last; a workload that is only asked says nothing by itself
    bed.b.try_sh(&format!("ip netns exec {} bash -c 'echo > /dev/udp/10.77.0.254/9'", crate::systems::ID));
    let status = workload::ask(bed, "status")?;
    let stall = &status["longest"];
    figures.gap_ms = stall["ms"].as_f64().ok_or("ts-load saw no stall")?;
    figures.p99_ms = status["after"]["p99_ms"].as_f64();
    slowdown(figures, &status, moved.begin, stall);
    let verdict = workload::ask(bed, "verify")?;
    figures.wrong = verdict["wrong"].as_u64().unwrap_or(1);
    if figures.wrong > 0 {
        figures.detail["wrong"] = verdict["named"].clone();
    }
    Ok(())
}

fn measure_client(figures: &mut Figures, moved: &Move, end: &Value) -> Result<(), String> {
    // those that overlap the move: a client's end can come long after it, when its own timers have backed off
    let gap = end["gaps"].as_array().into_iter().flatten().filter(|g| {
        g["realtime_end"]
            .as_f64()
            .zip(g["ms"].as_f64())
            .is_some_and(|(end, ms)| end >= moved.begin && end - ms / 1e3 <= moved.end)
    });
    figures.gap_ms = gap.filter_map(|g| g["ms"].as_f64()).fold(0.0, f64::max);
    figures.p99_ms = end["latency"]["after"]["p99_ms"].as_f64();
    let count = |name: &str| end[name].as_u64().unwrap_or(0);
    figures.wrong = count("lost") + count("wrong") + u64::from(end["connection_survived"] != true);
    if figures.wrong > 0 {
        figures.detail["wrong"] = end.clone();
    }
    Ok(())
}

/// Runs the workload, moves it, checks it, removes it. `link`: what the nodes' links are shaped to while it moves.
pub fn run(
    bed: &mut Bed,
    workload: &Workload,
    link: Option<&str>,
    system: &mut dyn System,
    dir: &Path,
) -> Result<Figures, String> {
    bed.shape(None)?;
    let result = measure(bed, workload, link, system, dir);
    system.clean(bed);
    let _ = bed.shape(None);
    result
}

fn measure(
    bed: &mut Bed,
    workload: &Workload,
    link: Option<&str>,
    system: &mut dyn System,
    dir: &Path,
) -> Result<Figures, String> {
    system.start(bed, workload)?;
    let mut watch = workload.watch(bed, dir)?;
    system.prepare(bed, workload)?;
    bed.shape(link)?;
    std::thread::sleep(BASELINE);
    if matches!(watch, Watch::Load) {
        workload::ask(bed, "reset")?;
    }
    let sampler = Sampler::start(&format!("{}-b", bed.prefix));
    let before = bed.wire()?;
    let moved = system.migrate(bed, workload)?;
    let after = bed.wire()?;
    std::thread::sleep(AFTERWARDS);
    let mut figures = Figures {
        freeze_ms: moved.freeze_ms,
        total_ms: ((moved.end - moved.begin) * 1e4).round() / 10.0,
        bytes: after.sent - before.sent + after.received - before.received,
        extra_bytes: sampler.extra(),
        detail: moved.detail.clone(),
        ..Figures::default()
    };
    // what is checked comes over a link that is not measured any more
    bed.shape(None)?;
    match &mut watch {
        Watch::Load => measure_load(&mut figures, &moved, bed)?,
        Watch::Client { child, out, .. } => {
            let end = workload::client_end(child, out)?;
            measure_client(&mut figures, &moved, &end)?;
        }
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slowdown_compares_the_precopy_with_before() {
        // 2 s at 100 steps a slice, then 1 s at 90, each a quarter more expensive and a twentieth of the time lost
        let slices = |user: u64| -> Vec<Value> {
            let slice = |i: u32| {
                let end = 10.0 + f64::from(i + 1) * 0.1;
                if i < 20 { json!([end, 100, 1000, user]) } else { json!([end, 90, 1125, user * 95 / 100]) }
            };
            (0..30).map(slice).collect()
        };
        let stall = json!({"ms": 50.0, "realtime_end": 13.05 + 1e-6});
        let figures = |user, begin| {
            let mut figures = Figures::default();
            slowdown(&mut figures, &json!({"slices": slices(user)}), begin, &stall);
            (figures.slowdown_pct, figures.write_cost_pct, figures.lost_time_pct)
        };
        let (slower, cost, lost) = figures(100_000, 12.0 + 1e-9);
        let near = |figure: Option<f64>, to: f64| (figure.unwrap() - to).abs() < 0.2;
        assert!(near(slower, 10.0) && near(cost, 25.0) && near(lost, 5.0), "{slower:?} {cost:?} {lost:?}");
        // one that sleeps
        assert_eq!(figures(50_000, 12.0 + 1e-9), (slower, cost, None));
        // no pre-copy to speak of
        assert_eq!(figures(100_000, 12.9), (None, None, None));
    }

    #[test]
    fn only_gaps_of_the_move_count() {
        let moved = Move { begin: 100.0, end: 101.0, freeze_ms: 1.0, detail: json!({}) };
        let end = json!({
            "gaps": [{"ms": 900.0, "realtime_end": 99.0}, {"ms": 70.5, "realtime_end": 100.9}, {"ms": 1520.0, "realtime_end": 103.5}],
            "lost": 1, "wrong": 2, "connection_survived": true, "latency": {"after": {"p99_ms": 1.5}},
        });
        let mut figures = Figures { detail: json!({}), ..Figures::default() };
        measure_client(&mut figures, &moved, &end).unwrap();
        assert_eq!((figures.gap_ms, figures.wrong, figures.p99_ms), (70.5, 3, Some(1.5)));
    }
}
