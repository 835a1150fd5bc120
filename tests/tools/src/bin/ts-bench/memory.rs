//! The destination's memory while a move runs: anonymous memory, tmpfs and memfds of the node's cgroup, looked at every 25 ms.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const PACE: Duration = Duration::from_millis(25);

pub struct Sampler {
    stat: PathBuf,
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Of a `memory.stat`, v1 or v2: what the group holds and cannot give back.
fn held(stat: &str) -> u64 {
    let value =
        |name: &str| stat.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
    match (value("total_rss"), value("total_shmem")) {
        (Some(rss), Some(shmem)) => rss + shmem,
        _ => value("anon").unwrap_or(0) + value("shmem").unwrap_or(0),
    }
}

fn read(stat: &Path) -> u64 {
    std::fs::read_to_string(stat).map_or(0, |s| held(&s))
}

impl Sampler {
    /// Begins to look at the cgroup of the node (`PREFIX-b`).
    pub fn start(cgroup: &str) -> Self {
        let v1 = PathBuf::from("/sys/fs/cgroup/memory").join(cgroup).join("memory.stat");
        let v2 = PathBuf::from("/sys/fs/cgroup").join(cgroup).join("memory.stat");
        let stat = if v1.exists() { v1 } else { v2 };
        let (stop, peak) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (stat, stop, peak) = (stat.clone(), stop.clone(), peak.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    peak.fetch_max(read(&stat), Ordering::Relaxed);
                    std::thread::sleep(PACE);
                }
            }
        });
        Self { stat, stop, peak, thread: Some(thread) }
    }

    /// The largest value so far less what is held now: what the move took on top of the container itself.
    pub fn extra(mut self) -> u64 {
        self.end();
        self.peak.load(Ordering::Relaxed).saturating_sub(read(&self.stat))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::held;

    #[test]
    fn both_versions_of_cgroups() {
        assert_eq!(held("rss 1\nshmem 2\ntotal_rss 100\ntotal_shmem 20\n"), 120);
        assert_eq!(held("anon 7\nfile 9\nshmem 5\nshmem_thp 100\n"), 12);
    }
}
