//! Which pages of a range are populated, written or soft-dirty: PAGEMAP_SCAN (Linux 6.7), and the words of /proc/PID/pagemap for
//! older kernels. What is done about them is the trackers' business.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::memory::RangeSet;
use crate::memory::maps::Mapping;

/// Bytes of a page. CRIU's images and the kernels that we support count in these (64 KiB kernels are refused by the preflight).
pub const PAGE: u64 = 4096;

// linux/fs.h
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const SOFT_DIRTY: u64 = 1 << 7;
const GUARD: u64 = 1 << 8; // Linux 6.15

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// What CRIU would dump of a private mapping: present or swapped; not the zero page, a page of the file, or a guard page.
    Populated,
    /// The same, of a range that is wholly under tracking; EPERM where it is not.
    Tracked,
    /// Populated pages and guard pages, told apart by [`Pagemap::existing`]. Only with PAGEMAP_SCAN.
    Existing,
    /// Guard pages. Only with PAGEMAP_SCAN; none on kernels before 6.15.
    Guards,
    /// Of the populated ones those written since they were protected. Fails with EPERM where the range is not wholly under tracking.
    Written,
    /// As `Written`, and every swapped page. For private file mappings: a protected page that MADV_DONTNEED or a truncation took
    /// leaves a marker that looks like a swapped, clean page; its content is the file's again.
    WrittenOrSwapped,
    /// Of a tracked mapping of shared memory: written, or without an entry (the page was written and reclaimed: a page that is
    /// clean keeps at least a marker). EPERM as above.
    SharedWritten,
    /// Populated and soft-dirty.
    SoftDirty,
}

/// Where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    range: Range<u64>,
    /// Pages of a file may be there. To tell them from the task's own the kernel looks at each page, which takes it four times as long
    /// as reading the page tables.
    files: bool,
}

impl Area {
    /// No page of a file can be there.
    pub fn anonymous(range: Range<u64>) -> Area {
        Area { range, files: false }
    }

    /// Is that certain?
    pub fn is_anonymous(&self) -> bool {
        !self.files
    }
}

impl From<&Mapping> for Area {
    fn from(m: &Mapping) -> Area {
        let own = ["[heap]", "[stack]"].contains(&m.name.as_str()) || m.name.starts_with("[anon:");
        Area { range: m.range.clone(), files: m.inode != 0 || !(m.name.is_empty() || own) }
    }
}

impl From<Range<u64>> for Area {
    fn from(range: Range<u64>) -> Area {
        Area { range, files: true }
    }
}

/// struct pm_scan_arg
#[repr(C)]
#[derive(Default)]
struct Arg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// The kernel holds the lock on a task's mappings during a call: whoever wants to change them, CRIU above all, waits.
const WINDOW: u64 = 256 << 20;

/// A task's page tables, read-only. Belongs to the memory that the task had when it was opened: an exec is not followed.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<Region>,
    /// Does the kernel know guard pages as a category?
    guard: bool,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}-{:x} {:x}", self.start, self.end, self.categories)
    }
}

impl Pagemap {
    /// Of the task.
    pub fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        Ok(Self { file, regions: vec![Region::default(); 4096], guard: true })
    }

    /// The pages of `area` that `select` means. `protect`: in the same step they are write-protected again, so that a write from
    /// here on is found by the next look (ranges under tracking only).
    pub fn scan(&mut self, area: impl Into<Area>, select: Select, protect: bool) -> io::Result<RangeSet> {
        let mut found = RangeSet::new();
        self.each(area.into(), select, protect, |pages, _| found.insert(pages))?;
        Ok(found)
    }

    /// As [`Self::scan`] with [`Select::Tracked`], and as the second answer the pages that the kernel believes to
    /// be protected already. In a range that has only just come under tracking there are none, but for kernels whose mremap left
    /// the protection bit in the moved entries (before 6.13).
    pub fn adopt(&mut self, area: impl Into<Area>, protect: bool) -> io::Result<(RangeSet, RangeSet)> {
        let (mut all, mut stale) = (RangeSet::new(), RangeSet::new());
        self.each(area.into(), Select::Tracked, protect, |pages, categories| {
            if categories & (WRITTEN | SWAPPED) == 0 {
                stale.insert(pages.clone());
            }
            all.insert(pages);
        })?;
        Ok((all, stale))
    }

    /// Adds the pages that CRIU would dump of a private mapping, and the guard pages in it.
    ///
    /// # Errors
    /// Also on kernels without PAGEMAP_SCAN.
    pub fn existing(
        &mut self,
        area: impl Into<Area>,
        all: &mut RangeSet,
        guards: &mut RangeSet,
    ) -> io::Result<()> {
        self.each(area.into(), Select::Existing, false, |pages, categories| {
            if categories & GUARD == 0 { all.insert(pages) } else { guards.insert(pages) }
        })
    }

    fn each(
        &mut self,
        Area { range, files }: Area,
        select: Select,
        protect: bool,
        mut found: impl FnMut(Range<u64>, u64),
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            if select == Select::Guards && !self.guard {
                return Ok(());
            }
            let end = range.end.min(at.saturating_add(WINDOW));
            let mut arg = self.arg(Area { range: at..end, files }, select, protect);
            // SAFETY: `arg` is struct pm_scan_arg; it points at `regions`, which outlives the call and is as long as it says.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            if n < 0 {
                let e = io::Error::last_os_error();
                match e.raw_os_error() {
                    Some(libc::EINVAL) if self.guard => {
                        self.guard = false;
                        continue;
                    }
                    Some(libc::EINTR) => continue,
                    Some(libc::ENOTTY) if !protect => return self.each_word(at..range.end, select, found),
                    _ => return Err(e),
                }
            }
            for region in &self.regions[..n as usize] {
                if select != Select::WrittenOrSwapped || region.categories & (WRITTEN | SWAPPED) != 0 {
                    found(region.start..region.end, region.categories);
                }
            }
            if arg.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    fn arg(&mut self, Area { range, files }: Area, select: Select, protect: bool) -> Arg {
        let guard = if self.guard { GUARD } else { 0 };
        let not = PFNZERO | if files { FILE } else { 0 } | guard;
        let mut arg = Arg {
            size: size_of::<Arg>() as u64,
            flags: if protect { PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC } else { 0 },
            start: range.start,
            end: range.end,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            category_inverted: not,
            category_mask: not,
            category_anyof_mask: PRESENT | SWAPPED,
            ..Arg::default()
        };
        match select {
            Select::Populated => arg.return_mask = WRITTEN | SWAPPED,
            Select::Tracked => {
                arg.return_mask = WRITTEN | SWAPPED;
                arg.flags |= PM_SCAN_CHECK_WPASYNC;
            }
            Select::Existing => {
                (arg.category_inverted, arg.category_mask) = (not & !GUARD, not & !GUARD);
                arg.return_mask = guard;
            }
            Select::Guards => {
                (arg.category_inverted, arg.category_mask) = (0, GUARD);
                (arg.category_anyof_mask, arg.return_mask) = (0, GUARD);
            }
            Select::Written => {
                arg.category_mask |= WRITTEN;
                arg.return_mask = WRITTEN;
                arg.flags |= PM_SCAN_CHECK_WPASYNC;
            }
            Select::WrittenOrSwapped => {
                arg.return_mask = WRITTEN | SWAPPED;
                arg.flags |= PM_SCAN_CHECK_WPASYNC;
            }
            Select::SharedWritten => {
                // Exactly this combination is the kernel's path that also gives entries that are none.
                (arg.category_inverted, arg.category_mask) = (0, WRITTEN);
                (arg.category_anyof_mask, arg.return_mask) = (0, WRITTEN);
                arg.flags |= PM_SCAN_CHECK_WPASYNC;
            }
            Select::SoftDirty => {
                arg.category_mask |= SOFT_DIRTY;
                arg.return_mask = SOFT_DIRTY;
            }
        }
        arg
    }

    fn each_word(
        &self,
        range: Range<u64>,
        select: Select,
        mut found: impl FnMut(Range<u64>, u64),
    ) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 19];
        let mut at = range.start;
        while at < range.end {
            let want = ((range.end - at) / PAGE * 8).min(buffer.len() as u64) as usize;
            let n = self.file.read_at(&mut buffer[..want], at / PAGE * 8)? / 8 * 8;
            if n == 0 {
                return Ok(()); // the task has gone, or the range is not user memory
            }
            for (word, page) in buffer[..n].chunks_exact(8).zip((at..).step_by(PAGE as usize)) {
                let word = word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
                if word_is(word, select)? {
                    found(page..page + PAGE, 0);
                }
            }
            at += n as u64 / 8 * PAGE;
        }
        Ok(())
    }
}

/// A word of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst). The zero page cannot be told from others here: too
/// many pages are named then, never too few.
fn word_is(word: u64, select: Select) -> io::Result<bool> {
    let bit = |n: u32| word >> n & 1 == 1;
    let populated = (bit(63) || bit(62)) && !bit(61) && !bit(58);
    match select {
        Select::Populated => Ok(populated),
        Select::SoftDirty => Ok(populated && bit(55)),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_as_pagemap_rst_lays_them_out() {
        // Written, clean, a page of a file, swapped and dirty, swapped and clean, empty, guard. (Made by the documentation: no
        // kernel with the bit was at hand to record from.)
        let cases: [(u64, bool, bool); 7] = [
            (0x8180_0000_0010_4a3c, true, true),
            (0x8100_0000_0010_4a3c, true, false),
            (0xa180_0000_0007_1f00, false, false),
            (0x4080_0000_0000_2be2, true, true),
            (0x4000_0000_0000_2be2, true, false),
            (0x0080_0000_0000_0000, false, false),
            (0x4400_0000_0000_0000, false, false),
        ];
        for (word, populated, dirty) in cases {
            assert_eq!(word_is(word, Select::Populated).unwrap(), populated, "{word:x}");
            assert_eq!(word_is(word, Select::SoftDirty).unwrap(), dirty, "{word:x}");
        }
        assert!(word_is(0, Select::Written).is_err());
    }

    #[test]
    fn both_ways_agree_about_our_own_memory() {
        let pages = 64usize;
        let memory = vec![7u8; (pages + 2) * PAGE as usize];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let range = start..start + pages as u64 * PAGE;
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let scanned = pagemap.scan(range.clone(), Select::Populated, false).unwrap();
        let mut words = RangeSet::new();
        pagemap.each_word(range.clone(), Select::Populated, |r, _| words.insert(r)).unwrap();
        assert_eq!(scanned, words);
        assert_eq!(scanned, RangeSet::from(range));
    }
}
