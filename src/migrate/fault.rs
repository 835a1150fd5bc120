//! Standing still at a named point of a migration, so that a test can cut a cable or kill a process exactly there.
//! Only in debug builds; in a release build [`point`] is empty.
//!
//! A test writes the point's name into `/run/transship/fault` on the node. Whoever reaches it makes `fault.reached` beside
//! it and waits until `fault` is gone.

/// The points, in the order of a migration.
pub const POINTS: [&str; 9] =
    ["dial", "receive", "round", "frozen", "restoring", "held", "commit", "committed", "post-copy"];

/// Waits here if a test wants it.
#[cfg(debug_assertions)]
pub fn point(name: &str) {
    use std::{fs, path::Path, thread, time::Duration};
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let fault = Path::new(crate::control::RUN_DIR).join("fault");
    if !fs::read_to_string(&fault).is_ok_and(|wanted| wanted.trim() == name) {
        return;
    }
    log::warn!("standing still at {name}, as {} says", fault.display());
    fs::write(fault.with_extension("reached"), name).ok();
    // a test that died must not leave a container frozen for good
    for _ in 0..6000 {
        if !fault.exists() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub fn point(_: &str) {}
