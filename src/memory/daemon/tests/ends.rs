//! Ends other than the good one.

use super::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::ExitStatusExt;

/// What the test binary does as a daemon that will be killed: it has a keeper, and a task that waits for a page that never comes.
pub fn doomed_daemon(args: &[String]) -> i32 {
    struct Never(std::os::unix::net::UnixStream);
    impl Remote for Never {
        fn fd(&self) -> RawFd {
            std::os::fd::AsRawFd::as_raw_fd(&self.0)
        }
        fn ask(&mut self, _: Space, _: Range<u64>) -> Result<()> {
            println!("asked");
            Ok(())
        }
        fn take(&mut self, _: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<Came> {
            Ok(Came::Nothing)
        }
    }
    let mut cfg = DaemonConfig::new(PathBuf::from(&args[2]));
    if args[3] == "with" {
        let keeper = Keeper::start(&std::env::current_exe().unwrap(), KEEPER).unwrap();
        println!("keeper {}", keeper.pid());
        cfg.keeper = Some(keeper);
    }
    let daemon = Daemon::listen(cfg).unwrap();
    println!("listening");
    let sets = LazySets { lazy: Vec::new(), remote: vec![(SPACE, RangeSet::from(BASE..BASE + 100 * P))] };
    let remote = Box::new(Never(std::os::unix::net::UnixStream::pair().unwrap().0));
    let store = Store::new(0).unwrap();
    daemon.run(store, &sets, Some(remote), DaemonCtl::new().unwrap(), &mut |_| {}).unwrap();
    0
}

/// Kills a daemon whose task waits for a page; how the task ends, and the keeper's pid and resident KiB.
fn killed_daemon(keeper: &str) -> (ExitStatus, Option<(i32, u64)>) {
    use std::io::{BufRead, BufReader};
    let bed = Bed::new(100);
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["transship-test-doomed".as_ref(), bed.dir.path().join(SOCKET).as_os_str(), keeper.as_ref()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines().map(|l| l.unwrap());
    let pid = (keeper == "with").then(|| lines.next().unwrap()["keeper ".len()..].parse::<i32>().unwrap());
    assert_eq!(lines.next().unwrap(), "listening");
    let mut task = bed.task("one", 5);
    assert_eq!(lines.next().unwrap(), "asked");
    std::thread::sleep(Duration::from_millis(50));
    // what it has of its own; how much of this test program is mapped in does not matter
    let rss = pid.map(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
        (pid, line.trim().trim_end_matches(" kB").parse().unwrap())
    });
    assert!(task.try_wait().unwrap().is_none());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    (wait(&mut task), rss)
}

#[test]
fn the_keeper_kills_the_tasks_of_a_daemon_that_died() {
    if skip() {
        return;
    }
    let (status, keeper) = killed_daemon("with");
    assert_eq!(status.signal(), Some(9), "{status}: killed, not full of zeros");
    let (pid, rss) = keeper.unwrap();
    println!("the keeper's own memory: {rss} KiB");
    assert!(rss < 4 << 10, "{rss} KiB");
    let begun = Instant::now();
    while kill(Pid::from_raw(pid), None).is_ok() && !is_zombie(pid) {
        assert!(begun.elapsed() < Duration::from_secs(5), "the keeper stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z"))
}

/// Why there is a keeper.
#[test]
fn without_a_keeper_the_task_reads_zeros() {
    if skip() {
        return;
    }
    let (status, _) = killed_daemon("without");
    assert_eq!(status.code(), Some(42), "{status}: if the kernel no longer does this, the keeper can go");
}

#[test]
fn a_keeper_holds_nothing_when_all_is_done() {
    if skip() {
        return;
    }
    let keeper = Keeper::start(&std::env::current_exe().unwrap(), KEEPER).unwrap();
    let pid = i32::try_from(keeper.pid()).unwrap();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
    std::thread::sleep(Duration::from_millis(50));
    drop(fds);
    let names: Vec<PathBuf> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|e| std::fs::read_link(e.unwrap().path()).unwrap())
        // its stdout and stderr
        .filter(|name| name != std::path::Path::new("/dev/null"))
        .collect();
    assert_eq!(names.len(), 2, "the socket and the daemon's pidfd: {names:?}");
    let (stats, status) = Bed::new(500).local("fork", 0, |c| c.keeper = Some(keeper));
    assert!(status.success() && stats.complete);
    assert!(
        kill(Pid::from_raw(pid), Some(Signal::SIGURG)).is_err() || is_zombie(pid),
        "the keeper has ended"
    );
}

#[test]
fn a_restore_that_fails_ends_the_daemon() {
    if skip() {
        return;
    }
    let bed = Bed::new(10);
    let daemon = bed.listen(|_| {});
    let (store, lazy) = bed.store(|_| true);
    let sets = LazySets { lazy: vec![(SPACE, lazy)], remote: Vec::new() };
    std::os::unix::net::UnixStream::connect(bed.dir.path().join(SOCKET)).unwrap();
    let e = daemon.run(store, &sets, None, DaemonCtl::new().unwrap(), &mut |_| {}).unwrap_err();
    assert!(format!("{e:#}").contains("before all tasks were there"), "{e:#}");
    assert!(!bed.dir.path().join(SOCKET).exists());
}

#[test]
fn an_abort_is_heard_before_and_during_a_restore() {
    if skip() {
        return;
    }
    let bed = Bed::new(100);
    let sets = |lazy| LazySets { lazy: vec![(SPACE, lazy)], remote: Vec::new() };
    let (store, lazy) = bed.store(|_| true);
    let ctl = DaemonCtl::new().unwrap();
    ctl.abort();
    let stats = bed.listen(|_| {}).run(store, &sets(lazy), None, ctl, &mut |_| {}).unwrap();
    assert!(!stats.complete);

    let (store, lazy) = bed.store(|_| true);
    let daemon = bed.listen(|c| c.fill_delay = Duration::from_secs(60));
    let mut task = bed.task("sleep", 0);
    let mut end = || {
        task.kill().unwrap();
        task.wait().unwrap();
    };
    let ctl = DaemonCtl::new().unwrap();
    let orders = ctl.clone();
    let stats = daemon
        .run(store, &sets(lazy), None, ctl, &mut |event| {
            if event == DaemonEvent::Restored {
                end();
                orders.abort();
            }
        })
        .unwrap();
    assert!(!stats.complete);
}

#[test]
fn pages_that_are_nowhere_are_an_error_before_anything_happens() {
    let bed = Bed::new(100);
    let (store, mut lazy) = bed.store(|n| n != 50);
    lazy.insert(BASE + 50 * P..BASE + 51 * P);
    let sets = LazySets { lazy: vec![(SPACE, lazy)], remote: Vec::new() };
    let e = bed.listen(|_| {}).run(store, &sets, None, DaemonCtl::new().unwrap(), &mut |_| {}).unwrap_err();
    assert!(format!("{e:#}").contains("4096 bytes"), "{e:#}");
}

/// Asking whether a memory lives must not put anything into it.
#[test]
fn the_question_whether_a_task_lives_leaves_its_memory_alone() {
    if skip() {
        return;
    }
    let uffd = uffd::Uffd::new(task::registered(uffd::PROBE, 1)).unwrap();
    assert!(!uffd.exited(P));
    assert_eq!(
        uffd.copy(uffd::PROBE, &page(7)).unwrap(),
        uffd::Placed::Done(P),
        "the page was missing still"
    );
    assert!(!uffd.exited(P));
}
