//! Memory of this process read by itself: content, zeros, holes, shared memory.

use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE: usize = 4096;

/// Anonymous memory of this process, unmapped at the end.
struct Area(*mut u8, usize);

/// Where the next one goes: far from the program, the heap, libraries and stacks.
static AREAS: AtomicUsize = AtomicUsize::new(0x2000_0000_0000);

impl Area {
    fn new(pages: usize, flags: libc::c_int) -> Area {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_ANONYMOUS;
        // below all that the kernel chooses by itself: else the reader's buffers could fill a hole that a test made
        let hint = AREAS.fetch_add(1 << 30, Ordering::Relaxed) as *mut libc::c_void;
        // SAFETY: a fresh mapping; a hint moves no other mapping.
        let at = unsafe { libc::mmap(hint, pages * PAGE, prot, flags, -1, 0) };
        assert_eq!(at, hint, "the address is taken");
        Area(at.cast(), pages * PAGE)
    }
    fn page(&self, n: usize) -> u64 {
        self.0 as u64 + (n * PAGE) as u64
    }
    fn set(&self, n: usize, byte: u8) {
        assert!(n * PAGE < self.1);
        // SAFETY: inside our mapping.
        unsafe { self.0.add(n * PAGE + 100).write_volatile(byte) };
    }
    fn unmap(&self, pages: Range<usize>) {
        // SAFETY: inside our own mapping, to which no reference exists.
        let at = unsafe { self.0.add(pages.start * PAGE) };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munmap(at.cast(), pages.len() * PAGE) }, 0);
    }
    fn protect(&self, pages: Range<usize>) {
        // SAFETY: inside our own mapping, to which no reference exists.
        let at = unsafe { self.0.add(pages.start * PAGE) };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::mprotect(at.cast(), pages.len() * PAGE, libc::PROT_NONE) }, 0);
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping; parts of it may be unmapped already, and nobody else maps there in these tests.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

/// By address: 'd', 'z' or 'g', and byte 100 of the page.
type Pages = BTreeMap<u64, (char, u8)>;
/// Runs as they came: kind, address, length.
type Runs = Vec<(char, u64, u64)>;

fn read(source: &Source, ranges: &RangeSet) -> (Pages, Runs, ReadStats) {
    let (mut pages, mut runs) = (BTreeMap::new(), Vec::new());
    let stats = Reader::new()
        .read(source, ranges, &mut |chunk| {
            let (kind, vaddr, len) = match chunk {
                Chunk::Data { vaddr, bytes } => ('d', vaddr, bytes.len() as u64),
                Chunk::Zero { vaddr, len } => ('z', vaddr, len),
                Chunk::Gone { vaddr, len } => ('g', vaddr, len),
            };
            runs.push((kind, vaddr, len));
            for at in (0..len).step_by(PAGE) {
                let byte = match chunk {
                    Chunk::Data { bytes, .. } => bytes[at as usize + 100],
                    _ => 0,
                };
                assert_eq!(pages.insert(vaddr + at, (kind, byte)), None, "each page once");
            }
            Ok(())
        })
        .unwrap();
    (pages, runs, stats)
}

fn me() -> Source {
    Source::Task(std::process::id() as i32)
}

#[test]
fn zero_data_and_missing_pages_are_told_apart() {
    if page_size() != PAGE {
        return eprintln!("skipped: pages are not 4096 bytes here");
    }
    let area = Area::new(1000, libc::MAP_PRIVATE);
    // 0..300 data, 300..600 zero, every second one of 600..700 data, 700..800 gone, one page gone, the rest data
    for n in (0..300).chain((600..700).step_by(2)).chain(800..1000) {
        area.set(n, n as u8 | 1);
    }
    area.unmap(700..800);
    area.unmap(900..901);
    let (pages, runs, stats) = read(&me(), &RangeSet::from(area.page(0)..area.page(1000)));
    assert_eq!(pages.len(), 1000);
    for n in 0..1000 {
        let kind = match n {
            300..600 => 'z',
            600..700 if n % 2 == 1 => 'z',
            700..800 | 900 => 'g',
            _ => 'd',
        };
        let byte = if kind == 'd' { n as u8 | 1 } else { 0 };
        assert_eq!(pages[&area.page(n)], (kind, byte), "page {n}");
    }
    assert!(runs.contains(&('z', area.page(300), 300 * PAGE as u64)), "a long run comes whole");
    assert!(runs.contains(&('g', area.page(700), 100 * PAGE as u64)), "a hole comes whole");
    assert_eq!(stats.data + stats.zero + stats.gone, 1000 * PAGE as u64);
    assert_eq!(stats.gone, 101 * PAGE as u64);
}

#[test]
fn scattered_pages_and_pages_without_read_permission_are_read() {
    if page_size() != PAGE {
        return eprintln!("skipped: pages are not 4096 bytes here");
    }
    let area = Area::new(4000, libc::MAP_PRIVATE);
    (0..4000).for_each(|n| area.set(n, n as u8 | 1));
    area.protect(1001..1200);
    let want: RangeSet = (0..4000).step_by(3).map(|n| area.page(n)..area.page(n + 1)).collect();
    let (pages, _, stats) = read(&me(), &want);
    assert_eq!(pages.len(), 1334);
    assert!(pages.iter().all(|(at, page)| {
        let n = ((at - area.page(0)) / PAGE as u64) as usize;
        n.is_multiple_of(3) && *page == ('d', n as u8 | 1)
    }));
    assert_eq!((stats.zero, stats.gone), (0, 0));
}

#[test]
fn a_task_that_has_ended_is_gone() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let ranges: RangeSet = [0x1000..0x3000, 0x10_0000..0x20_0000].into_iter().collect();
    let (_, runs, stats) = read(&Source::Task(child.id() as i32), &ranges);
    assert_eq!(stats.gone, ranges.bytes());
    assert_eq!(runs, [('g', 0x1000, 0x2000), ('g', 0x10_0000, 0x10_0000)]);
}

#[test]
fn shared_memory_is_read_at_file_offsets() {
    let area = Area::new(200, libc::MAP_SHARED);
    (50..100).for_each(|n| area.set(n, n as u8 | 1));
    let (start, end) = (area.page(0), area.page(200));
    let source = Source::SharedMap { pid: std::process::id() as i32, start, end, pgoff: 0 };
    if File::open(format!("/proc/self/map_files/{start:x}-{end:x}")).is_err() {
        return eprintln!("skipped: map_files needs CAP_SYS_ADMIN");
    }
    let p = PAGE as u64;
    let (pages, runs, _) = read(&source, &RangeSet::from(10 * p..300 * p));
    assert_eq!(runs.first(), Some(&('z', 10 * p, 40 * p)));
    assert_eq!(runs.last(), Some(&('g', 200 * p, 100 * p)), "behind the file's end");
    assert!((50..100).all(|n| pages[&(n * p)] == ('d', n as u8 | 1)));
    let source = Source::SharedMap { pid: std::process::id() as i32, start: 0x1000, end: 0x2000, pgoff: 0 };
    assert_eq!(read(&source, &RangeSet::from(0..p)).1, [('g', 0, p)]);
}

#[test]
fn a_single_bit_is_no_zero_page() {
    let mut page = vec![0; PAGE + 3];
    assert!(is_zero(&page) && is_zero(&[]));
    for at in [0, 7, 8, 255, 256, 257, PAGE - 1, PAGE, PAGE + 2] {
        page[at] = 0x10;
        assert!(!is_zero(&page), "byte {at}");
        page[at] = 0;
    }
}
