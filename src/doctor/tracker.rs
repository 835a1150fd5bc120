//! Which way this kernel can tell dirty memory from clean, and whether it can tell mappings without counting their pages. The trackers
//! and their trials live in [`crate::memory::tracker`], mappings in [`crate::memory::smaps`]; this names what this node would use, and why
//! not something better.

use super::Finding;
use crate::memory::{smaps, tracker};

/// What [`gather`] saw: for each tracker whether the trial worked, or where it failed.
#[derive(Clone, Debug)]
pub struct Facts {
    /// userfaultfd with WP_ASYNC and PAGEMAP_SCAN.
    pub uffd_wp: Result<(), String>,
    /// The soft-dirty bit.
    pub soft_dirty: Result<(), String>,
}

/// Tries both.
pub fn gather() -> Facts {
    Facts { uffd_wp: tracker::try_uffd_wp(), soft_dirty: tracker::try_soft_dirty() }
}

/// The tracker that a migration from this node would use.
pub fn choice(facts: &Facts) -> tracker::TrackerKind {
    tracker::choose(facts.uffd_wp.is_ok(), || facts.soft_dirty.is_ok())
}

/// Never a failure: comparing pages works everywhere.
pub fn verdict(facts: &Facts) -> Finding {
    let why = |r: &Result<(), String>| match r {
        Ok(()) => "works".to_string(),
        Err(e) => e.clone(),
    };
    let found = format!(
        "{} (uffd-wp: {}; soft-dirty: {})",
        choice(facts),
        why(&facts.uffd_wp),
        why(&facts.soft_dirty)
    );
    match choice(facts) {
        tracker::TrackerKind::Hash => Finding::warn(
            "memory tracker",
            found,
            "every round of a live migration would read and compare all memory: Linux 6.7 or CONFIG_MEM_SOFT_DIRTY is advised",
        ),
        _ => Finding::ok("memory tracker", found),
    }
}

/// Whether CRIU can be spared looking at all memory, or why not.
pub fn spared() -> Result<(), &'static str> {
    if tracker::existing::known() { smaps::brief() } else { Err("no PAGEMAP_SCAN") }
}

/// Never a failure: then the freeze takes longer.
pub fn mappings(spared: Result<(), &str>) -> Finding {
    match spared {
        Ok(()) => Finding::ok("mappings", "read without counting their pages (BPF)"),
        Err(e) => Finding::warn(
            "mappings",
            format!("read with their pages counted ({e})"),
            "each GiB of a task makes its freeze at least 12 ms longer: Linux 6.7 with CONFIG_DEBUG_INFO_BTF is advised",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn facts(uffd: bool, soft: bool) -> Facts {
        let result = |ok: bool| if ok { Ok(()) } else { Err("no".to_string()) };
        Facts { uffd_wp: result(uffd), soft_dirty: result(soft) }
    }

    #[test]
    fn the_best_tracker_that_works_is_chosen() {
        assert_eq!(choice(&facts(true, true)), tracker::TrackerKind::UffdWp);
        assert_eq!(choice(&facts(false, true)), tracker::TrackerKind::SoftDirty);
        assert_eq!(choice(&facts(false, false)), tracker::TrackerKind::Hash);
        assert_eq!(verdict(&facts(false, false)).level, Level::Warn);
        assert_eq!(verdict(&facts(true, false)).level, Level::Ok);
    }

    #[test]
    fn slower_freezes_are_announced() {
        assert_eq!(mappings(Ok(())).level, Level::Ok);
        let finding = mappings(Err("no BTF"));
        assert_eq!((finding.level, finding.found.contains("no BTF")), (Level::Warn, true));
    }
}
