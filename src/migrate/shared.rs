//! Shared memory in the freeze. CRIU reads all of it, whatever we say, and hands it over; what the destination has already is not
//! sent again. Whether it has, the content itself tells: a mapping that came and went between two rounds leaves no trace in any
//! tracker.

use std::collections::HashMap;

use anyhow::Result;
use xxhash_rust::xxh3::xxh3_64;

use crate::criu::page_server::{PE_PARENT, PE_PRESENT, page_size};
use crate::criu::{ImageKind, PageEvent};
use crate::memory::Space;

/// Hashes of the pages that the destination has, by space and offset.
#[derive(Debug, Default)]
pub(super) struct Sent(HashMap<Space, HashMap<u64, u64>>);

impl Sent {
    /// These pages were sent.
    pub fn note(&mut self, space: Space, offset: u64, bytes: &[u8]) {
        let page = page_size();
        let pages = self.0.entry(space).or_default();
        for (n, bytes) in bytes.chunks_exact(page).enumerate() {
            pages.insert(offset + (n * page) as u64, xxh3_64(bytes));
        }
    }

    /// So many bytes of zeros were sent.
    pub fn note_zero(&mut self, space: Space, offset: u64, len: u64) {
        let zero = vec![0; page_size()];
        (offset..offset + len).step_by(page_size()).for_each(|at| self.note(space, at, &zero));
    }

    /// Does the destination have this page?
    fn has(&self, space: Space, offset: u64, bytes: &[u8]) -> bool {
        self.0.get(&space).and_then(|pages| pages.get(&offset)).is_some_and(|sum| *sum == xxh3_64(bytes))
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
        let known = |n: usize| self.has(space, vaddr + (n * page) as u64, &bytes[n * page..(n + 1) * page]);
        let (pages, mut from) = (bytes.len() / page, 0);
        while from < pages {
            let there = known(from);
            let until = (from + 1..pages).find(|n| known(*n) != there).unwrap_or(pages);
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
