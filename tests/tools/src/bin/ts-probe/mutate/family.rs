//! Processes that are forked and go on with the memory they inherited: children, and children of theirs. Each checks and writes
//! its own copy, and ends; its parent wants the right exit status.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use libc::MAP_SHARED;

use super::book::{Book, Checked, RW, Random, map};
use super::worker::{Behaviour, GIVEN_UP, Setup, fork, give_up};

const PAGES: usize = 64;
/// Children that live at a time.
const CHILDREN: usize = 4;
/// Exit status of a child that did all it was to do.
const FINE: i32 = 41;

pub struct Family {
    name: &'static str,
    book: Book,
    children: [i32; CHILDREN],
    /// Shared with the children: which verification is wanted, and which each has done.
    wanted: &'static AtomicU64,
    done: [&'static AtomicU64; CHILDREN],
    rng: Random,
}

impl Family {
    pub fn new(setup: &Setup) -> Checked<Family> {
        let shared = map(std::ptr::null_mut(), 1, RW, MAP_SHARED, -1)?;
        // SAFETY: a page that stays mapped, of which only these words are used, and only as atomics.
        let word = |i: usize| unsafe { &*shared.cast::<AtomicU64>().add(i) };
        Ok(Family {
            name: setup.name,
            book: Book::private(PAGES, setup.salt)?,
            children: [0; CHILDREN],
            wanted: word(0),
            done: std::array::from_fn(|i| word(1 + i)),
            rng: Random::new(setup.salt),
        })
    }

    /// What a child does, on a copy of its parent's memory and book.
    fn grow_up(&mut self, slot: usize, generation: usize) -> Checked {
        let rounds = 8 + self.rng.below(24);
        let parents_at = self.rng.below(rounds);
        for round in 0..rounds {
            let wanted = self.wanted.load(SeqCst);
            self.book.check_all()?;
            if generation == 1 {
                self.done[slot].store(wanted, SeqCst);
            }
            for _ in 0..6 {
                let page = self.rng.below(PAGES);
                self.book.write(page)?;
            }
            std::thread::sleep(Duration::from_millis(6));
            if generation < 3 && round == parents_at {
                let child = self.child(slot, generation + 1)?;
                reap(child, true).map_err(|e| format!("in generation {generation}: {e}"))?;
            }
        }
        self.book.check_all().map(drop)
    }

    fn child(&mut self, slot: usize, generation: usize) -> Checked<i32> {
        fork(|| match self.grow_up(slot, generation) {
            Ok(()) => FINE,
            Err(e) => give_up(self.name, &format!("generation {generation}: {e}")),
        })
    }

    /// Takes up the children that have ended.
    fn reap(&mut self) -> Checked {
        for child in &mut self.children {
            if *child != 0 && reap(*child, false)? {
                *child = 0;
            }
        }
        Ok(())
    }
}

/// Whether the child has ended; with the right status, that is.
fn reap(child: i32, wait: bool) -> Checked<bool> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the answer.
        let got = unsafe { libc::waitpid(child, &mut status, if wait { 0 } else { libc::WNOHANG }) };
        match got {
            0 => return Ok(false),
            _ if got == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == FINE => {
                return Ok(true);
            }
            _ if got == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == GIVEN_UP => {
                return Err(format!("child {child} has found something wrong"));
            }
            _ if got == child => return Err(format!("child {child} ended with {status:#x}")),
            _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return super::book::failed(&format!("waiting for child {child}")),
        }
    }
}

impl Behaviour for Family {
    fn step(&mut self) -> Checked {
        self.reap()?;
        for _ in 0..6 {
            let page = self.rng.below(PAGES);
            self.book.write(page)?;
        }
        if let Some(slot) = self.children.iter().position(|child| *child == 0) {
            self.done[slot].store(0, SeqCst);
            self.children[slot] = self.child(slot, 1)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        let wanted = self.wanted.fetch_add(1, SeqCst) + 1;
        let pages = self.book.check_all()?;
        loop {
            self.reap()?;
            let waits = |slot: usize| self.children[slot] != 0 && self.done[slot].load(SeqCst) < wanted;
            if !(0..CHILDREN).any(waits) {
                return Ok(pages);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn sample(&mut self) -> *mut u8 {
        self.book.at
    }
}
