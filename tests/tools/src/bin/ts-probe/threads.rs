//! Threads that each count on their own; thread-local state and the stacks must survive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

struct Slot {
    count: AtomicU64,
    wrong: AtomicU64,
}

pub fn run(args: &mut Args) -> Result<(), String> {
    let threads = args.number("N")?;
    let slots: Arc<Vec<Slot>> =
        Arc::new((0..threads).map(|_| Slot { count: AtomicU64::new(0), wrong: AtomicU64::new(0) }).collect());
    for i in 0..threads {
        let slots = Arc::clone(&slots);
        std::thread::spawn(move || {
            let mut stack = [0; 4096];
            Pattern::new(i).fill(&mut stack);
            loop {
                let slot = &slots[i as usize];
                slot.count.fetch_add(1, Relaxed);
                slot.wrong.fetch_add(Pattern::new(i).wrong(std::hint::black_box(&stack)), Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    }
    let mut before = vec![0; threads as usize];
    say::rounds("threads", args, |n| {
        let mut stuck = 0;
        for (slot, before) in slots.iter().zip(&mut before) {
            let now = slot.count.load(Relaxed);
            stuck += u64::from(now == *before && n > 1);
            *before = now;
        }
        let wrong: u64 = slots.iter().map(|s| s.wrong.load(Relaxed)).sum();
        Ok(format!("wrong={wrong} stuck={stuck} threads={threads}"))
    })
}
