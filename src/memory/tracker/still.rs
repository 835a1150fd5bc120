//! A task held still for a moment, by its cgroup's freezer.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cgroup::Freezer;

/// A cgroup that is thawed on drop.
#[derive(Debug)]
pub struct Still(Freezer);

impl Still {
    /// Freezes the task's cgroup. None: it is frozen already, by somebody who will thaw it. An error where the cgroup is ours too, or
    /// the root.
    pub fn new(pid: i32) -> Result<Option<Self>> {
        let freezer = Freezer::of_pid(pid)?;
        if Freezer::of_pid(std::process::id() as i32).is_ok_and(|own| own.path().starts_with(freezer.path()))
        {
            bail!("task {pid} is in a cgroup of ours ({})", freezer.path().display());
        }
        if freezer.is_frozen()? {
            return Ok(None);
        }
        let still = Self(freezer);
        if !still.0.freeze(Duration::from_secs(2))? {
            bail!("{} did not freeze within 2 s", still.0.path().display());
        }
        Ok(Some(still))
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if let Err(e) = self.0.thaw() {
            log::error!("thawing {} after a look at its memory: {e:#}", self.0.path().display());
        }
    }
}
