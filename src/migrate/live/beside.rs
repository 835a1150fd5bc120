//! What is done beside CRIU's dump in a live freeze, each by a thread of its own: copying what was written last, tmpfs files,
//! comparing shared memory. What CRIU itself says is [`super::listed`].

use std::sync::mpsc;
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};

use super::super::abort::Abort;
use super::super::copier::Copier;
use super::super::link::Link;
use super::super::precopy::merge;
use super::super::report::{Item, Side, millis};
use super::super::shared::{Object, Sent};
use super::super::tmpfs::Tmpfs;
use super::listed::Unseen;
use crate::criu::ImageKind;
use crate::criu::tar::staged::Table;
use crate::memory::maps::Mapping;
use crate::memory::tracker::{Found, Source, Task, existing};
use crate::memory::{RangeSet, Space, maps};

/// What the freeze is spent on, on this side.
pub(super) struct Items {
    since: Instant,
    pub all: Vec<Item>,
}

impl Items {
    pub fn new(since: Instant) -> Items {
        Items { since, all: Vec::new() }
    }

    /// Milliseconds since the freeze began.
    pub fn now(&self) -> f64 {
        millis(self.since.elapsed())
    }

    pub fn add(&mut self, name: &str, start_ms: f64, ms: f64) {
        self.all.push(Item { name: name.to_owned(), start_ms, ms, side: Side::Source });
    }

    pub fn until_now(&mut self, name: &str, from: f64) {
        let ms = self.now() - from;
        self.add(name, from, ms);
    }

    /// What a thread came to; what it took joins the rest.
    ///
    /// # Errors
    /// The thread's own, or that it panicked.
    pub fn join<T>(&mut self, what: &str, thread: ScopedJoinHandle<'_, Done<T>>) -> Result<T> {
        let done = thread.join().map_err(|_| anyhow!("the thread that was {what} panicked"))?;
        self.all.extend(done.items.all);
        done.result.with_context(|| what.to_owned())
    }
}

/// What a thread came to, and what it took.
pub(super) struct Done<T> {
    result: Result<T>,
    items: Items,
}

/// What is known of the memory that was written last when CRIU begins.
pub(super) enum Known {
    /// Nothing was ever sent, so that there is nothing to ask a tracker.
    NeverSent,
    /// This is unsent; what was written since is still to be asked.
    Unsent(Vec<Found>),
    /// This is all.
    All(Vec<Found>),
}

/// What the threads have in common.
#[derive(Clone, Copy)]
pub(super) struct Beside<'a> {
    pub abort: &'a Abort,
    pub link: &'a Link,
    /// The freeze's beginning.
    pub since: Instant,
}

impl Beside<'_> {
    fn timed<T>(&self, work: impl FnOnce(&mut Items) -> Result<T>) -> Done<T> {
        let mut items = Items::new(self.since);
        Done { result: work(&mut items), items }
    }

    /// Finds what was written last, and sends it if `send`. CRIU takes as long to look at the same tasks. What it maps into
    /// them for a while counts as written, and goes nowhere: no image names it.
    /// Gives the copier back.
    pub fn written_last<'c>(
        &self,
        copier: &'c mut Copier,
        tasks: &[Task],
        known: Known,
        send: bool,
    ) -> Done<(Vec<Found>, &'c mut Copier)> {
        self.timed(|items| {
            let at = items.now();
            let mut found = match known {
                Known::NeverSent => Vec::new(),
                Known::Unsent(unsent) => merge(unsent, copier.look(tasks, true)?),
                Known::All(found) => found,
            };
            keep_from_code(&mut found);
            // CRIU brings the rest, and its content says what is missing
            found.retain(|f| f.space.kind == ImageKind::Pid);
            items.until_now("final scan", at);
            let at = items.now();
            if send {
                copier.send(&found, self.link, &|_| self.abort.go_on())?;
            }
            items.until_now("final pages", at);
            Ok((found, copier))
        })
    }

    /// Says what there is of the tasks that CRIU does not see. `before`: their mappings, from before CRIU has put anything into them.
    pub fn existing(&self, before: &[(Task, Vec<Mapping>)], to: mpsc::Sender<Unseen>) -> Done<()> {
        self.timed(|items| {
            let at = items.now();
            let one = |(task, mappings): &(Task, Vec<Mapping>)| {
                let space = Space { kind: ImageKind::Pid, id: task.vpid };
                existing::of(task.pid, mappings).map(|existing| (space, existing))
            };
            // whoever takes it has failed if nobody does, and says why
            to.send(before.iter().map(one).collect()).ok();
            if !before.is_empty() {
                items.until_now("list of pages", at);
            }
            Ok(())
        })
    }

    /// Sends what changed last in tmpfs files, and ends the table that CRIU's tar asks for. Returns the bytes sent.
    pub fn tmpfs(&self, tmpfs: &mut Tmpfs, table: Table, pids: &[i32]) -> Done<u64> {
        self.timed(|items| {
            let at = items.now();
            let (sent, all) = tmpfs.last(pids, self.link, &|_| self.abort.go_on())?;
            table.finish(&all)?;
            items.until_now("tmpfs", at);
            Ok(sent.bytes)
        })
    }

    /// Compares shared memory as CRIU comes to it; ends with the channel.
    pub fn shared(&self, sent: &Sent, objects: mpsc::Receiver<Object>) -> Done<()> {
        self.timed(|items| {
            let (mut first, mut ms) = (None, 0.0);
            for object in objects {
                let at = items.now();
                first = first.or(Some(at));
                sent.compare(&object, self.link, &|| self.abort.go_on())?;
                ms += items.now() - at;
            }
            if let Some(at) = first {
                items.add("shared memory", at, ms);
            }
            Ok(())
        })
    }
}

/// CRIU puts a system call into one of a task's executable pages for a moment and takes it out again: such pages are not read
/// while it works, but after it, as everything that was not sent.
fn keep_from_code(found: &mut [Found]) {
    for f in found {
        let Source::Task(pid) = f.source else { continue };
        // a task that has ended has no code that could be wrong
        let Ok(mappings) = maps::mappings(pid) else { continue };
        let code: RangeSet = mappings.into_iter().filter(|m| m.exec).map(|m| m.range).collect();
        f.written = f.written.difference(&code);
    }
}
