//! Which pages a task has, written or not: the list that CRIU makes of a task's private memory, made by us where CRIU is not to look at
//! it ([`crate::criu::stand_in`]). By the rules of `generate_vma_iovs` and `should_dump_page` (criu/mem.c) and of
//! `collect_madv_guards`.

use std::sync::OnceLock;

use anyhow::{Context, Result};

use super::class::{Class, class, shmem_device};
use super::scan::{Pagemap, Select};
use crate::memory::RangeSet;
use crate::memory::maps::Mapping;

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Existing {
    /// Pages that an image has to mention.
    pub pages: RangeSet,
    /// Guard pages (MADV_GUARD_INSTALL), of any mapping.
    pub guards: RangeSet,
}

/// Can this kernel tell? It can with PAGEMAP_SCAN (Linux 6.7); tried once.
pub fn known() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let me = std::process::id().cast_signed();
        let (mut all, mut guards) = (RangeSet::new(), RangeSet::new());
        Pagemap::open(me).is_ok_and(|mut pagemap| pagemap.existing(0..1 << 16, &mut all, &mut guards).is_ok())
    })
}

/// Of a task that stands still, which had these mappings when nobody had put anything into it yet.
///
/// # Errors
/// The page tables cannot be read, or [`known`] is false.
pub fn of(pid: i32, mappings: &[Mapping]) -> Result<Existing> {
    let mut pagemap = Pagemap::open(pid)?;
    let Existing { mut pages, mut guards } = Existing::default();
    for m in mappings {
        let mut scan = || -> std::io::Result<()> {
            match class(m, shmem_device()) {
                // CRIU wants all of them, whether they were touched or not
                _ if m.name == "[vdso]" || m.name.starts_with("/[aio]") => pages.insert(m.range.clone()),
                Class::Private { .. } => pagemap.existing(m, &mut pages, &mut guards)?,
                // the kernel's own
                Class::Skip if m.inode == 0 => {}
                _ => {
                    let found = pagemap.scan(m, Select::Guards, false)?;
                    found.iter().for_each(|run| guards.insert(run));
                }
            }
            Ok(())
        };
        scan().with_context(|| format!("mapping {:x}-{:x} {}", m.range.start, m.range.end, m.name))?;
    }
    Ok(Existing { pages, guards })
}

#[cfg(test)]
mod tests {
    use super::super::scan::PAGE;
    use super::*;
    use crate::memory::maps::mappings;

    const GUARD_INSTALL: i32 = 102;

    #[test]
    fn pages_that_were_written_and_guards() {
        if !known() {
            return println!("SKIPPED: no PAGEMAP_SCAN here (Linux 6.7)");
        }
        let len = 16 * PAGE as usize;
        // SAFETY: a mapping of our own, used within its length and unmapped by nobody.
        let at = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            libc::madvise(at, len, libc::MADV_NOHUGEPAGE);
            for page in [1, 2, 9] {
                at.cast::<u8>().add(page * PAGE as usize).write(1);
            }
            // the zero page, which is none
            at.cast::<u8>().add(4 * PAGE as usize).read_volatile();
            at
        };
        // SAFETY: as above; kernels before 6.13 refuse it.
        let guarded =
            unsafe { libc::madvise(at.add(12 * PAGE as usize), 2 * PAGE as usize, GUARD_INSTALL) } == 0;
        let start = at as u64;
        let page = |from: u64, to: u64| start + from * PAGE..start + to * PAGE;
        let me = std::process::id().cast_signed();
        let found = of(me, &mappings(me).unwrap()).unwrap();
        let within = |set: &RangeSet| set.overlapping(page(0, 16)).collect::<Vec<_>>();
        assert_eq!(within(&found.pages), [page(1, 3), page(9, 10)]);
        match guarded {
            true => assert_eq!(within(&found.guards), [page(12, 14)]),
            false => println!("SKIPPED: guard pages (Linux 6.13)"),
        }
        let vdso = mappings(me).unwrap().into_iter().find(|m| m.name == "[vdso]").unwrap();
        assert_eq!(found.pages.run_at(vdso.range.start), Some(vdso.range));
    }
}
