//! Code that CRIU changes for a moment. For its parasite it writes a system call into the first executable page of each task, and
//! takes it out again; memory that it dumps passes a pipe by reference, so that such a page may be read while it is changed
//! (compel, `find_executable_area`; criu/page-pipe.c). What it was is read before CRIU begins, and put in its place.

use std::collections::HashMap;

use anyhow::Result;

use crate::criu::page_server::page_size;
use crate::criu::{ImageKind, PageEvent};
use crate::memory::read::{Chunk, Reader};
use crate::memory::tracker::{Source, Task};
use crate::memory::{RangeSet, Space, maps};

/// The first page of the first executable mapping of each task, as it is.
#[derive(Debug, Default)]
pub(super) struct CodePages(HashMap<Space, (u64, Vec<u8>)>);

impl CodePages {
    /// Reads them; the tasks are frozen.
    pub fn of(tasks: &[Task]) -> CodePages {
        let page = page_size() as u64;
        let mut all = HashMap::new();
        for task in tasks {
            let Ok(mappings) = maps::mappings(task.pid) else { continue };
            let Some(code) = mappings.into_iter().find(|m| m.exec && m.name != "[vsyscall]") else {
                continue;
            };
            let at = code.range.start;
            let mut content = Vec::new();
            let read =
                Reader::new().read(&Source::Task(task.pid), &RangeSet::from(at..at + page), &mut |chunk| {
                    match chunk {
                        Chunk::Data { bytes, .. } => content.extend_from_slice(bytes),
                        Chunk::Zero { len, .. } => content.resize(len as usize, 0),
                        Chunk::Gone { .. } => {}
                    }
                    Ok(())
                });
            if read.is_ok() && content.len() as u64 == page {
                all.insert(Space { kind: ImageKind::Pid, id: task.vpid }, (at, content));
            }
        }
        CodePages(all)
    }

    /// Passes CRIU's event on, with the page as it was.
    pub fn mend(
        &self,
        space: Option<Space>,
        event: PageEvent<'_>,
        to: &mut dyn FnMut(PageEvent<'_>) -> Result<()>,
    ) -> Result<()> {
        let page = page_size();
        if let (Some((at, content)), PageEvent::Pages { vaddr, flags, bytes }) =
            (space.and_then(|s| self.0.get(&s)), &event)
            && let Some(offset) = at.checked_sub(*vaddr).map(|o| o as usize)
            && offset < bytes.len()
        {
            let (before, rest) = bytes.split_at(offset);
            let after = &rest[page..];
            for (vaddr, bytes) in [(*vaddr, before), (*at, &content[..]), (at + page as u64, after)] {
                if !bytes.is_empty() {
                    to(PageEvent::Pages { vaddr, flags: *flags, bytes })?;
                }
            }
            return Ok(());
        }
        to(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::page_server::PE_PRESENT;

    #[test]
    fn the_page_is_put_in_its_place_and_nothing_else_changes() {
        let (page, space) = (page_size(), Space { kind: ImageKind::Pid, id: 1 });
        let at = 5 * page as u64;
        let pages = CodePages(HashMap::from([(space, (at, vec![7; page]))]));
        let poked: Vec<u8> = (0..4 * page).map(|i| (i / page) as u8).collect();
        for first in 2..=5u64 {
            let mut got = vec![];
            let event = PageEvent::Pages { vaddr: first * page as u64, flags: PE_PRESENT, bytes: &poked };
            pages
                .mend(Some(space), event, &mut |event| {
                    let PageEvent::Pages { vaddr, bytes, .. } = event else { panic!("{event:?}") };
                    assert_eq!(vaddr, first * page as u64 + got.len() as u64);
                    got.extend_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
            let mut want = poked.clone();
            let offset = (5 - first) as usize * page;
            want[offset..offset + page].fill(7);
            assert!(got == want, "from page {first}");
        }
    }

    #[test]
    fn our_own_code_is_read() {
        let me = std::process::id();
        let pages = CodePages::of(&[Task { pid: me as i32, vpid: 3 }]);
        let (at, content) = &pages.0[&Space { kind: ImageKind::Pid, id: 3 }];
        // SAFETY: the first page of an executable mapping of this process, which is readable and does not go away.
        let here = unsafe { std::slice::from_raw_parts(*at as *const u8, page_size()) };
        assert!(content == here);
    }
}
