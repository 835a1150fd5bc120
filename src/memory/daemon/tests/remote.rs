//! Pages that are still on the source: a source that is a thread, and one that dies.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use anyhow::bail;

use super::*;

/// What the source of a test does.
struct Source {
    socket: UnixStream,
    /// Still to be sent, as numbers of pages, those that were asked for first.
    todo: Arc<Mutex<VecDeque<u64>>>,
    asked: Arc<Mutex<Vec<u64>>>,
    /// Answers only what it is asked for, and fails after so many pages.
    dies_after: Option<usize>,
    sent: usize,
}

impl Source {
    /// A page is sent for each byte of the socket; the other end is what drives it.
    fn new(
        pages: impl Iterator<Item = u64>,
        dies_after: Option<usize>,
    ) -> (Self, UnixStream, Arc<Mutex<Vec<u64>>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let source = Self {
            socket: theirs,
            todo: Arc::new(Mutex::new(pages.collect())),
            asked: asked.clone(),
            dies_after,
            sent: 0,
        };
        (source, ours, asked)
    }
}

impl Remote for Source {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn ask(&mut self, space: Space, range: Range<u64>) -> Result<()> {
        assert_eq!(space, SPACE);
        let mut todo = self.todo.lock().unwrap();
        for n in (range.start..range.end).step_by(P as usize).map(|a| (a - BASE) / P) {
            self.asked.lock().unwrap().push(n);
            let at = todo.iter().position(|m| *m == n).expect("asked once, and for what is there");
            todo.remove(at);
            todo.push_front(n);
        }
        Ok(())
    }

    fn take(&mut self, put: &mut dyn FnMut(Space, Chunk<'_>) -> Result<()>) -> Result<Came> {
        let came = |todo: &Mutex<VecDeque<u64>>, otherwise| match todo.lock().unwrap().is_empty() {
            true => Came::Everything,
            false => otherwise,
        };
        let mut tokens = [0; 64];
        let n = match self.socket.read(&mut tokens) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                return Ok(came(&self.todo, Came::Nothing));
            }
            Err(e) => return Err(e.into()),
        };
        for _ in 0..n {
            if self.dies_after.is_some_and(|n| n <= self.sent) {
                bail!("the link is down");
            }
            let Some(n) = self.todo.lock().unwrap().pop_front() else { return Ok(Came::Everything) };
            let vaddr = BASE + n * P;
            match content(n) {
                Some(word) => put(SPACE, Chunk::Data { vaddr, bytes: &page(word) })?,
                None => put(SPACE, Chunk::Zero { vaddr, len: P })?,
            }
            self.sent += 1;
        }
        Ok(came(&self.todo, Came::Something))
    }
}

fn is_remote(n: u64) -> bool {
    n % 5 < 2
}

/// Bytes until the other end is gone: the source sends at this pace.
fn pace(mut socket: UnixStream, pause: Duration) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while socket.write_all(&[0; 4]).is_ok() {
            std::thread::sleep(pause);
        }
    })
}

fn sets(bed: &Bed) -> (Store, LazySets) {
    let (store, lazy) = bed.store(|n| !is_remote(n));
    let remote = (0..bed.pages).filter(|n| is_remote(*n)).map(|n| BASE + n * P..BASE + (n + 1) * P).collect();
    (store, LazySets { lazy: vec![(SPACE, lazy.difference(&remote))], remote: vec![(SPACE, remote)] })
}

#[test]
fn pages_on_the_source_are_asked_for_when_they_are_needed() {
    if skip() {
        return;
    }
    for what in ["random", "fork", "churn"] {
        let bed = Bed::new(3000);
        let (store, sets) = sets(&bed);
        let daemon = bed.listen(|c| c.fill_delay = Duration::from_millis(30));
        let (source, socket, asked) = Source::new((0..bed.pages).filter(|n| is_remote(*n)), None);
        let mut task = bed.task(what, 5);
        let pace = pace(socket, Duration::from_micros(400));
        let ctl = DaemonCtl::new().unwrap();
        let stats = daemon.run(store, &sets, Some(Box::new(source)), ctl, &mut |_| {}).unwrap();
        let status = super::wait(&mut task);
        assert!(status.success() && stats.complete, "{what}: {status} {stats:?}");
        assert!(
            stats.faults_remote > 10 && stats.remote_bytes > 0 && stats.unplaced_bytes == 0,
            "{what}: {stats:?}"
        );
        let mut asked = asked.lock().unwrap().clone();
        let all = asked.len();
        asked.sort_unstable();
        asked.dedup();
        assert_eq!(asked.len(), all, "{what}: nothing is asked for twice");
        pace.join().unwrap();
    }
}

/// A workload that has written everything again since the rounds would otherwise need its memory twice on the destination.
#[test]
fn what_was_stored_and_is_newer_on_the_source_makes_room_as_that_comes() {
    if skip() {
        return;
    }
    let bed = Bed::new(4000);
    // in one piece: small places go with what is around them
    let old: Vec<u64> = (2000..bed.pages).collect();
    let (mut store, lazy) = bed.store(|n| n < 2000);
    let local = store.bytes();
    for n in &old {
        store.put(SPACE, BASE + n * P, &page(0xdead)).unwrap();
    }
    let remote = RangeSet::from(BASE + 2000 * P..BASE + bed.pages * P);
    let sets = LazySets { lazy: vec![(SPACE, lazy.difference(&remote))], remote: vec![(SPACE, remote)] };
    let daemon = bed.listen(|c| c.fill_delay = Duration::from_millis(5));
    let (source, socket, _) = Source::new(old.iter().copied(), None);
    let mut task = bed.task("random", 5);
    let pace = pace(socket, Duration::from_micros(100));
    let ctl = DaemonCtl::new().unwrap();
    let stats = daemon.run(store, &sets, Some(Box::new(source)), ctl, &mut |_| {}).unwrap();
    let status = super::wait(&mut task);
    assert!(status.success() && stats.complete && stats.unplaced_bytes == 0, "{status} {stats:?}");
    // what is given back at the very end is not counted
    let before_the_end = local + old.len() as u64 * P - (4 << 20);
    assert!(stats.given_back_bytes > before_the_end, "{before_the_end} {stats:?}");
    pace.join().unwrap();
}

#[test]
fn a_dead_source_is_told_and_another_one_can_take_over() {
    if skip() {
        return;
    }
    let bed = Bed::new(2000);
    let (store, sets) = sets(&bed);
    let daemon = bed.listen(|c| c.fill_delay = Duration::from_millis(5));
    let all: Vec<u64> = (0..bed.pages).filter(|n| is_remote(*n)).collect();
    let (source, socket, _) = Source::new(all.iter().copied(), Some(100));
    let pace_1 = pace(socket, Duration::from_micros(200));
    let mut task = bed.task("random", 0);
    let ctl = DaemonCtl::new().unwrap();
    let (orders, pace_2) = (ctl.clone(), Mutex::new(None));
    let lost = Mutex::new(Vec::new());
    let stats = daemon
        .run(store, &sets, Some(Box::new(source)), ctl, &mut |event| {
            if let DaemonEvent::Lost { missing, why } = event {
                assert_eq!(why, "the link is down");
                let pages: Vec<u64> = missing[0]
                    .1
                    .iter()
                    .flat_map(|r| (r.start..r.end).step_by(P as usize))
                    .map(|a| (a - BASE) / P)
                    .collect();
                let (source, socket, _) = Source::new(pages.iter().copied(), None);
                *lost.lock().unwrap() = pages;
                *pace_2.lock().unwrap() = Some(pace(socket, Duration::from_micros(200)));
                orders.go_on(Box::new(source));
            }
        })
        .unwrap();
    assert!(super::wait(&mut task).success() && stats.complete, "{stats:?}");
    assert_eq!(lost.lock().unwrap().len(), all.len() - 100);
    pace_1.join().unwrap();
    pace_2.into_inner().unwrap().unwrap().join().unwrap();
}

#[test]
fn without_the_source_tasks_wait_until_they_are_killed() {
    if skip() {
        return;
    }
    let bed = Bed::new(200);
    let (store, sets) = sets(&bed);
    let daemon = bed.listen(|_| {});
    let (source, socket, _) = Source::new((0..bed.pages).filter(|n| is_remote(*n)), Some(0));
    let mut task = bed.task("one", 5);
    let pace = pace(socket, Duration::from_millis(1));
    let ctl = DaemonCtl::new().unwrap();
    let orders = ctl.clone();
    let (lost, told) = std::sync::mpsc::channel();
    let daemon = std::thread::spawn(move || {
        daemon.run(store, &sets, Some(Box::new(source)), ctl, &mut |event| {
            if let DaemonEvent::Lost { .. } = event {
                lost.send(()).unwrap();
            }
        })
    });
    told.recv_timeout(Duration::from_secs(10)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(task.try_wait().unwrap().is_none() && !daemon.is_finished(), "the task waits");
    task.kill().unwrap();
    task.wait().unwrap();
    orders.abort();
    assert!(!daemon.join().unwrap().unwrap().complete);
    pace.join().unwrap();
}
