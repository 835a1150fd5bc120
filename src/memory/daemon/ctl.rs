//! How the caller and the daemon talk: orders to it, events from it, and the figures at its end.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use super::Remote;
use crate::memory::{RangeSet, Space};

/// What the caller says.
pub(super) enum Order {
    Running,
    Abort,
    Remote(Box<dyn Remote>),
}

/// The caller's handle to a daemon; clones are the same handle.
#[derive(Clone)]
pub struct DaemonCtl {
    wake: Arc<EventFd>,
    orders: Arc<Mutex<Vec<Order>>>,
}

impl DaemonCtl {
    /// A handle, to be given to [`super::Daemon::run`] in a clone.
    pub fn new() -> Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .context("making an eventfd for the page daemon")?;
        Ok(Self { wake: Arc::new(wake), orders: Arc::default() })
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.wake.write(1);
    }

    /// The tasks run: the background fill may begin. Until then, and for [`super::DaemonConfig::fill_delay`] after CRIU's last word at
    /// most, only faults are served.
    pub fn running(&self) {
        self.order(Order::Running);
    }

    /// The restored tasks are dead, or being killed: let go of their memory. **Not before**: a descriptor that is closed gives
    /// zeros to a task that waits for a page, so the daemon waits until they are gone.
    pub fn abort(&self) {
        self.order(Order::Abort);
    }

    /// After [`DaemonEvent::Lost`]: the source can be reached again, here. What was asked for is asked for again.
    pub fn go_on(&self, remote: Box<dyn Remote>) {
        self.order(Order::Remote(remote));
    }

    pub(super) fn take(&self) -> Vec<Order> {
        let _ = self.wake.read();
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// What the daemon tells while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DaemonEvent {
    /// CRIU has connected.
    Connected,
    /// CRIU's last word: all tasks are complete and about to run.
    Restored,
    /// Bytes still to be placed, at most ten times a second.
    Progress {
        /// From the store.
        local: u64,
        /// From the source.
        remote: u64,
    },
    /// The source or the link has died. Nothing is filled any more; tasks that need a missing page wait, and wait for ever unless
    /// the caller says [`DaemonCtl::go_on`], or kills them and says [`DaemonCtl::abort`].
    Lost {
        /// The pages that nobody here has.
        missing: Vec<(Space, RangeSet)>,
        /// What went wrong.
        why: String,
    },
    /// The daemon cannot go on. Tasks wait as after `Lost`; the caller kills them and says [`DaemonCtl::abort`].
    Failed {
        /// What went wrong.
        why: String,
    },
}

/// What a daemon did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DaemonStats {
    /// Every page is where it belongs (or its task has ended). Otherwise the daemon was told to stop, or the tasks were killed after
    /// [`DaemonEvent::Lost`].
    pub complete: bool,
    /// Faults answered from the store.
    pub faults_local: u64,
    /// Faults that waited for the source.
    pub faults_remote: u64,
    /// Faults on pages that nobody had: zeros.
    pub faults_zero: u64,
    /// Median time from a message of the kernel to the page in place, local faults, microseconds.
    pub fault_median_us: u64,
    /// The 99th percentile of the same.
    pub fault_p99_us: u64,
    /// Median time from a fault to its page's arrival from the source, microseconds.
    pub remote_median_us: u64,
    /// The 99th percentile of the same.
    pub remote_p99_us: u64,
    /// Bytes placed because of faults, the pages around them included.
    pub fault_bytes: u64,
    /// Bytes placed by the background fill.
    pub filled_bytes: u64,
    /// From the fill's beginning to its end, milliseconds.
    pub fill_ms: u64,
    /// Bytes that came from the source.
    pub remote_bytes: u64,
    /// Bytes that had no place when their turn came although nothing said that they were unmapped. Always 0: anything else means
    /// that pages were planned lazily in a mapping that CRIU does not restore lazily.
    pub unplaced_bytes: u64,
    /// Forks of restored tasks that were followed.
    pub forks: u64,
    /// Most bytes that the store held since the restore.
    pub store_peak_bytes: u64,
    /// Bytes that the store gave back while it was still needed for others: those that were in their place, and older copies of what came from
    /// the source.
    pub given_back_bytes: u64,
}

/// Durations in buckets of about 6 %.
#[derive(Default)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// 16 buckets for each power of two of nanoseconds.
    pub fn add(&mut self, took: std::time::Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(16);
        let power = ns.ilog2();
        let bucket = (power as usize) * 16 + ((ns >> (power - 4)) & 15) as usize;
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
    }

    /// Microseconds, rounded up, that `part` of 1000 stay within.
    pub fn at(&self, part: u64) -> u64 {
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if *n > 0 && seen * 1000 >= self.total * part {
                let (power, step) = (i / 16, (i % 16) as u64);
                let top = (1u64 << power) + ((step + 1) << (power - 4));
                return top.div_ceil(1000);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn percentiles_are_within_their_bucket() {
        let mut h = Histogram::default();
        assert_eq!(h.at(500), 0);
        (1..=1000).for_each(|us| h.add(Duration::from_micros(us)));
        for part in [500, 900, 990, 1000] {
            let got = h.at(part);
            assert!(got >= part && got <= part + part / 14 + 1, "{part}: {got}");
        }
    }
}
