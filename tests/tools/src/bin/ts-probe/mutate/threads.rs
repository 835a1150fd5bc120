//! Threads that begin and end all the time. Each checks its stack, its thread-local value and memory of its own.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use super::book::{Checked, Random};
use super::content::{self, PAGE};
use super::worker::{Behaviour, Setup, give_up};

const THREADS: usize = 6;

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

struct Live {
    thread: JoinHandle<u64>,
    number: u64,
    done: Arc<AtomicU64>,
}

pub struct Threads {
    name: &'static str,
    live: Vec<Live>,
    wanted: Arc<AtomicU64>,
    rng: Random,
    next: u64,
}

impl Threads {
    pub fn new(setup: &Setup) -> Checked<Threads> {
        let (live, wanted) = (Vec::new(), Arc::default());
        Ok(Threads { name: setup.name, live, wanted, rng: Random::new(setup.salt), next: setup.salt })
    }
}

/// A thread's life: so many rounds.
fn live(number: u64, rounds: usize, wanted: &AtomicU64, done: &AtomicU64) -> Checked {
    LOCAL.set(number);
    let (mut stack, mut heap) = ([0; 4 * PAGE], vec![0; 4 * PAGE]);
    for round in 0..=rounds {
        let now = wanted.load(SeqCst);
        for (salt, memory) in [(number, &mut stack[..]), (!number, &mut heap[..])] {
            for (page, bytes) in std::hint::black_box(memory).chunks_mut(PAGE).enumerate() {
                content::check(bytes, salt, page as u64, round as u32)?;
                content::fill(bytes, salt, page as u64, round as u32 + 1);
            }
        }
        if LOCAL.get() != number {
            return Err(format!("the thread-local value is {} instead of {number}", LOCAL.get()));
        }
        done.store(now, SeqCst);
        std::thread::sleep(Duration::from_millis(4));
    }
    Ok(())
}

impl Behaviour for Threads {
    fn step(&mut self) -> Checked {
        while self.live.len() < THREADS {
            self.next += 1;
            let (number, rounds, name) = (self.next, 2 + self.rng.below(24), self.name);
            let (wanted, done) = (Arc::clone(&self.wanted), Arc::<AtomicU64>::default());
            let theirs = Arc::clone(&done);
            let builder = std::thread::Builder::new().stack_size(256 << 10);
            let thread = builder.spawn(move || {
                if let Err(e) = live(number, rounds, &wanted, &theirs) {
                    give_up(name, &e);
                }
                number
            });
            self.live.push(Live { thread: thread.map_err(|e| format!("a new thread: {e}"))?, number, done });
        }
        let ended = self.live.iter().position(|t| t.thread.is_finished());
        if let Some(Live { thread, number, .. }) = ended.map(|i| self.live.swap_remove(i)) {
            match thread.join() {
                Ok(said) if said == number => {}
                other => return Err(format!("thread {number} ended with {other:?}")),
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        let wanted = self.wanted.fetch_add(1, SeqCst) + 1;
        for t in &self.live {
            while !t.thread.is_finished() && t.done.load(SeqCst) < wanted {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(self.live.len() * 8)
    }

    fn sample(&mut self) -> *mut u8 {
        std::ptr::null_mut()
    }
}
