//! Standing still at a named point of a migration, so that a test can cut a cable or kill a process exactly there.
//! Only in debug builds; in a release build nothing of it is left but empty functions.
//!
//! A test writes lines into `/run/transship/fault` on the node: a point's name, or the name and a container's id where only that
//! one's migration shall stand still. Whoever reaches it adds `POINT ID` to `fault.reached` beside it and waits until its line is
//! gone. Meanwhile it shows its peer signs of life, as a side does that works: a fault is what the test does to it.

use super::link::Link;

/// The points, in the order of a migration.
pub const POINTS: [&str; 20] = [
    // the source's agent has greeted the other one
    "offer",
    // the destination's agent is about to make the container
    "prepare",
    // the source's agent is about to have its shim connect
    "dial",
    // the destination's shim has greeted the other one
    "receive",
    // the source begins a round of the pre-copy, the first; one that is not the first
    "round",
    "later-round",
    // the source's tasks stand still
    "frozen",
    // CRIU has dumped them and waits; the last of what it named is about to be sent
    "dump",
    "final",
    // everything has come, CRIU waits in front of its restore; it restores
    "restoring",
    "restore",
    // the tasks stand at the second gate
    "held",
    // the source is about to send the commit; it has
    "commit",
    "sent",
    // the destination has it; the tasks run
    "committed",
    "running",
    // the source knows it, and memory is still to follow; the source is about to kill its copy
    "post-copy",
    "done",
    // the agents, when their shims are done
    "arrived",
    "moved",
];

#[cfg(debug_assertions)]
thread_local! {
    static CONTAINER: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

/// This thread works on that container's migration.
#[cfg(debug_assertions)]
pub fn container(id: &str) {
    CONTAINER.set(id.to_owned());
}

/// Waits here if a test wants it; `link` is the connection to the peer, if there is one.
#[cfg(debug_assertions)]
pub fn point(name: &str, link: Option<&Link>) {
    stand(name, &CONTAINER.with_borrow(Clone::clone), &|| {
        // a peer that is gone is for whoever uses the connection next to find
        link.map(|link| link.wire().alive().ok());
    });
}

/// The same in the agent, whose connections show signs of life by themselves.
#[cfg(debug_assertions)]
pub async fn pause(name: &'static str, id: &str) {
    let id = id.to_owned();
    tokio::task::spawn_blocking(move || stand(name, &id, &|| {})).await.ok();
}

#[cfg(debug_assertions)]
fn stand(name: &str, id: &str, alive: &dyn Fn()) {
    use std::{fs, io::Write, path::Path, thread, time::Duration};
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let fault = Path::new(crate::control::RUN_DIR).join("fault");
    let wanted = || fs::read_to_string(&fault).is_ok_and(|text| wants(&text, name, id));
    if !wanted() {
        return;
    }
    log::warn!("{id} stands still at {name}, as {} says", fault.display());
    let reached = fs::OpenOptions::new().create(true).append(true).open(fault.with_extension("reached"));
    reached.and_then(|mut file| file.write_all(format!("{name} {id}\n").as_bytes())).ok();
    // a test that died must not leave a container frozen for good
    for _ in 0..12_000 {
        if !wanted() {
            return;
        }
        alive();
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(debug_assertions)]
fn wants(text: &str, name: &str, id: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some(name) && words.next().is_none_or(|only| only == id)
    })
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub fn container(_: &str) {}

/// Nothing.
#[cfg(not(debug_assertions))]
pub fn point(_: &str, _: Option<&Link>) {}

/// Nothing.
#[cfg(not(debug_assertions))]
pub async fn pause(_: &'static str, _: &str) {}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_for_all_or_for_one() {
        assert!(wants("held\n", "held", "a") && wants("round x\nheld a\n", "held", "a"));
        assert!(!wants("held b\n", "held", "a") && !wants("", "held", "a") && !wants("helden", "held", "a"));
    }
}
