//! The destination's pages while they wait for their tasks: one sparse memfd per space, in which the file offset is the address.
//!
//! What came last wins: a page that is put again is overwritten, a page that has become zero is punched out. The store knows
//! which pages it has bytes of and which are known to be zero; everything else it has never heard of. Nothing of it is ever
//! in a core dump: the files are never mapped here.
//! Where pages come from and who takes them is not this module's business.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{RangeSet, Space};
use crate::criu::page_server::page_size;

/// Size of each file, and so the end of the addresses: five-level page tables give tasks 56 bits on x86_64, 52 on aarch64.
/// tmpfs takes it (its limit is 2^63-1); a sparse file of this size costs nothing.
pub const ADDRESSES: u64 = 1 << 57;

struct Held {
    file: File,
    /// Pages whose bytes are in the file.
    data: RangeSet,
    /// Pages known to be zero; nothing of them is in the file.
    zero: RangeSet,
}

/// So many separate ranges may be said about memory of at most `cap` bytes: as many as it has pages, within reason. They take memory, too,
/// and whoever names them need not have any.
pub fn ranges_cap(cap: u64) -> usize {
    (cap / page_size() as u64).clamp(1 << 16, 1 << 26) as usize
}

/// Pages of many spaces, in memory.
pub struct Store {
    cap: u64,
    page: u64,
    bytes: u64,
    spaces: BTreeMap<Space, Held>,
}

/// See [`Store::find`].
pub struct Found {
    /// There are bytes of it.
    pub data: RangeSet,
    /// Nothing is known of it.
    pub unknown: RangeSet,
}

impl Store {
    /// An empty store that takes at most `cap` bytes.
    pub fn new(cap: u64) -> Result<Self> {
        Ok(Self { cap, page: page_size() as u64, bytes: 0, spaces: BTreeMap::new() })
    }

    fn check(&self, space: Space, range: &Range<u64>) -> Result<()> {
        ensure!(
            range.start.is_multiple_of(self.page)
                && range.end.is_multiple_of(self.page)
                && range.start <= range.end
                && range.end <= ADDRESSES,
            "impossible pages {:#x}..{:#x} of {space:?}",
            range.start,
            range.end
        );
        Ok(())
    }

    fn range(&self, space: Space, vaddr: u64, len: u64) -> Result<Range<u64>> {
        let end = vaddr.checked_add(len).with_context(|| format!("{len} bytes at {vaddr:#x}"))?;
        self.check(space, &(vaddr..end))?;
        Ok(vaddr..end)
    }

    fn open(&mut self, space: Space) -> Result<&mut Held> {
        Ok(match self.spaces.entry(space) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(place) => {
                let fd = memfd_create(c"transship-pages", MFdFlags::MFD_CLOEXEC)
                    .context("making a memfd for pages")?;
                let file = File::from(fd);
                // So that a read of any address finds zeros instead of the end of the file.
                file.set_len(ADDRESSES).context("sizing a memfd for pages")?;
                place.insert(Held { file, data: RangeSet::new(), zero: RangeSet::new() })
            }
        })
    }

    /// Takes whole pages; later ones win.
    pub fn put(&mut self, space: Space, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let range = self.range(space, vaddr, bytes.len() as u64)?;
        let room = self.cap.saturating_sub(self.bytes);
        let held = self.open(space)?;
        let known: u64 = held.data.overlapping(range.clone()).map(|r| r.end - r.start).sum();
        let more = bytes.len() as u64 - known;
        ensure!(more <= room, "more pages than announced: the store takes no more than {} bytes", self.cap);
        held.file
            .write_all_at(bytes, vaddr)
            .with_context(|| format!("storing {} bytes of pages", bytes.len()))?;
        held.zero.remove(range.clone());
        held.data.insert(range);
        self.bytes += more;
        Ok(())
    }

    /// These pages are zero now.
    pub fn zero(&mut self, space: Space, vaddr: u64, len: u64) -> Result<()> {
        let range = self.range(space, vaddr, len)?;
        self.open(space)?;
        self.punch(space, &range)?;
        self.open(space)?.zero.insert(range);
        let weight: usize = self.spaces.values().map(|held| held.zero.weight()).sum();
        ensure!(weight <= ranges_cap(self.cap), "zero pages in {weight} separate places");
        Ok(())
    }

    /// Takes the bytes of a range out and gives their memory back; returns how many there were.
    fn punch(&mut self, space: Space, range: &Range<u64>) -> Result<u64> {
        let Some(held) = self.spaces.get_mut(&space) else { return Ok(0) };
        let Some(span) = held.data.span(range.clone()) else { return Ok(0) };
        // one call for them all: there is nothing in the file between them
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&held.file, how, span.start as i64, (span.end - span.start) as i64)
            .context("giving pages back")?;
        let gone = held.data.remove(span);
        self.bytes -= gone;
        Ok(gone)
    }

    /// These pages are needed no more: their memory goes back to the system, and the store no longer knows them.
    pub fn free(&mut self, space: Space, range: Range<u64>) -> Result<u64> {
        self.check(space, &range)?;
        let gone = self.punch(space, &range)?;
        if let Some(held) = self.spaces.get_mut(&space) {
            held.zero.remove(range);
        }
        Ok(gone)
    }

    /// Forgets a space with all its pages.
    pub fn drop_space(&mut self, space: Space) {
        if let Some(held) = self.spaces.remove(&space) {
            self.bytes -= held.data.bytes();
        }
    }

    /// Everything put or zeroed.
    #[cfg(test)]
    pub fn covered(&self, space: Space) -> RangeSet {
        self.spaces.get(&space).map(|h| h.data.union(&h.zero)).unwrap_or_default()
    }

    /// What there are bytes of.
    pub fn data(&self, space: Space) -> RangeSet {
        self.spaces.get(&space).map(|h| h.data.clone()).unwrap_or_default()
    }

    /// What of `wanted` there are bytes of, and what of it was neither put nor zeroed.
    pub fn find(&self, space: Space, wanted: &RangeSet) -> Found {
        let held = self.spaces.get(&space);
        let data = held.map(|held| wanted.intersection(&held.data)).unwrap_or_default();
        let mut unknown = wanted.difference(&data);
        if let Some(held) = held {
            unknown = unknown.difference(&held.zero);
        }
        Found { data, unknown }
    }

    /// Every space that anything was put or zeroed in.
    pub fn spaces(&self) -> impl Iterator<Item = Space> + '_ {
        self.spaces.keys().copied()
    }

    /// Bytes of pages held now.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A space's file.
    pub fn file(&self, space: Space) -> Option<BorrowedFd<'_>> {
        self.spaces.get(&space).map(|h| h.file.as_fd())
    }

    /// Every byte of the range must be known.
    fn known(&self, space: Space, range: &Range<u64>) -> Result<&Held> {
        let held = self.spaces.get(&space).with_context(|| format!("nothing of {space:?} is stored"))?;
        let mut at = range.start;
        while at < range.end {
            match held.data.run_at(at).or_else(|| held.zero.run_at(at)) {
                Some(run) => at = run.end,
                None => bail!("page {at:#x} of {space:?} is not stored"),
            }
        }
        Ok(held)
    }

    /// Reads; every page of the range must be known.
    pub fn read_at(&self, space: Space, vaddr: u64, into: &mut [u8]) -> Result<()> {
        let end = vaddr.checked_add(into.len() as u64).context("reading past the end of memory")?;
        let held = self.known(space, &(vaddr..end))?;
        held.file.read_exact_at(into, vaddr).with_context(|| format!("reading stored pages at {vaddr:#x}"))
    }

    /// Reads, whatever is there: what is not stored is zeros. For a span of which only some pages are wanted.
    pub fn read_span(&self, space: Space, vaddr: u64, into: &mut [u8]) -> Result<()> {
        let held = self.spaces.get(&space).with_context(|| format!("nothing of {space:?} is stored"))?;
        held.file.read_exact_at(into, vaddr).with_context(|| format!("reading stored pages at {vaddr:#x}"))
    }

    /// Appends the range to `out` at its position, zeros included; every page must be known.
    pub fn copy_to(&self, space: Space, range: Range<u64>, out: &File) -> Result<()> {
        self.check(space, &range)?;
        let held = self.known(space, &range)?;
        // Not sendfile: it compares the offset in our file with the largest that the other file system knows, 2^44 on ext4.
        // A buffer that stays in the processor's cache.
        let mut buf = vec![0; (range.end - range.start).min(256 << 10) as usize];
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(buf.len() as u64) as usize;
            held.file
                .read_exact_at(&mut buf[..n], at)
                .with_context(|| format!("reading stored pages at {at:#x}"))?;
            (&*out).write_all(&buf[..n]).context("writing stored pages")?;
            at += n as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::ImageKind;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    const P: u64 = 4096;
    const A: Space = Space { kind: ImageKind::Pid, id: 1 };
    const B: Space = Space { kind: ImageKind::Shmem, id: 1 };

    fn pages(fill: u8, n: u64) -> Vec<u8> {
        vec![fill; (n * P) as usize]
    }

    fn set(runs: &[Range<u64>]) -> RangeSet {
        runs.iter().map(|r| r.start * P..r.end * P).collect()
    }

    /// Memory that the file takes, bytes.
    fn held(store: &Store, space: Space) -> u64 {
        store.spaces[&space].file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn what_came_last_is_read() {
        let mut s = Store::new(1 << 20).unwrap();
        s.put(A, 0x10 * P, &pages(1, 4)).unwrap();
        s.put(A, 0x11 * P, &pages(2, 1)).unwrap();
        s.zero(A, 0x12 * P, P).unwrap();
        s.zero(A, 0x20 * P, 8 * P).unwrap();
        s.put(A, 0x21 * P, &pages(3, 1)).unwrap();
        assert_eq!(s.covered(A), set(&[0x10..0x14, 0x20..0x28]));
        assert_eq!(s.data(A), set(&[0x10..0x12, 0x13..0x14, 0x21..0x22]));
        assert_eq!((s.bytes(), held(&s, A)), (4 * P, 4 * P));
        let mut got = pages(9, 4);
        s.read_at(A, 0x10 * P, &mut got).unwrap();
        let firsts: Vec<u8> = got.chunks(P as usize).map(|p| p[0]).collect();
        assert_eq!(firsts, [1, 2, 0, 1]);
        s.read_at(A, 0x20 * P, &mut got).unwrap();
        assert_eq!((got[0], got[P as usize], got[2 * P as usize]), (0, 3, 0));
        // The other space of the same number is another one.
        assert!(s.covered(B).is_empty() && s.read_at(B, 0x10 * P, &mut got).is_err());
    }

    #[test]
    fn the_highest_addresses_of_both_page_table_depths_work() {
        let mut s = Store::new(1 << 20).unwrap();
        for end in [1u64 << 47, 1 << 52, 1 << 56, ADDRESSES] {
            s.put(A, end - 2 * P, &pages(7, 2)).unwrap();
            let mut got = pages(0, 2);
            s.read_at(A, end - 2 * P, &mut got).unwrap();
            assert_eq!(got, pages(7, 2), "{end:#x}");
            s.free(A, end - 2 * P..end).unwrap();
        }
        assert_eq!((s.bytes(), held(&s, A)), (0, 0));
        s.put(A, ADDRESSES, &pages(7, 1)).unwrap_err();
        s.put(A, u64::MAX - P + 1, &pages(7, 1)).unwrap_err();
        s.put(A, 5, &pages(7, 1)).unwrap_err();
        s.put(A, 0, &[1; 5]).unwrap_err();
    }

    #[test]
    fn the_cap_counts_each_page_once_and_freeing_makes_room() {
        let mut s = Store::new(4 * P).unwrap();
        for _ in 0..3 {
            s.put(A, 0, &pages(1, 3)).unwrap();
        }
        s.put(B, 0, &pages(1, 1)).unwrap();
        s.put(B, P, &pages(1, 1)).unwrap_err();
        s.zero(B, P, 1 << 40).unwrap();
        assert_eq!(s.free(A, P..1 << 40).unwrap(), 2 * P);
        assert_eq!((s.bytes(), held(&s, A)), (2 * P, P));
        s.read_at(A, P, &mut pages(0, 1)).unwrap_err();
        s.put(B, P, &pages(1, 2)).unwrap();
        s.drop_space(B);
        assert_eq!((s.bytes(), s.spaces().collect::<Vec<_>>()), (P, vec![A]));
    }

    #[test]
    fn zeros_in_very_many_places_are_refused() {
        let mut store = Store::new(1 << 20).unwrap();
        let (page, apart) = (page_size() as u64, 2 << 20);
        let most = ranges_cap(1 << 20) as u64;
        for n in 0..most {
            store.zero(A, n * apart, page).unwrap();
        }
        assert!(store.zero(A, most * apart, page).unwrap_err().to_string().contains("separate places"));
    }

    #[test]
    fn ranges_are_copied_to_files_with_their_zeros() {
        let mut s = Store::new(1 << 20).unwrap();
        s.put(A, 0x7fff_0000_0000, &pages(5, 2)).unwrap();
        s.zero(A, 0x7fff_0000_2000, 2 * P).unwrap();
        s.put(A, 0x7fff_0000_4000, &pages(6, 1)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"head").unwrap();
        s.copy_to(A, 0x7fff_0000_1000..0x7fff_0000_5000, &file).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut got = Vec::new();
        file.read_to_end(&mut got).unwrap();
        let want = [b"head".to_vec(), pages(5, 1), pages(0, 2), pages(6, 1)].concat();
        assert!(got == want);
        s.copy_to(A, 0x7fff_0000_4000..0x7fff_0000_6000, &file).unwrap_err();
    }
}
