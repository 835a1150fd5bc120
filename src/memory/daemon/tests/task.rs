//! The tasks of the tests: this test binary, started again. They register memory and hand it over as a task that CRIU restores does,
//! then use it and check every word that they read.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::super::handshake::FINISHED;

pub const P: u64 = 4096;
/// Where the memory is: far from everything else, AddressSanitizer's shadow too.
pub const BASE: u64 = 0x2000_0000_0000;
/// Where memory is moved to.
const ELSEWHERE: u64 = 0x2800_0000_0000;
/// The pid that the task says it has.
pub const PID: i32 = 77;

/// From this page on there is content in every one.
pub const DENSE: u64 = 100_000;

/// What is in page `n`: nothing in two of sixteen, otherwise words that say which page it is.
pub fn content(n: u64) -> Option<u64> {
    (n % 16 < 14 || n >= DENSE).then(|| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
}

pub fn page(word: u64) -> Vec<u8> {
    word.to_ne_bytes().repeat((P / 8) as usize)
}

/// Runs as a task if that is what the process was started as.
pub fn main_if_invoked(args: &[String]) -> Option<i32> {
    if args.get(1).map(String::as_str) != Some("transship-test-task") {
        return None;
    }
    let pages: u64 = args[4].parse().unwrap();
    if args[2] == "tree" {
        tree(Path::new(&args[3]), pages);
        return Some(0);
    }
    register(Path::new(&args[3]), pages);
    match args[2].as_str() {
        "random" => random_reads(pages, 4),
        "fork" => forks(pages),
        "churn" => {
            let until = Instant::now() + Duration::from_millis(700);
            churn(pages, args[5].parse().unwrap(), &|| Instant::now() > until);
        }
        "exec" => exec(pages),
        "latency" => latency(pages),
        "one" => one(args[5].parse().unwrap()),
        "sleep1" => std::thread::sleep(Duration::from_millis(1500)),
        "sleep" => std::thread::sleep(Duration::from_secs(60)),
        other => panic!("{other}"),
    }
    Some(0)
}

fn map(at: u64, pages: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let got = unsafe { libc::mmap(at as *mut _, (pages * P) as usize, 3, flags, -1, 0) };
    assert_eq!(got as u64, at, "{}", std::io::Error::last_os_error());
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Maps and registers memory as CRIU's restorer does.
pub fn registered(base: u64, pages: u64) -> OwnedFd {
    map(base, pages);
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as RawFd;
    assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    // FORK, REMAP, REMOVE, UNMAP: CRIU's NEED_UFFD_API_FEATURES.
    let mut api = Api { api: 0xaa, features: 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, ioctls: 0 };
    assert_eq!(
        unsafe { libc::ioctl(fd, 0xc018_aa3f, &raw mut api) },
        0,
        "{}",
        std::io::Error::last_os_error()
    );
    let mut range = Register { start: base, len: pages * P, mode: 1, ioctls: 0 };
    assert_eq!(
        unsafe { libc::ioctl(fd, 0xc020_aa00, &raw mut range) },
        0,
        "{}",
        std::io::Error::last_os_error()
    );
    uffd
}

/// CRIU's restore, as the daemon sees it.
fn register(socket: &Path, pages: u64) {
    let uffd = registered(BASE, pages);
    let stream = UnixStream::connect(socket).unwrap();
    let say = |bytes: &[u8], fds: &[RawFd]| {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let n = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None);
        assert_eq!(n.unwrap(), bytes.len());
    };
    say(&(-5i32).to_ne_bytes(), &[]); // a zombie
    say(&PID.to_ne_bytes(), &[]);
    say(&[0], &[uffd.as_raw_fd()]);
    drop(uffd);
    say(&FINISHED.to_ne_bytes(), &[]);
}

fn read(at: u64) -> [u64; 3] {
    [at, at + P / 2, at + P - 8].map(|a| unsafe { (a as *const u64).read_volatile() })
}

fn check(at: u64, want: Option<u64>) {
    let got = read(at);
    let want = [want.unwrap_or(0); 3];
    if got != want {
        eprintln!("WRONG at {at:#x}: {got:x?} instead of {want:x?}");
        // Not an exit code that any signal or panic gives.
        unsafe { libc::_exit(42) };
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Several threads read everything in random order.
fn random_reads(pages: u64, threads: u64) {
    std::thread::scope(|s| {
        for t in 0..threads {
            s.spawn(move || {
                let mut random = Random(t);
                (0..pages).for_each(|_| {
                    let n = random.below(pages);
                    check(BASE + n * P, content(n));
                });
            });
        }
    });
    (0..pages).for_each(|n| check(BASE + n * P, content(n)));
}

fn fork(child: impl FnOnce()) -> i32 {
    match unsafe { libc::fork() } {
        0 => {
            child();
            unsafe { libc::_exit(0) }
        }
        pid => {
            assert!(pid > 0);
            pid
        }
    }
}

fn wait(pid: i32) {
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if status != 0 {
        eprintln!("child: {status:#x}");
        unsafe { libc::_exit(43) };
    }
}

/// Forks at once and again; all read everything, and write into their own copies.
fn forks(pages: u64) {
    let own = |n: u64, who: u64| {
        check(BASE + n * P, content(n));
        if n % 3 == who {
            (0..P / 8).for_each(|i| unsafe {
                ((BASE + n * P) as *mut u64).add(i as usize).write_volatile(who + 1)
            });
        }
    };
    let see = |n: u64, who: u64| check(BASE + n * P, if n % 3 == who { Some(who + 1) } else { content(n) });
    let all = |who: u64| {
        (0..pages).rev().for_each(|n| own(n, who));
        (0..pages).for_each(|n| see(n, who));
    };
    let child = fork(|| {
        let grandchild = fork(|| all(0));
        all(1);
        wait(grandchild);
    });
    let short = fork(|| check(BASE, content(0)));
    all(2);
    wait(short);
    wait(child);
}

fn exec(pages: u64) {
    let child = fork(|| {
        check(BASE + P, content(1));
        unsafe { libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), std::ptr::null::<libc::c_char>()) };
    });
    check(BASE + (pages - 20) * P, content(pages - 20));
    wait(child);
    unsafe { libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), std::ptr::null::<libc::c_char>()) };
}

fn one(n: u64) {
    check(BASE + n * P, content(n));
}

fn pages_of(at: u64, len: u64) -> impl Iterator<Item = u64> {
    (at..at + len).step_by(P as usize)
}

fn is_mapped(at: u64) -> bool {
    unsafe { libc::msync(at as *mut _, P as usize, libc::MS_ASYNC) == 0 }
}

/// Changes its mappings in every way that the daemon hears of, and knows at all times what has to be where.
fn churn(pages: u64, seed: u64, stop: &dyn Fn() -> bool) {
    let mut random = Random(seed);
    let mut want: BTreeMap<u64, Option<u64>> = (0..pages).map(|n| (BASE + n * P, content(n))).collect();
    let mut elsewhere = ELSEWHERE;
    let mut done = [0u32; 7];
    while !stop() {
        let from = BASE + random.below(pages) * P;
        let Some((&at, _)) = want.range(from..).next().or_else(|| want.range(ELSEWHERE..).next()) else {
            break;
        };
        let at =
            if random.below(3) == 0 { want.range(ELSEWHERE..).next().map_or(at, |(a, _)| *a) } else { at };
        // As many neighbouring pages as there are, up to 40.
        let most = random.below(40) + 1;
        let len = (0..most).take_while(|i| want.contains_key(&(at + i * P))).count() as u64 * P;
        let (p, bytes) = (at as *mut libc::c_void, len as usize);
        let what = random.below(40);
        match what {
            0 => {
                assert_eq!(unsafe { libc::madvise(p, bytes, libc::MADV_DONTNEED) }, 0);
                want.range_mut(at..at + len).for_each(|(_, w)| *w = None);
                done[0] += 1;
            }
            1 => {
                assert_eq!(unsafe { libc::munmap(p, bytes) }, 0);
                for a in pages_of(at, len) {
                    want.remove(&a);
                }
                done[1] += 1;
            }
            2 => {
                map(at, len / P);
                want.range_mut(at..at + len).for_each(|(_, w)| *w = None);
                done[2] += 1;
            }
            3..=5 => {
                let to = elsewhere;
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                unsafe { libc::mremap(p, bytes, bytes, flags, to as *mut libc::c_void) };
                elsewhere += len + P;
                // When the range is of several mappings, some of them may have moved before it failed (Linux 6.17).
                for a in pages_of(at, len).filter(|a| is_mapped(a - at + to)) {
                    let content = want.remove(&a).unwrap();
                    want.insert(a - at + to, content);
                    done[3] += 1;
                }
            }
            6 => {
                let sample: Vec<_> = want.iter().step_by(37).map(|(a, w)| (*a, *w)).collect();
                let pid = fork(|| {
                    sample.iter().for_each(|(a, w)| check(*a, *w));
                    unsafe { libc::madvise(p, bytes, libc::MADV_DONTNEED) };
                    check(at, None);
                });
                wait(pid);
                done[4] += 1;
            }
            7 => {
                assert_eq!(unsafe { libc::mprotect(p, bytes, 1) }, 0);
                check(at, want[&at]);
                assert_eq!(unsafe { libc::mprotect(p, bytes, 3) }, 0);
            }
            8..=15 => {
                let word = random.below(1 << 30) + 1;
                (0..P / 8).for_each(|i| unsafe { (at as *mut u64).add(i as usize).write_volatile(word) });
                want.insert(at, Some(word));
                done[5] += 1;
            }
            _ => {
                check(at, want[&at]);
                done[6] += 1;
            }
        }
    }
    want.iter().for_each(|(a, w)| check(*a, *w));
    eprintln!(
        "churn: dontneed {}, munmap {}, mmap {}, mremap {}, fork {}, writes {}, reads {}",
        done[0], done[1], done[2], done[3], done[4], done[5], done[6]
    );
}

/// How long an access takes that has to wait for the daemon: alone before the fill, then while it runs.
fn latency(pages: u64) {
    let mut random = Random(1);
    let mut measure = |name: &str, count: u64| {
        let mut took: Vec<f64> = Vec::new();
        for _ in 0..count {
            let n = random.below(pages);
            let begun = Instant::now();
            check(BASE + n * P, content(n));
            took.push(begun.elapsed().as_nanos() as f64 / 1e3);
            std::thread::sleep(Duration::from_micros(50));
        }
        took.retain(|t| *t > 1.5);
        took.sort_by(f64::total_cmp);
        let at = |part: f64| took.get(((took.len() as f64 - 1.0) * part) as usize).copied().unwrap_or(0.0);
        eprintln!(
            "{name}: {} faults, median {:.1} us, p90 {:.1}, p99 {:.1}, max {:.1}",
            took.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    };
    measure("before the fill", 1500);
    std::thread::sleep(Duration::from_millis(300));
    measure("during the fill", 4000);
    (0..pages).for_each(|n| check(BASE + n * P, content(n)));
}

/// A tree of processes that CRIU dumps at any moment: all of them change their mappings all the time and check what they read, one with a
/// second thread. `dir/stop` ends it; `dir/result` then has one line for each process that found no wrong byte.
fn tree(dir: &Path, pages: u64) {
    map(BASE, pages);
    let fill = |base: u64| {
        for (n, word) in (0..pages).filter_map(|n| content(n).map(|w| (n, w))) {
            (0..P / 8).for_each(|i| unsafe { ((base + n * P) as *mut u64).add(i as usize).write(word) });
        }
    };
    fill(BASE);
    let stopped = || dir.join("stop").exists();
    let result = |line: &str| {
        use std::io::Write;
        let file = std::fs::OpenOptions::new().append(true).create(true).open(dir.join("result"));
        file.unwrap().write_all(line.as_bytes()).unwrap();
    };
    let children: Vec<i32> = (1..=2)
        .map(|seed| {
            fork(|| {
                churn(pages, seed, &stopped);
                result("child\n");
            })
        })
        .collect();
    let quiet = ELSEWHERE * 2;
    map(quiet, pages);
    fill(quiet);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut random = Random(9);
            while !stopped() {
                let n = random.below(pages);
                check(quiet + n * P, content(n));
            }
            (0..pages).for_each(|n| check(quiet + n * P, content(n)));
        });
        result("ready\n");
        churn(pages, 3, &stopped);
    });
    children.into_iter().for_each(wait);
    result("parent\n");
}
