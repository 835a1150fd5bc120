//! Shared memory in the freeze. What the destination has already is not sent again; whether it has, the content itself tells: a
//! mapping that came and went between two rounds leaves no trace in any tracker.
//!
//! Where CRIU does not see shared memory ([`crate::criu::Worker::conceal`]) we read it, all of it, by several threads, while CRIU
//! dumps the rest ([`Sent::compare`]). Otherwise CRIU reads it and hands it over, and what is known becomes holes ([`Sent::filter`]).

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

use super::codec::Kind;
use super::link::Link;
use super::tmpfs::changed;
use crate::criu::page_server::{PE_PARENT, PE_PRESENT, page_size};
use crate::criu::{ImageKind, PageEvent};
use crate::memory::batch::{Builder, MAX_BATCH};
use crate::memory::read::Chunk;
use crate::memory::{RangeSet, Space};
use crate::rootfs::content::{self, Hash, How, ZERO};

/// For the hashes of pages. No secret: who could choose pages that are alike would only harm himself.
const SEED: u64 = 0x7472_616e_7373_6869;

/// Hashes of the pages that the destination has, by space and offset.
#[derive(Debug, Default)]
pub(super) struct Sent(HashMap<Space, HashMap<u64, Hash>>);

/// An object of shared memory that CRIU has not seen.
pub(super) struct Object {
    pub space: Space,
    file: File,
    size: u64,
    /// Pages that have data.
    pub pages: RangeSet,
}

impl Object {
    pub fn new(space: Space, file: File) -> Result<Object> {
        let size = file.metadata().context("looking at shared memory")?.len();
        let pages = content::data(&file, size, page_size() as u64)?.into_iter().collect();
        Ok(Object { space, file, size, pages })
    }
}

impl Sent {
    /// These pages were sent.
    pub fn note(&mut self, space: Space, offset: u64, bytes: &[u8]) {
        let page = page_size();
        let pages = self.0.entry(space).or_default();
        for (n, bytes) in bytes.chunks_exact(page).enumerate() {
            pages.insert(offset + (n * page) as u64, content::hash(bytes, SEED));
        }
    }

    /// So many bytes of zeros were sent.
    pub fn note_zero(&mut self, space: Space, offset: u64, len: u64) {
        let pages = self.0.entry(space).or_default();
        pages.extend((offset..offset + len).step_by(page_size()).map(|at| (at, ZERO)));
    }

    /// Does the destination have this page?
    fn has(&self, space: Space, offset: u64, hash: Hash) -> bool {
        self.0.get(&space).and_then(|pages| pages.get(&offset)).is_some_and(|sum| *sum == hash)
    }

    /// Reads an object of frozen tasks and sends what the destination does not have. Returns the bytes sent.
    pub fn compare(
        &self,
        object: &Object,
        link: &Link,
        go_on: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<u64> {
        let (page, space) = (page_size(), object.space);
        let sent = AtomicU64::new(0);
        let send = |at: u64, bytes: &[u8], hashes: &[Hash]| -> Result<()> {
            go_on()?;
            let mut builder = Builder::new(space, MAX_BATCH);
            let has = |n: usize| self.0.get(&space)?.get(&(at + (n * page) as u64)).copied();
            for (run, zeros) in changed(hashes, has) {
                let (vaddr, run) = (at + (run.start * page) as u64, run.start * page..run.end * page);
                sent.fetch_add(run.len() as u64, Ordering::Relaxed);
                let full = match zeros {
                    true => builder.push(Chunk::Zero { vaddr, len: run.len() as u64 }),
                    false => builder.push(Chunk::Data { vaddr, bytes: &bytes[run] }),
                };
                full.map_or(Ok(()), |payload| link.frame(Kind::Memory, &[&payload]))?;
            }
            builder.finish().map_or(Ok(()), |payload| link.frame(Kind::Memory, &[&payload]))
        };
        // whole pages; what the last one lacks is zeros
        let whole = object.size / page as u64 * page as u64;
        let how = How { size: whole, block: page as u64, seed: SEED, threads: content::all_threads() };
        content::scan(&object.file, &how, &send).context("reading shared memory")?;
        if whole < object.size {
            let mut last = vec![0; page];
            let cut = (object.size - whole) as usize;
            object.file.read_exact_at(&mut last[..cut], whole).context("reading shared memory")?;
            send(whole, &last, &[content::hash(&last, SEED)])?;
        }
        Ok(sent.into_inner())
    }

    /// Passes CRIU's event on, with what the destination has as holes.
    pub fn filter(
        &self,
        space: Option<Space>,
        event: PageEvent<'_>,
        to: &mut dyn FnMut(PageEvent<'_>) -> Result<()>,
    ) -> Result<()> {
        let page = page_size();
        let (space, vaddr, flags, bytes) = match (space, event) {
            (Some(space), PageEvent::Pages { vaddr, flags, bytes }) if space.kind == ImageKind::Shmem => {
                (space, vaddr, flags, bytes)
            }
            (_, event) => return to(event),
        };
        let known = |n: usize| {
            let hash = content::hash(&bytes[n * page..(n + 1) * page], SEED);
            self.has(space, vaddr + (n * page) as u64, hash)
        };
        let known: Vec<bool> = (0..bytes.len() / page).map(known).collect();
        let (pages, mut from) = (known.len(), 0);
        while from < pages {
            let there = known[from];
            let until = (from + 1..pages).find(|n| known[*n] != there).unwrap_or(pages);
            let at = vaddr + (from * page) as u64;
            to(match there {
                true => PageEvent::Hole {
                    vaddr: at,
                    pages: (until - from) as u64,
                    flags: (flags & !PE_PRESENT) | PE_PARENT,
                },
                false => PageEvent::Pages { vaddr: at, flags, bytes: &bytes[from * page..until * page] },
            })?;
            from = until;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_destination_does_not_have_keeps_its_bytes() {
        let (page, space) = (page_size(), Space { kind: ImageKind::Shmem, id: 9 });
        let mut memory: Vec<u8> = (0..6 * page).map(|i| (i / page) as u8).collect();
        let mut sent = Sent::default();
        sent.note_zero(space, 0, page as u64);
        sent.note(space, page as u64, &memory[page..5 * page]);
        memory[3 * page] ^= 1;
        let mut got = Vec::new();
        let event = PageEvent::Pages { vaddr: 0, flags: PE_PRESENT, bytes: &memory };
        let mut to = |event: PageEvent<'_>| {
            got.push(match event {
                PageEvent::Hole { vaddr, pages, flags } => (vaddr / page as u64, pages, flags == PE_PARENT),
                PageEvent::Pages { vaddr, bytes, .. } => {
                    assert_eq!(bytes, &memory[vaddr as usize..vaddr as usize + bytes.len()]);
                    (vaddr / page as u64, (bytes.len() / page) as u64, false)
                }
                other => panic!("{other:?}"),
            });
            Ok(())
        };
        sent.filter(Some(space), event, &mut to).unwrap();
        // what is a task's passes as it is
        let other = Space { kind: ImageKind::Pid, id: 9 };
        sent.filter(Some(other), event, &mut to).unwrap();
        assert_eq!(got, [(0, 3, true), (3, 1, false), (4, 1, true), (5, 1, false), (0, 6, false)]);
    }
}
