//! Nothing of the tracking is left in the tasks: no descriptor at any time, no registration after the end.

use std::time::Duration;

use super::*;

fn userfaultfds(pid: i32) -> usize {
    let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    dir.filter(|e| {
        let link = e.as_ref().ok().and_then(|e| std::fs::read_link(e.path()).ok());
        link.is_some_and(|l| l.to_string_lossy().contains("userfaultfd"))
    })
    .count()
}

/// Mappings with the kernel's flag for write protection by userfaultfd.
fn registered(pid: i32) -> usize {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    smaps.lines().filter(|l| l.starts_with("VmFlags:") && l.split(' ').any(|f| f == "uw")).count()
}

#[test]
fn nothing_stays_in_the_tasks() {
    if let Some(why) = missing(TrackerKind::UffdWp) {
        return println!("skipped: {why}");
    }
    let family = Family::start("random,file,shared", 5);
    // The child and the lasting writer of the shared memory; others come and go.
    let until = Instant::now() + Duration::from_secs(10);
    let mut tasks = family.tasks();
    while tasks.len() < 2 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
        tasks = family.tasks();
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(tasks.len() >= 2, "{tasks:?}");
    tasks.truncate(2);
    let descriptors = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before: Vec<_> = tasks.iter().map(|t| descriptors(t.pid)).collect();
    for end in ["stop", "drop"] {
        let mut tracker = open(TrackerKind::UffdWp).unwrap();
        tracker.look(&tasks, false).unwrap();
        for (task, n) in tasks.iter().zip(&before) {
            assert_eq!(userfaultfds(task.pid), 0);
            assert_eq!(descriptors(task.pid), *n);
            assert!(registered(task.pid) > 0, "tracking has begun");
        }
        match end {
            "stop" => tracker.stop().unwrap(),
            _ => drop(tracker),
        }
        let until = Instant::now() + Duration::from_secs(5);
        while end == "drop" && tasks.iter().any(|t| registered(t.pid) > 0) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        for task in &tasks {
            assert_eq!(registered(task.pid), 0, "{end}");
            let status = std::fs::read_to_string(format!("/proc/{}/status", task.pid)).unwrap();
            assert!(status.contains("TracerPid:\t0"), "{status}");
        }
    }
}
