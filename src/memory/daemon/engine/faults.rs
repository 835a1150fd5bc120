//! Messages of the descriptors: pages that threads wait for, and what tasks did to their memory.

use std::time::Instant;

use anyhow::Result;

use super::{Engine, keep};
use crate::memory::daemon::consumer::{Served, Tools};
use crate::memory::daemon::uffd::Event;

impl Engine {
    /// Reads every descriptor's messages and answers faults, those put off included.
    pub(super) fn faults(&mut self) -> Result<()> {
        self.looked_at_faults = Instant::now();
        let mut i = 0;
        // Children of forks are added at the end, and looked at in the same round.
        while i < self.consumers.len() {
            self.faults_of(i)?;
            i += 1;
        }
        Ok(())
    }

    pub(super) fn faults_of(&mut self, i: usize) -> Result<()> {
        let mut faults = Vec::new();
        loop {
            let messages = self.consumers[i].uffd().read()?;
            if messages.is_empty() {
                break;
            }
            self.heard = Some(Instant::now());
            for event in messages {
                let c = &mut self.consumers[i];
                // What was waited for is over once the event is read.
                let changed = !matches!(event, Event::Fault(_));
                match event {
                    Event::Fault(at) => faults.push(at),
                    Event::Gone(range) => c.forget(range),
                    Event::Remap { from, to, len } => c.remap(from, to, len),
                    Event::Fork(uffd) => {
                        let mut child = c.fork(uffd);
                        keep(&mut self.cfg, &mut child, None);
                        self.consumers.push(child);
                        self.stats.forks += 1;
                    }
                }
                if changed {
                    self.consumers[i].again = None;
                }
            }
        }
        let read = Instant::now();
        if !self.consumers[i].resting(read) {
            self.consumers[i].again = None;
            faults.append(&mut self.consumers[i].retry);
        } else {
            self.consumers[i].retry.append(&mut faults);
        }
        for at in faults {
            self.fault(i, at, read)?;
        }
        Ok(())
    }

    fn fault(&mut self, i: usize, at: u64, read: Instant) -> Result<()> {
        let c = &mut self.consumers[i];
        let mut tools =
            Tools { store: &self.store, buf: &mut self.buf, page: self.page, window: self.cfg.window };
        let space = c.space;
        match c.fault(at, &mut tools)? {
            Served::Local(bytes, images) => {
                self.stats.faults_local += 1;
                self.stats.fault_bytes += bytes;
                self.local_times.add(read.elapsed());
                self.to_free.add(space, images);
            }
            Served::Zero => self.stats.faults_zero += 1,
            Served::Remote(image) => {
                c.waiting.entry(at & !(self.page - 1)).or_insert(read);
                self.stats.faults_remote += 1;
                let asked = self.asked.entry(space).or_default();
                if !asked.contains(image.start) {
                    asked.insert(image.clone());
                    self.to_ask.push((space, image));
                }
            }
            Served::Later | Served::Nobody => {}
        }
        Ok(())
    }
}
