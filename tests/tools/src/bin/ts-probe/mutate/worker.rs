//! One process of the tree: a behaviour, its pace, and the link to the controller. What the behaviours do is not here.

use std::fs::File;
use std::io::{Error, ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use libc::MAP_SHARED;
use transship_testtools::args::Args;

use super::book::{Checked, RW, failed, map};
use super::content::PAGE;

/// Exit status of a process that found something wrong, and then of all of them.
pub const GIVEN_UP: i32 = 3;

/// Requests: check everything and answer; change a byte.
pub const VERIFY: u8 = b'v';
/// See [`Behaviour::spoil`].
pub const SPOIL: u8 = b's';

/// What a worker does, over and over.
pub trait Behaviour {
    /// A little of it; what it uses is checked on the way.
    fn step(&mut self) -> Checked;
    /// Checks everything; how many pages that was.
    fn verify(&mut self) -> Checked<usize>;
    /// A byte that the next [`Behaviour::verify`] checks: whoever changes it must see it fail. Null: no such byte.
    fn sample(&mut self) -> *mut u8;
    /// Changes a byte that it has to find wrong then, so that the checks themselves can be tested.
    fn spoil(&mut self) -> Checked {
        let at = self.sample();
        if at.is_null() {
            return Err("this behaviour has no memory that lasts".into());
        }
        // SAFETY: a byte of the behaviour's own memory.
        unsafe { at.write_volatile(at.read_volatile() ^ 1) };
        Ok(())
    }
    /// Whether a changed byte is noticed.
    #[cfg(test)]
    fn notices(&mut self) -> bool {
        self.spoil().is_ok() && self.verify().is_err()
    }
    /// Another program in the place of this one, if it is time for that.
    fn succeed(&mut self, _: &Setup, _: &Link, _steps: u64) -> Checked {
        Ok(())
    }
}

/// What a behaviour is told.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The behaviour's name.
    pub name: &'static str,
    /// Which worker it is.
    pub number: u64,
    /// For its content; no other worker has this one, nor the numbers that follow.
    pub salt: u64,
    /// How much memory, where a behaviour has a choice.
    pub pages: usize,
    /// How many threads, where a behaviour has a choice.
    pub threads: usize,
    /// MiB a second that are written, where a behaviour has a choice; 0: as fast as it goes.
    pub rate: u64,
    /// Where files go.
    pub dir: String,
    /// Between two steps.
    pub every: Duration,
}

impl Setup {
    /// As the options say.
    pub fn new(name: &'static str, number: u64, args: &Args) -> Checked<Setup> {
        Ok(Setup {
            name,
            number,
            salt: (number + 1) << 32,
            pages: (args.option_number("mb", 8)?.max(1) << 20) as usize / PAGE,
            threads: args.option_number("threads", 2)?.clamp(1, 64) as usize,
            rate: args.option_number("rate", 20)?,
            dir: args.option("dir").unwrap_or("/tmp").to_owned(),
            every: Duration::from_millis(args.option_number("every", 4)?.max(1)),
        })
    }

    /// The options that make the same one.
    pub fn line(&self) -> Vec<String> {
        let (number, every) = (self.number, self.every.as_millis());
        vec![format!("--number={number}"), format!("--every={every}"), format!("--dir={}", self.dir)]
    }
}

/// Says what is wrong and ends this process.
pub fn give_up(name: &str, what: &str) -> ! {
    let line = format!("mutate WRONG in {name} (process {}): {what}\n", std::process::id());
    // SAFETY: `line` is as long as it says. Not through std's lock, which another thread (of a forked process: one that does not
    // exist any more) may hold; and _exit, because other threads may be at work.
    unsafe {
        libc::write(1, line.as_ptr().cast(), line.len());
        libc::_exit(GIVEN_UP)
    }
}

/// A child that ends with what `work` returns, and in any case with its parent. Only while this process has one thread.
pub fn fork(work: impl FnOnce() -> i32) -> Checked<i32> {
    // SAFETY: with one thread the child may do whatever its parent may.
    match unsafe { libc::fork() } {
        -1 => failed("fork"),
        0 => {
            // SAFETY: touches no memory.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let status = work();
            // SAFETY: ends the child without its parent's destructors.
            unsafe { libc::_exit(status) }
        }
        child => Ok(child),
    }
}

/// A descriptor that the next program gets too.
pub fn keep_open(fd: RawFd) -> Checked {
    // SAFETY: only changes the descriptor's flag.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 { failed("fcntl") } else { Ok(()) }
}

/// A page that all workers share with the controller: how many steps each has done. A worker knows its own number beside, in memory of
/// its own: if one of the two was lost or is older than the other, they differ.
pub struct Ledger {
    file: File,
    at: *mut u8,
}

impl Ledger {
    /// Pages; a worker has eight bytes.
    const PAGES: usize = 2;

    /// A new one.
    pub fn new() -> Checked<Ledger> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"ledger".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return failed("memfd_create");
        }
        // SAFETY: just made, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len((Self::PAGES * PAGE) as u64).map_err(|e| e.to_string())?;
        Self::open(file)
    }

    fn open(file: File) -> Checked<Ledger> {
        let at = map(std::ptr::null_mut(), Self::PAGES, RW, MAP_SHARED, file.as_raw_fd())?;
        Ok(Ledger { file, at })
    }

    /// The same one once more, for a worker that is about to be forked.
    pub fn again(&self) -> Checked<Ledger> {
        Self::open(self.file.try_clone().map_err(|e| e.to_string())?)
    }

    /// A worker's number of steps.
    pub fn steps(&self, worker: u64) -> &AtomicU64 {
        assert!((worker as usize) < Self::PAGES * PAGE / 8, "too many workers");
        // SAFETY: within the mapping, which lives as long as the program; aligned, and used as atomics only.
        unsafe { &*self.at.cast::<AtomicU64>().add(worker as usize) }
    }
}

/// A worker's end of what connects it with the controller.
pub struct Link {
    requests: File,
    answers: File,
    ledger: Ledger,
}

impl Link {
    /// Of a worker that was just forked.
    pub fn new(requests: File, answers: File, ledger: Ledger) -> Link {
        Link { requests, answers, ledger }
    }

    /// Of a program that was executed by a worker.
    pub fn inherited(args: &Args) -> Checked<Link> {
        let file = |name: &str| -> Checked<File> {
            let fd = args.option_number(name, 0)? as i32;
            // SAFETY: the program before this one left these open for us.
            Ok(unsafe { File::from_raw_fd(fd) })
        };
        Ok(Link {
            requests: file("requests")?,
            answers: file("answers")?,
            ledger: Ledger::open(file("ledger")?)?,
        })
    }

    /// The options for [`Link::inherited`].
    pub fn line(&self) -> [(&'static str, u64); 3] {
        let fd = |file: &File| file.as_raw_fd() as u64;
        [("requests", fd(&self.requests)), ("answers", fd(&self.answers)), ("ledger", fd(&self.ledger.file))]
    }

    /// So that the next program gets them.
    pub fn keep_open(&self) -> Checked {
        self.line().into_iter().try_for_each(|(_, fd)| keep_open(fd as RawFd))
    }

    /// Waits for a request, but not for long.
    fn asked(&self, wait: Duration) -> Checked<Option<u8>> {
        let mut poll = libc::pollfd { fd: self.requests.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        match unsafe { libc::poll(&mut poll, 1, wait.as_millis() as i32) } {
            0 => Ok(None),
            1 => {
                let mut byte = [0];
                match std::io::Read::read(&mut &self.requests, &mut byte) {
                    // SAFETY: the controller is gone; ends at once.
                    Ok(0) => unsafe { libc::_exit(0) },
                    Ok(_) => Ok(Some(byte[0])),
                    Err(e) => Err(format!("the controller's pipe: {e}")),
                }
            }
            _ if Error::last_os_error().kind() == ErrorKind::Interrupted => Ok(None),
            _ => failed("poll"),
        }
    }
}

/// A worker's life; does not return. `steps`: what it has done already.
pub fn work(setup: &Setup, link: &Link, mut steps: u64, behaviour: Checked<Box<dyn Behaviour>>) -> ! {
    let live = || -> Checked {
        let mut behaviour = behaviour?;
        let ledger = link.ledger.steps(setup.number);
        loop {
            behaviour.step()?;
            if ledger.fetch_add(1, SeqCst) != steps {
                return Err(format!("the ledger says {} steps after {steps}", ledger.load(SeqCst)));
            }
            steps += 1;
            match link.asked(setup.every)? {
                Some(VERIFY) => {
                    let pages = behaviour.verify()?;
                    let line = format!("{} {steps} {pages}\n", setup.name);
                    (&link.answers).write_all(line.as_bytes()).map_err(|e| format!("answering: {e}"))?;
                }
                Some(_) => behaviour.spoil()?,
                None => {}
            }
            behaviour.succeed(setup, link, steps)?;
        }
    };
    match live() {
        Ok(()) => give_up(setup.name, "it ended"),
        Err(e) => give_up(setup.name, &e),
    }
}
