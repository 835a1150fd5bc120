//! The process that the trackers are tried on: this test binary, started anew with what to do in its environment. Each deed runs in
//! threads of its own, on memory of its own, until the process is killed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::{Duration, Instant};

/// What the child does in a loop.
pub const DEEDS: [&str; 11] =
    ["random", "mmap", "remap", "mremap", "mprotect", "brk", "fork", "exec", "dontneed", "file", "shared"];
pub const VARIABLE: &str = "TRANSSHIP_TRACKER_CHILD";
const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// This test's own name for `--exact`.
pub fn name() -> String {
    format!("{}::child", module_path!().split_once("::").unwrap().1)
}

/// Deterministic numbers (splitmix64).
#[derive(Clone, Copy)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[test]
fn child() {
    let Ok(order) = std::env::var(VARIABLE) else { return };
    let (deeds, seed) = order.split_once(':').unwrap();
    let seed: u64 = seed.parse().unwrap();
    // whoever started us reads until this end: now it begins
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    // SAFETY: standard output stays open; what it leads to changes.
    assert_eq!(unsafe { libc::dup2(nowhere.as_raw_fd(), 1) }, 1);
    drop(nowhere);
    let threads: Vec<_> = deeds
        .split(',')
        .zip(0..)
        .flat_map(|(deed, i)| {
            let copies = if deed == "random" { 3 } else { 1 };
            (0..copies).map(move |c| (deed.to_string(), seed * 1000 + i * 10 + c))
        })
        .map(|(deed, seed)| std::thread::spawn(move || act(&deed, Random(seed))))
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

fn map(pages: usize, protection: i32, flags: i32, fd: i32) -> *mut u8 {
    // SAFETY: a fresh mapping; the kernel chooses the address.
    let p = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, fd, 0) };
    assert_ne!(p, libc::MAP_FAILED);
    p.cast()
}

/// Eight bytes somewhere in one of the pages.
fn write(at: *mut u8, pages: usize, r: &mut Random) {
    let offset = r.below(pages * PAGE / 8) * 8;
    // SAFETY: the callers' mappings are this long and writable.
    unsafe { at.add(offset).cast::<[u8; 8]>().write_volatile(r.next().to_ne_bytes()) };
}

fn writes(at: *mut u8, pages: usize, n: usize, r: &mut Random) {
    (0..n).for_each(|_| write(at, pages, r));
}

fn pause(r: &mut Random) {
    if r.below(4) == 0 {
        std::thread::sleep(Duration::from_micros(r.below(300) as u64));
    }
}

fn advise(at: *mut u8, pages: usize, advice: i32, r: &mut Random) {
    let first = r.below(pages);
    let n = 1 + r.below((pages - first).min(64));
    // SAFETY: part of the caller's mapping; nothing there is used as Rust values.
    unsafe { libc::madvise(at.add(first * PAGE).cast(), n * PAGE, advice) };
}

/// Forks; the child runs `f` and ends. It must only write memory and make system calls.
fn fork(f: impl FnOnce()) -> i32 {
    // SAFETY: see above.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        f();
        // SAFETY: no preconditions.
        unsafe { libc::_exit(0) };
    }
    assert!(pid > 0);
    pid
}

fn collect(pid: i32) {
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
}

#[allow(clippy::too_many_lines)]
fn act(deed: &str, mut r: Random) {
    let r = &mut r;
    match deed {
        "idle" => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        "big" => {
            // 1 GiB, then as many writes per second as there are; how many, and the longest pause between two, for the figures.
            let pages = 1 << 18;
            let at = map(pages, RW, ANON, -1);
            // SAFETY: our own mapping.
            (0..pages).for_each(|i| unsafe { at.add(i * PAGE).write_volatile(1) });
            loop {
                let (began, mut last, mut longest, mut n) =
                    (Instant::now(), Instant::now(), Duration::ZERO, 0);
                while began.elapsed() < Duration::from_millis(300) {
                    writes(at, pages, 100, r);
                    n += 100;
                    let now = Instant::now();
                    longest = longest.max(now - last);
                    last = now;
                }
                eprintln!("  {n} random writes in 300 ms, longest pause {longest:?}");
            }
        }
        "random" => {
            let pages = 4096;
            let at = map(pages, RW, ANON, -1);
            loop {
                let n = r.below(50);
                writes(at, pages, n, r);
                pause(r);
            }
        }
        "mmap" => {
            let mut live: Vec<(*mut u8, usize)> = Vec::with_capacity(16);
            loop {
                if live.len() >= 8 {
                    let (at, pages) = live.swap_remove(r.below(live.len()));
                    // SAFETY: a mapping of ours that nothing else uses.
                    unsafe { libc::munmap(at.cast(), pages * PAGE) };
                }
                let pages = 1 + r.below(200);
                let at = map(pages, RW, ANON, -1);
                writes(at, pages, pages, r);
                live.push((at, pages));
                let (at, pages) = live[r.below(live.len())];
                writes(at, pages, 20, r);
                pause(r);
            }
        }
        "remap" => {
            let pages = 256;
            let at = map(pages, RW, ANON, -1);
            writes(at, pages, 1000, r);
            loop {
                let first = r.below(pages);
                let n = 1 + r.below((pages - first).min(32));
                // SAFETY: replaces part of our own mapping.
                unsafe {
                    let part = at.add(first * PAGE);
                    libc::mmap(part.cast(), n * PAGE, RW, ANON | libc::MAP_FIXED, -1, 0);
                    writes(part, n, n, r);
                }
                writes(at, pages, 10, r);
                pause(r);
            }
        }
        "mremap" => {
            let (mut at, mut pages) = (map(64, RW, ANON, -1), 64usize);
            loop {
                writes(at, pages, 20, r);
                let to = 1 + r.below(300);
                // SAFETY: moves and resizes our own mapping; the old address is not used again.
                unsafe {
                    at = libc::mremap(at.cast(), pages * PAGE, to * PAGE, libc::MREMAP_MAYMOVE).cast();
                    assert_ne!(at.cast(), libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
                    pages = to;
                    writes(at, pages, 20, r);
                    // To another place for certain; the old one stays, empty, and is written a little before it goes.
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
                    // glibc reads a fifth argument with this flag.
                    let anywhere = ptr::null_mut::<libc::c_void>();
                    let moved: *mut u8 =
                        libc::mremap(at.cast(), pages * PAGE, pages * PAGE, flags, anywhere).cast();
                    assert_ne!(moved.cast(), libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
                    writes(at, pages, 3, r);
                    pause(r);
                    libc::munmap(at.cast(), pages * PAGE);
                    at = moved;
                }
            }
        }
        "mprotect" => {
            let pages = 128;
            let at = map(pages, RW, ANON, -1);
            writes(at, pages, 500, r);
            loop {
                let first = r.below(pages);
                let n = 1 + r.below((pages - first).min(32));
                // SAFETY: part of our own mapping, writable again before it is written.
                unsafe {
                    let part = at.add(first * PAGE);
                    let less = [libc::PROT_READ, libc::PROT_NONE][r.below(2)];
                    libc::mprotect(part.cast(), n * PAGE, less);
                    pause(r);
                    libc::mprotect(part.cast(), n * PAGE, RW);
                    writes(part, n, n, r);
                    if r.below(2) == 0 {
                        libc::mprotect(part.cast(), n * PAGE, libc::PROT_READ);
                        pause(r);
                        libc::mprotect(part.cast(), n * PAGE, RW);
                    }
                }
            }
        }
        "brk" => {
            let mut grown = 0usize;
            loop {
                let pages = 2 + r.below(64);
                // SAFETY: only what was grown here is written and given back, if nobody else has grown the heap since.
                unsafe {
                    let at: *mut u8 = libc::sbrk((pages * PAGE) as isize).cast();
                    writes(at, pages - 1, 50, r);
                    pause(r);
                    grown += pages;
                    if grown > 2000 && libc::sbrk(0) == at.add(pages * PAGE).cast() {
                        libc::sbrk(-((pages * PAGE) as isize));
                        grown -= pages;
                    }
                    if grown > 4000 {
                        std::thread::sleep(Duration::from_millis(50));
                        continue;
                    }
                }
            }
        }
        "fork" => {
            let pages = 512;
            let at = map(pages, RW, ANON, -1);
            writes(at, pages, 2000, r);
            loop {
                let mut theirs = Random(r.next());
                let pid = fork(|| {
                    let until = Instant::now() + Duration::from_millis(5 + theirs.below(60) as u64);
                    while Instant::now() < until {
                        writes(at, pages, 20, &mut theirs);
                    }
                });
                let until = Instant::now() + Duration::from_millis(r.below(40) as u64);
                while Instant::now() < until {
                    writes(at, pages, 10, r);
                    pause(r);
                }
                collect(pid);
            }
        }
        "exec" => {
            // A pid that lives on and whose memory does not.
            let seed = r.next() % 1_000_000;
            let order = format!("exec2:{seed}");
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", &name(), "--nocapture"])
                .env(VARIABLE, order)
                .stdout(std::process::Stdio::null());
            let mut child = command.spawn().unwrap();
            eprintln!("exec2: {:?}", child.wait());
            std::process::exit(3);
        }
        "exec2" => {
            let pages = 256;
            let at = map(pages, RW, ANON, -1);
            let until = Instant::now() + Duration::from_millis(10 + r.below(40) as u64);
            while Instant::now() < until {
                writes(at, pages, 20, r);
                pause(r);
            }
            let seed = r.next() % 1_000_000;
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", &name(), "--nocapture"]).env(VARIABLE, format!("exec2:{seed}"));
            panic!("{}", std::os::unix::process::CommandExt::exec(&mut command));
        }
        "dontneed" => {
            let pages = 512;
            let at = map(pages, RW, ANON, -1);
            loop {
                writes(at, pages, 30, r);
                advise(at, pages, libc::MADV_DONTNEED, r);
                // SAFETY: our own mapping.
                unsafe { at.add(r.below(pages) * PAGE).read_volatile() };
                pause(r);
            }
        }
        "file" => {
            let pages = 512;
            let file = tempfile::tempfile().unwrap();
            fill(&file, pages, r);
            let at = map(pages, RW, libc::MAP_PRIVATE, file.as_raw_fd());
            loop {
                writes(at, pages, 30, r);
                advise(at, pages, libc::MADV_DONTNEED, r);
                let read = r.below(pages) * PAGE;
                // SAFETY: our own mapping.
                unsafe { at.add(read).read_volatile() };
                if r.below(8) == 0 {
                    // As the dynamic linker does with relocated data.
                    let part = r.below(pages - 8) * PAGE;
                    // SAFETY: our own mapping, writable again afterwards.
                    unsafe {
                        libc::mprotect(at.add(part).cast(), 8 * PAGE, libc::PROT_READ);
                        pause(r);
                        libc::mprotect(at.add(part).cast(), 8 * PAGE, RW);
                    }
                }
                pause(r);
            }
        }
        "shared" => {
            let pages = 512;
            let at = map(pages, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
            // SAFETY: a new segment, removed when its last mapping goes.
            let segment: *mut u8 = unsafe {
                let id = libc::shmget(libc::IPC_PRIVATE, pages * PAGE, 0o600);
                let p = libc::shmat(id, ptr::null(), 0);
                libc::shmctl(id, libc::IPC_RMID, ptr::null_mut());
                p.cast()
            };
            let mut theirs = Random(r.next());
            let writer = |r: &mut Random| {
                for _ in 0..500 {
                    writes(at, pages, 10, r);
                    writes(segment, pages, 10, r);
                    pause(r);
                }
            };
            fork(|| {
                loop {
                    writer(&mut theirs);
                }
            });
            loop {
                writer(r);
                // Takes the entries, not the content: as reclaim does.
                advise(at, pages, libc::MADV_DONTNEED, r);
                advise(at, pages, libc::MADV_REMOVE, r);
                // A writer that comes and goes, long enough for a look to see it.
                let mut theirs = Random(r.next());
                if r.below(4) == 0 {
                    collect(fork(|| writer(&mut theirs)));
                }
            }
        }
        other => panic!("no deed {other}"),
    }
}

fn fill(file: &File, pages: usize, r: &mut Random) {
    use std::os::unix::fs::FileExt;
    let mut page = [0; PAGE];
    for i in 0..pages {
        page.fill(r.next() as u8);
        file.write_all_at(&page, (i * PAGE) as u64).unwrap();
    }
}
