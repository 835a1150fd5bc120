//! nf_tables: the real fence is put up in a network namespace that nobody else sees, and taken down again.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use super::Finding;
use crate::net;

/// What [`gather`] saw: `Err` says at which step the trial failed.
pub type Facts = Result<(), String>;

/// Tries it.
pub fn gather() -> Facts {
    // A thread of its own: its network namespace ends with it.
    std::thread::spawn(|| trial().map_err(|e| format!("{e:#}")))
        .join()
        .unwrap_or_else(|_| Err("the trial panicked".into()))
}

/// The rule.
pub fn verdict(facts: &Facts) -> Finding {
    match facts {
        Ok(()) => Finding::ok("nf_tables", "a fence in a network namespace goes up and down"),
        Err(e) => Finding::fail(
            "nf_tables",
            e.clone(),
            "without a fence a connection ends by a reset while its container is away: modprobe nf_tables, run as root",
        ),
    }
}

fn trial() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for the trial")?;
    let netns = std::fs::File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")?;
    net::fence(netns.as_fd())?;
    ensure!(net::is_fenced(netns.as_fd())?, "the fence was put up and is not there");
    net::unfence(netns.as_fd())?;
    ensure!(!net::is_fenced(netns.as_fd())?, "the fence was taken down and is still there");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn the_trial_decides() {
        assert_eq!(verdict(&Ok(())).level, Level::Ok);
        assert_eq!(verdict(&Err("x".into())).level, Level::Fail);
    }
}
