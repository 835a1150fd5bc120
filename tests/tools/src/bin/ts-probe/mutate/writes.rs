//! Random writes from several threads over a large memory, as fast as asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use super::book::{Book, Checked, Random};
use super::content::PAGE;
use super::worker::{Behaviour, Setup, give_up};

/// Pages that a thread writes between two pauses.
const BATCH: usize = 16;

struct Common {
    /// Which verification is wanted.
    wanted: AtomicU64,
    /// Threads that have done it.
    done: AtomicUsize,
    pages: AtomicUsize,
}

/// The threads do all of it; this waits for them.
pub struct Writes {
    common: Arc<Common>,
    threads: usize,
    at: *mut u8,
}

/// A book that one thread owns.
struct Part(Book);
// SAFETY: the pages of each part are touched by the thread that owns it alone.
unsafe impl Send for Part {}

impl Writes {
    pub fn new(setup: &Setup) -> Checked<Writes> {
        let common = Common { wanted: 0.into(), done: 0.into(), pages: 0.into() };
        let common = Arc::new(common);
        let threads = setup.threads;
        let each = (setup.pages / threads).max(1);
        // one mapping for all of them
        let all = Book::private(each * threads, 0)?;
        // a thread's batch takes as long as its share of the rate says; 0: no pause
        let bytes = (BATCH * PAGE * threads) as u64;
        let pause = (bytes * 1_000_000).checked_div(setup.rate << 20).map(Duration::from_micros);
        for i in 0..threads {
            let part = Part(Book::new(all.place(i * each), each, setup.salt + i as u64));
            let (common, name) = (Arc::clone(&common), setup.name);
            std::thread::spawn(move || {
                // the whole part, not only the field in it
                let Part(mut book) = { part };
                if let Err(e) = write(&mut book, i as u64, pause, &common) {
                    give_up(name, &e);
                }
            });
        }
        Ok(Writes { common, threads, at: all.at })
    }
}

fn write(book: &mut Book, seed: u64, pause: Option<Duration>, common: &Common) -> Checked {
    let mut rng = Random::new(seed + 1);
    let mut verified = 0;
    // all of it is memory from the start
    (0..book.len()).for_each(|page| book.write_unseen(page));
    loop {
        for _ in 0..BATCH {
            let page = rng.below(book.len());
            book.write(page)?;
        }
        let wanted = common.wanted.load(SeqCst);
        if wanted != verified {
            common.pages.fetch_add(book.check_all()?, SeqCst);
            common.done.fetch_add(1, SeqCst);
            verified = wanted;
        }
        if let Some(pause) = pause {
            std::thread::sleep(pause);
        }
    }
}

impl Behaviour for Writes {
    fn step(&mut self) -> Checked {
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        self.common.pages.store(0, SeqCst);
        self.common.done.store(0, SeqCst);
        self.common.wanted.fetch_add(1, SeqCst);
        while self.common.done.load(SeqCst) < self.threads {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(self.common.pages.load(SeqCst))
    }

    fn sample(&mut self) -> *mut u8 {
        self.at
    }
}
