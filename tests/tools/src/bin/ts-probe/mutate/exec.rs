//! A process that executes its own program again and again. What it knows goes over in a memfd, in its arguments and in descriptors;
//! the new program checks all of it.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::MAP_SHARED;

use super::book::{Book, Checked, RW, Random, failed, map};
use super::content::PAGE;
use super::worker::{Behaviour, Link, Setup, keep_open};

const PAGES: usize = 48;
/// Steps between two executions.
const STEPS: u64 = 12;

pub struct Exec {
    carried: Book,
    memfd: File,
    private: Book,
    life: u32,
    left: u64,
    rng: Random,
}

impl Exec {
    /// The first life.
    pub fn new(setup: &Setup) -> Checked<Exec> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"carried".as_ptr(), 0) };
        if fd < 0 {
            return failed("memfd_create");
        }
        // SAFETY: just made, and nobody else's.
        let memfd = unsafe { File::from_raw_fd(fd) };
        memfd.set_len((PAGES * PAGE) as u64).map_err(|e| e.to_string())?;
        Exec::begin(setup, memfd, 0)
    }

    /// A later life, with what the one before left.
    pub fn again(setup: &Setup, memfd: i32, life: u32) -> Checked<Exec> {
        // SAFETY: the program before this one left it open for us.
        Exec::begin(setup, unsafe { File::from_raw_fd(memfd) }, life)
    }

    fn begin(setup: &Setup, memfd: File, life: u32) -> Checked<Exec> {
        let at = map(std::ptr::null_mut(), PAGES, RW, MAP_SHARED, memfd.as_raw_fd())?;
        let mut carried = Book::new(at, PAGES, setup.salt);
        (0..PAGES).for_each(|page| carried.set(page, life));
        carried.check_all().map_err(|e| format!("life {life} got: {e}"))?;
        let mut private = Book::private(PAGES, setup.salt + u64::from(life) + 1)?;
        (0..PAGES).try_for_each(|page| private.write(page))?;
        Ok(Exec {
            carried,
            memfd,
            private,
            life,
            left: STEPS,
            rng: Random::new(setup.salt + u64::from(life)),
        })
    }
}

impl Behaviour for Exec {
    fn step(&mut self) -> Checked {
        self.left = self.left.saturating_sub(1);
        for _ in 0..8 {
            let page = self.rng.below(PAGES);
            self.private.write(page)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        Ok(self.carried.check_all()? + self.private.check_all()?)
    }

    fn sample(&mut self) -> *mut u8 {
        self.carried.at
    }

    /// Returns only when it failed, or when it is not time.
    fn succeed(&mut self, setup: &Setup, link: &Link, steps: u64) -> Checked {
        if self.left > 0 {
            return Ok(());
        }
        (0..PAGES).try_for_each(|page| self.carried.write(page))?;
        let memfd = self.memfd.try_clone().map_err(|e| e.to_string())?.into_raw_fd();
        let mut again = Command::new("/proc/self/exe");
        again.args(["mutate-again", setup.name]).args(setup.line());
        for (name, number) in link.line().into_iter().chain([
            ("memfd", memfd as u64),
            ("life", u64::from(self.life + 1)),
            ("steps", steps),
        ]) {
            again.arg(format!("--{name}={number}"));
        }
        keep_open(memfd)?;
        link.keep_open()?;
        Err(format!("exec: {}", again.exec()))
    }
}
