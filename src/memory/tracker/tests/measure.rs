//! Figures, by hand: `cargo test --release -p transship --lib memory::tracker::tests::measure -- --ignored --nocapture`.

use super::*;
use crate::memory::inject;

#[test]
#[ignore = "figures, by hand"]
fn figures() {
    let family = Family::start("big", 1);
    std::thread::sleep(Duration::from_secs(3));
    let timed =
        |what: &str, began: Instant| println!("{what}: {:.3} ms", began.elapsed().as_secs_f64() * 1e3);
    for _ in 0..5 {
        let began = Instant::now();
        drop(inject::userfaultfd(family.pid()).unwrap());
        timed("inject, fetch, close", began);
    }
    let tasks = family.tasks();
    let mut tracker = open(TrackerKind::UffdWp).unwrap();
    for look in 0..8 {
        let began = Instant::now();
        let found = tracker.look(&tasks, false).unwrap();
        timed(
            &format!(
                "look {look}: {} KiB written",
                found.iter().map(|f| f.written.bytes()).sum::<u64>() >> 10
            ),
            began,
        );
        std::thread::sleep(Duration::from_millis(300));
    }
    let began = Instant::now();
    tracker.look(&tasks, true).unwrap();
    timed("last look", began);
    let began = Instant::now();
    tracker.stop().unwrap();
    timed("stop", began);
}
