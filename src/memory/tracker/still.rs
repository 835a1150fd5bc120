//! A task held still for a moment, by its cgroup's freezer.

use std::time::Duration;

use anyhow::Result;

use crate::cgroup::Freezer;

/// A cgroup that is thawed on drop.
#[derive(Debug)]
pub struct Still(Freezer);

/// What came of it.
#[derive(Debug)]
pub enum Held {
    /// Still until this is dropped.
    Still(Still),
    /// Frozen already, by somebody who will thaw it.
    Already,
    /// It has no cgroup of its own: in the root cgroup, or in ours.
    Never(String),
}

impl Still {
    /// Freezes the task's cgroup. An error if that takes too long: everything is thawed again.
    pub fn hold(pid: i32, timeout: Duration) -> Result<Held> {
        let freezer = match Freezer::of_pid(pid) {
            Ok(freezer) => freezer,
            Err(e) => return Ok(Held::Never(format!("{e:#}"))),
        };
        if Freezer::of_pid(std::process::id() as i32).is_ok_and(|own| own.path().starts_with(freezer.path()))
        {
            return Ok(Held::Never(format!("{} is ours, too", freezer.path().display())));
        }
        Ok(match freezer.freeze(timeout)? {
            true => Held::Already,
            false => Held::Still(Self(freezer)),
        })
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if let Err(e) = self.0.thaw() {
            log::error!("thawing {} after a look at its memory: {e:#}", self.0.path().display());
        }
    }
}
