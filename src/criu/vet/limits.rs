//! Resource limits and priorities of tasks: what the spec sets, tasks without capabilities can only have made worse for themselves.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Caps, Measure, image};
use crate::policy::model::Spec;

const RLIMIT_MAGIC: u32 = 0x5711_3925;

/// `rlimit_entry`. "No limit" is the largest number.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Limit {
    #[prost(uint64, required, tag = "1")]
    pub soft: u64,
    #[prost(uint64, required, tag = "2")]
    pub hard: u64,
}

/// `task_rlimits_entry`: by the kernel's numbers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Limits {
    #[prost(message, repeated, tag = "1")]
    pub all: Vec<Limit>,
}

/// By number.
const NAMES: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];
const NICE: usize = 13;
const RTPRIO: usize = 14;

/// What a process of this node hands down to a container that asks for nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inherited {
    pub nice: i32,
    /// Hard limits.
    pub rlimit_nice: u64,
    pub rlimit_rtprio: u64,
}

impl Inherited {
    /// From this process.
    pub fn here() -> Inherited {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        Inherited {
            nice: nice_of(&stat).unwrap_or(0),
            rlimit_nice: hard(&limits, "Max nice priority").unwrap_or(0),
            rlimit_rtprio: hard(&limits, "Max realtime priority").unwrap_or(0),
        }
    }
}

/// Out of `/proc/PID/stat`.
fn nice_of(stat: &str) -> Option<i32> {
    crate::procstat::field(stat, 19)
}

/// Out of `/proc/PID/limits`: name, soft, hard, unit.
fn hard(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix(name))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// What the limits and priorities of every task are compared with.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// The highest hard limits, by number; none where nothing is said.
    hard: [Option<u64>; NAMES.len()],
    /// The lowest nice value.
    nice: i32,
    /// It may be scheduled before others.
    realtime: bool,
    /// What would allow more, at the end of a sentence.
    key: String,
}

impl Bounds {
    pub fn of(spec: &Spec, caps: Caps, measure: &Measure<'_>, here: Inherited) -> Bounds {
        let process = spec.process.as_ref();
        let scheduler = process.and_then(|p| p.scheduler.as_ref()).filter(|s| s.is_object());
        let mut hard = [None; NAMES.len()];
        for limit in process.and_then(|p| p.rlimits.as_ref()).and_then(Value::as_array).into_iter().flatten()
        {
            let number = NAMES.iter().position(|n| limit["type"] == *n);
            if let (Some(number), Some(most)) = (number, limit["hard"].as_u64()) {
                hard[number] = Some(most);
            }
        }
        // by these two a task could push others aside without a capability
        hard[NICE].get_or_insert(here.rlimit_nice);
        hard[RTPRIO].get_or_insert(here.rlimit_rtprio);
        let realtime = measure.policy().is_some_and(|p| p.realtime) || caps.has("CAP_SYS_NICE");
        if realtime {
            (hard[NICE], hard[RTPRIO]) = (None, None);
        }
        if caps.has("CAP_SYS_RESOURCE") {
            hard = [None; NAMES.len()]; // it can raise them by itself
        }
        let asked = scheduler.and_then(|s| s["nice"].as_i64()).map_or(0, |n| n.clamp(-20, 19) as i32);
        let by_limit = hard[NICE].map_or(-20, |limit| 20 - limit.min(40) as i32);
        let nice = if realtime { -20 } else { asked.min(here.nice).min(by_limit).min(0) };
        let by_limit = hard[RTPRIO] != Some(0);
        Bounds {
            hard,
            nice,
            realtime: realtime || scheduler.is_some() || by_limit,
            key: measure.allowed_by("realtime"),
        }
    }

    /// Compares a task's limits.
    pub fn limits(&self, limits: &[Limit]) -> Result<()> {
        for (number, (limit, name)) in limits.iter().zip(NAMES).enumerate() {
            let Some(most) = self.hard[number] else { continue };
            let set = if limit.hard == u64::MAX { "no limit".into() } else { limit.hard.to_string() };
            ensure!(
                limit.hard <= most && limit.soft <= limit.hard,
                "its {name} is {set}, here it would be {most} at most{}",
                if matches!(number, NICE | RTPRIO) { format!("; {}", self.key) } else { String::new() }
            );
        }
        Ok(())
    }

    /// Compares a thread's priority; `policy` is a number of the kernel's.
    pub fn priority(&self, policy: u32, nice: i32) -> Result<()> {
        // SCHED_OTHER, SCHED_BATCH, SCHED_IDLE
        let fair = matches!(policy, 0 | 3 | 5);
        ensure!(
            (fair || self.realtime) && nice >= self.nice,
            "it is scheduled before others (policy {policy}, nice {nice}); {}",
            self.key
        );
        Ok(())
    }
}

/// Images of limits beside the cores, as old versions of CRIU made them.
pub(super) fn check_old(images: &Path, bounds: &Bounds) -> Result<()> {
    for (number, path) in image::all(images, "rlimit-")? {
        let all: Vec<Limit> = image::read(&path, RLIMIT_MAGIC)?.unwrap_or_default();
        bounds.limits(&all).with_context(|| format!("process {number} of the checkpoint"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::policy::Policy;

    fn bounds(process: Value, policy: &Policy, here: Inherited) -> Bounds {
        let spec = Spec::deserialize(serde_json::json!({ "process": process })).unwrap();
        let measure = Measure::Policy { policy, in_netns: true };
        Bounds::of(&spec, Caps::of(&spec), &measure, here)
    }

    fn with(number: usize, hard: u64) -> Vec<Limit> {
        let mut all = vec![Limit { soft: 0, hard: 0 }; NAMES.len()];
        all[number] = Limit { soft: 0, hard };
        all
    }

    #[test]
    fn limits_of_the_spec() {
        let process = serde_json::json!({
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}, {"type": "RLIMIT_ODD", "hard": 1}],
        });
        let policy = Policy::default();
        let plain = bounds(process.clone(), &policy, Inherited::default());
        plain.limits(&with(7, 1024)).unwrap();
        let said = plain.limits(&with(7, 1025)).unwrap_err().to_string();
        assert!(said.contains("RLIMIT_NOFILE is 1025, here it would be 1024"), "{said}");
        assert!(plain.limits(&with(7, u64::MAX)).unwrap_err().to_string().contains("no limit"));
        // nothing is said of the others
        plain.limits(&with(8, u64::MAX)).unwrap();
        assert!(plain.limits(&[Limit { soft: 2, hard: 1 }; 16]).is_err());
        let mut able = process;
        able["capabilities"]["bounding"] = serde_json::json!(["CAP_SYS_RESOURCE"]);
        bounds(able, &policy, Inherited::default()).limits(&with(7, u64::MAX)).unwrap();
    }

    #[test]
    fn priorities() {
        let (policy, here) = (Policy::default(), Inherited::default());
        let none = bounds(serde_json::json!({}), &policy, here);
        none.priority(0, 0).unwrap();
        none.priority(3, 19).unwrap();
        assert!(none.priority(0, -1).unwrap_err().to_string().contains("`realtime`"));
        assert!(none.priority(1, 0).is_err());
        for number in [NICE, RTPRIO] {
            assert!(none.limits(&with(number, 1)).unwrap_err().to_string().contains("`realtime`"));
        }
        // as this node's own processes are
        let higher = Inherited { nice: -5, rlimit_nice: 0, rlimit_rtprio: 0 };
        bounds(serde_json::json!({}), &policy, higher).priority(0, -5).unwrap();
        assert!(bounds(serde_json::json!({}), &policy, higher).priority(0, -6).is_err());
        // by a limit, by the spec, by a capability, by the policy
        let limit = |name: &str, hard: u64| serde_json::json!({"rlimits": [{"type": name, "hard": hard}]});
        let lower = bounds(limit("RLIMIT_NICE", 30), &policy, here);
        lower.priority(0, -10).unwrap();
        assert!(lower.priority(0, -11).is_err() && lower.priority(1, 0).is_err());
        bounds(limit("RLIMIT_RTPRIO", 1), &policy, here).priority(1, 0).unwrap();
        let asked = bounds(serde_json::json!({"scheduler": {"policy": "SCHED_FIFO"}}), &policy, here);
        asked.priority(1, 0).unwrap();
        assert!(asked.priority(1, -1).is_err());
        let able = serde_json::json!({"capabilities": {"bounding": ["CAP_SYS_NICE"]}});
        bounds(able, &policy, here).priority(1, -20).unwrap();
        let allowed = Policy { realtime: true, ..Policy::default() };
        let free = bounds(serde_json::json!({}), &allowed, here);
        free.priority(1, -20).unwrap();
        free.limits(&with(RTPRIO, 99)).unwrap();
    }

    #[test]
    fn what_this_process_hands_down() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 -7 1 0 9";
        assert_eq!(nice_of(stat), Some(-7));
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max nice priority         0                    3                    \n\
                      Max realtime priority     0                    unlimited            \n";
        assert_eq!(hard(limits, "Max nice priority"), Some(3));
        assert_eq!(hard(limits, "Max realtime priority"), Some(u64::MAX));
        assert!(hard(&std::fs::read_to_string("/proc/self/limits").unwrap(), "Max nice priority").is_some());
    }
}
