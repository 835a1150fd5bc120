//! Memory that two processes share and write in turns: a page belongs to one of them until it has written it. Anonymous, a memfd,
//! a System V segment, a file in /dev/shm (which one of the two also writes by write(2)).

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use libc::MAP_SHARED;

use super::book::{Book, Checked, RW, Random, failed, map};
use super::content::PAGE;
use super::worker::{Behaviour, Setup, fork, give_up};

const PAGES: usize = 128;
/// Pages of the table of turns before them, in the same memory.
const TABLE: usize = 1;

/// What the memory is.
#[derive(Clone, Copy)]
pub enum Backing {
    Anonymous,
    Memfd,
    SystemV,
    File,
}

/// What has a name that outlives its users.
enum Named {
    Nothing,
    File(File, String),
    Segment(i32),
}

fn memory(backing: Backing, setup: &Setup) -> Checked<(*mut u8, Named)> {
    let (all, null) = (TABLE + PAGES, std::ptr::null_mut());
    let mapped = |file: &File| {
        file.set_len((all * PAGE) as u64).map_err(|e| e.to_string())?;
        map(null, all, RW, MAP_SHARED, file.as_raw_fd())
    };
    match backing {
        Backing::Anonymous => Ok((map(null, all, RW, MAP_SHARED, -1)?, Named::Nothing)),
        Backing::Memfd => {
            // SAFETY: the name is a C string.
            let fd = unsafe { libc::memfd_create(c"mutate".as_ptr(), 0) };
            if fd < 0 {
                return failed("memfd_create");
            }
            // SAFETY: just made, and nobody else's.
            Ok((mapped(&unsafe { File::from_raw_fd(fd) })?, Named::Nothing))
        }
        Backing::SystemV => {
            // SAFETY: plain system calls; the segment is attached once and stays.
            let (id, at) = unsafe {
                let id = libc::shmget(libc::IPC_PRIVATE, all * PAGE, libc::IPC_CREAT | 0o600);
                (id, libc::shmat(id, std::ptr::null(), 0))
            };
            if at as isize == -1 { failed("shmat") } else { Ok((at.cast(), Named::Segment(id))) }
        }
        Backing::File => {
            let path = format!("/dev/shm/mutate-{}-{}", std::process::id(), setup.number);
            let file = File::options().read(true).write(true).create_new(true).open(&path);
            let file = file.map_err(|e| format!("{path}: {e}"))?;
            Ok((mapped(&file)?, Named::File(file, path)))
        }
    }
}

/// One of the two processes.
struct Side {
    /// 0 or 1: which turns are ours, even or odd.
    parity: u64,
    turns: [&'static AtomicU64; PAGES],
    book: Book,
    /// The last turn that this process has seen of each page, in memory of its own.
    seen: [u64; PAGES],
    /// By which the second process writes instead of through the mapping.
    file: Option<File>,
    rng: Random,
}

impl Side {
    /// Takes its turn with one page, if it is its turn; whether it was.
    fn play(&mut self, page: usize) -> Checked<bool> {
        let turn = self.turns[page].load(SeqCst);
        if turn < self.seen[page] || turn > self.seen[page] + 2 {
            return Err(format!("page {page}: turn {turn} after turn {}", self.seen[page]));
        }
        if turn % 2 != self.parity {
            return Ok(false);
        }
        self.book.set(page, turn as u32);
        match self.file.as_ref().filter(|_| self.rng.below(2) == 0) {
            None => self.book.write(page)?,
            Some(file) => {
                self.book.check(page)?;
                let bytes = self.book.next(page);
                let written = file.write_at(&bytes, ((TABLE + page) * PAGE) as u64);
                if written.map_err(|e| format!("write: {e}"))? != PAGE {
                    return Err("a short write".into());
                }
                self.book.set(page, turn as u32 + 1);
                self.book.check(page).map_err(|e| format!("after write(2): {e}"))?;
            }
        }
        self.seen[page] = turn + 1;
        self.turns[page].store(turn + 1, SeqCst);
        Ok(true)
    }
}

pub struct Shared {
    side: Side,
    child: i32,
    named: Named,
}

impl Shared {
    pub fn new(backing: Backing, setup: &Setup) -> Checked<Shared> {
        let (at, named) = memory(backing, setup)?;
        // SAFETY: the first page is the table's, which only atomics are made of; it stays mapped.
        let turns = std::array::from_fn(|i| unsafe { &*at.cast::<AtomicU64>().add(i) });
        // SAFETY: behind the table, within the same memory.
        let pages = unsafe { at.add(TABLE * PAGE) };
        let side = |parity, file| Side {
            parity,
            turns,
            book: Book::new(pages, PAGES, setup.salt),
            seen: [0; PAGES],
            file,
            rng: Random::new(setup.salt + parity),
        };
        let name = setup.name;
        let file = match &named {
            Named::File(file, _) => Some(file.try_clone().map_err(|e| e.to_string())?),
            _ => None,
        };
        let mut theirs = side(1, file);
        let child = fork(|| {
            loop {
                for _ in 0..16 {
                    let page = theirs.rng.below(PAGES);
                    if let Err(e) = theirs.play(page) {
                        give_up(name, &format!("the other process: {e}"));
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        })?;
        Ok(Shared { side: side(0, None), child, named })
    }
}

impl Behaviour for Shared {
    fn step(&mut self) -> Checked {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the answer.
        if unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } != 0 {
            return Err(format!("the other process has ended: {status:#x}"));
        }
        for _ in 0..16 {
            let page = self.side.rng.below(PAGES);
            self.side.play(page)?;
        }
        Ok(())
    }

    /// Every page goes over and comes back.
    fn verify(&mut self) -> Checked<usize> {
        let goal = self.side.seen.map(|turn| turn + 3);
        loop {
            for page in 0..PAGES {
                self.side.play(page)?;
            }
            if self.side.seen.iter().zip(goal).all(|(seen, goal)| *seen >= goal) {
                return Ok(PAGES);
            }
            self.step()?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn sample(&mut self) -> *mut u8 {
        self.side.book.at
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own child, which has not been waited for.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
        match &self.named {
            Named::Nothing => {}
            Named::File(_, path) => drop(std::fs::remove_file(path)),
            // SAFETY: marks the segment; it stays while it is attached.
            Named::Segment(id) => drop(unsafe { libc::shmctl(*id, libc::IPC_RMID, std::ptr::null_mut()) }),
        }
    }
}
