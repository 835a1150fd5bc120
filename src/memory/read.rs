//! Pages of a running or frozen task, read into one reused buffer; zero pages are found on the way.
//!
//! Task memory comes by `process_vm_readv`, many ranges in one call. Pages that it cannot read (mappings without `PROT_READ`)
//! are tried again through `/proc/pid/mem`; what is not mapped any more is reported as gone, a whole hole at once. Shared
//! memory is read as a file, through `/proc/pid/map_files`. Which pages to read is the tracker's knowledge
//! ([`super::tracker`]), what becomes of them the caller's.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::range::RangeSet;
use super::tracker::Source;
use crate::criu::page_server::page_size;

/// Bytes read at once: they stay in the second-level cache until they are looked at and copied.
const BUFFER: usize = 256 << 10;
/// The longest [`Chunk::Data`], in bytes.
pub const MAX_CHUNK: usize = 1 << 20;
/// Ranges in one system call (`UIO_MAXIOV` is 1024).
const MAX_IOVECS: usize = 512;

/// A run of whole pages of one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Pages with content, [`MAX_CHUNK`] bytes at most.
    Data {
        /// Address of the first page (or offset in shared memory).
        vaddr: u64,
        /// Their bytes.
        bytes: &'a [u8],
    },
    /// Pages full of zeros.
    Zero {
        /// Address of the first page.
        vaddr: u64,
        /// Bytes.
        len: u64,
    },
    /// Pages that are not mapped any more (or whose task has ended).
    Gone {
        /// Address of the first page.
        vaddr: u64,
        /// Bytes.
        len: u64,
    },
}

/// What a [`Reader::read`] met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Bytes with content.
    pub data: u64,
    /// Bytes of zero pages.
    pub zero: u64,
    /// Bytes that were gone.
    pub gone: u64,
}

/// Reads memory; keeps its buffer between calls.
pub struct Reader {
    memory: Vec<u8>,
    page: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader with its buffer.
    pub fn new() -> Reader {
        let page = page_size();
        Reader { memory: vec![0; BUFFER + page], page }
    }

    /// Reads whole pages of `ranges`, in ascending order, and hands each run of equal kind to `sink`. Runs of zero or
    /// gone pages come whole, data in pieces of at most [`MAX_CHUNK`]. The task may run or stand still; its memory may
    /// change and vanish meanwhile (what changed is the tracker's next find).
    ///
    /// # Errors
    /// The memory may not be read (permissions), or `sink` failed.
    pub fn read(
        &mut self,
        source: &Source,
        ranges: &RangeSet,
        sink: &mut dyn FnMut(Chunk<'_>) -> Result<()>,
    ) -> Result<ReadStats> {
        let page = self.page;
        // the kernel copies faster into whole pages, and the search for zeros needs no unaligned start
        let at = self.memory.as_ptr().align_offset(page).min(page);
        let buffer = &mut self.memory[at..at + BUFFER];
        let mut out = Out { sink, stats: ReadStats::default(), zero: 0..0, gone: 0..0, page };
        let mut pending = ranges.iter();
        match *source {
            Source::Task(pid) => {
                let mut task = Task { pid, mem: None, holes: None };
                let mut next = pending.next();
                let mut batch: Vec<Range<u64>> = Vec::with_capacity(MAX_IOVECS);
                while next.is_some() {
                    fill(&mut batch, &mut next, &mut pending);
                    task.read(&mut batch, buffer, &mut out)?;
                }
            }
            Source::SharedMap { pid, start, end, .. } => {
                let file = match File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")) {
                    Ok(file) => Some(file),
                    Err(e) if gone(&e) => None,
                    Err(e) => {
                        return Err(e).with_context(|| format!("opening the mapping {start:x} of {pid}"));
                    }
                };
                for range in pending {
                    match &file {
                        Some(file) => read_file(file, range, buffer, &mut out)?,
                        None => out.gone(range)?,
                    }
                }
            }
        }
        out.flush()?;
        Ok(out.stats)
    }
}

/// Takes the next ranges, a bufferful at most; a range that does not fit is split.
fn fill(
    batch: &mut Vec<Range<u64>>,
    next: &mut Option<Range<u64>>,
    more: &mut dyn Iterator<Item = Range<u64>>,
) {
    batch.clear();
    let mut room = BUFFER as u64;
    while let Some(range) = next.take() {
        let end = range.end.min(range.start.saturating_add(room));
        room -= end - range.start;
        batch.push(range.start..end);
        *next = if end < range.end { Some(end..range.end) } else { more.next() };
        if room == 0 || batch.len() == MAX_IOVECS {
            return;
        }
    }
}

/// The task or its mapping has ended.
fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// A task's memory.
struct Task {
    pid: i32,
    mem: Option<File>,
    /// Its mappings, read when the first page was missing.
    holes: Option<RangeSet>,
}

impl Task {
    /// Reads `batch` (a bufferful at most); what could be read and what was gone goes to `out`.
    fn read(&mut self, batch: &mut [Range<u64>], buffer: &mut [u8], out: &mut Out<'_>) -> Result<()> {
        let mut first = 0;
        while first < batch.len() {
            let todo = &batch[first..];
            let remote: Vec<_> = todo
                .iter()
                .map(|r| RemoteIoVec { base: r.start as usize, len: (r.end - r.start) as usize })
                .collect();
            let want: usize = remote.iter().map(|r| r.len).sum();
            let mut local = [IoSliceMut::new(&mut buffer[..want])];
            let got = match process_vm_readv(Pid::from_raw(self.pid), &mut local, &remote) {
                Ok(n) => n - n % out.page,
                Err(Errno::EFAULT) => 0,
                Err(Errno::ESRCH) => {
                    return todo.iter().try_for_each(|r| out.gone(r.clone()));
                }
                Err(e) => return Err(e).with_context(|| format!("reading the memory of {}", self.pid)),
            };
            let mut at = 0;
            while first < batch.len() && at < got {
                let range = &mut batch[first];
                let n = ((range.end - range.start) as usize).min(got - at);
                out.pages(range.start, &buffer[at..at + n])?;
                at += n;
                range.start += n as u64;
                first += usize::from(range.start >= range.end);
            }
            if got < want {
                let range = &mut batch[first];
                range.start += self.odd(range.clone(), buffer, out)?;
                first += usize::from(range.start >= range.end);
            }
        }
        Ok(())
    }

    /// The first page of `range` could not be read: another way, or it is gone. Returns how many bytes were dealt with,
    /// one page at least.
    fn odd(&mut self, range: Range<u64>, buffer: &mut [u8], out: &mut Out<'_>) -> Result<u64> {
        if self.mem.is_none() {
            match File::open(format!("/proc/{}/mem", self.pid)) {
                Ok(file) => self.mem = Some(file),
                Err(e) if gone(&e) => {
                    out.gone(range.clone())?;
                    return Ok(range.end - range.start);
                }
                Err(e) => return Err(e).with_context(|| format!("opening the memory of {}", self.pid)),
            }
        }
        // like ptrace, this reads pages of mappings without PROT_READ, too
        let want = (range.end - range.start) as usize;
        let mem = self.mem.as_ref().expect("opened above");
        let got = mem.read_at(&mut buffer[..want], range.start).unwrap_or(0);
        let got = got - got % out.page;
        if got > 0 {
            out.pages(range.start, &buffer[..got])?;
            return Ok(got as u64);
        }
        let mut end = self.hole(range.clone());
        if end <= range.start {
            // mapped when the mappings were read: either they are old, or the page has no memory behind it
            self.holes = None;
            end = self.hole(range.clone());
        }
        let end = end.max(range.start + out.page as u64);
        out.gone(range.start..end)?;
        Ok(end - range.start)
    }

    /// Where the hole that `range` begins in ends (its start if it does not begin in a hole).
    fn hole(&mut self, range: Range<u64>) -> u64 {
        let pid = self.pid;
        let mapped = self.holes.get_or_insert_with(|| mapped(pid));
        let mapped = mapped.clip(range.clone());
        mapped.iter().next().map_or(range.end, |m| m.start)
    }
}

/// What a task has mapped now; nothing if it has ended.
fn mapped(pid: i32) -> RangeSet {
    let text = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let range = |line: &[u8]| {
        let line = std::str::from_utf8(line.split(|c| *c == b' ').next()?).ok()?;
        let (start, end) = line.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    text.split(|c| *c == b'\n').filter_map(range).collect()
}

/// Shared memory at file offsets; what lies behind the file's end is gone.
fn read_file(file: &File, range: Range<u64>, buffer: &mut [u8], out: &mut Out<'_>) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let want = buffer.len().min((range.end - at) as usize);
        let mut got = 0;
        while got < want {
            match file.read_at(&mut buffer[got..want], at + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("reading shared memory"),
            }
        }
        // a file may end inside a page, whose rest is zeros
        let whole = got.next_multiple_of(out.page).min(want);
        buffer[got..whole].fill(0);
        out.pages(at, &buffer[..whole])?;
        at += whole as u64;
        if whole < want {
            return out.gone(at..range.end);
        }
    }
    Ok(())
}

/// Joins pages into runs.
struct Out<'a> {
    sink: &'a mut dyn FnMut(Chunk<'_>) -> Result<()>,
    stats: ReadStats,
    zero: Range<u64>,
    gone: Range<u64>,
    page: usize,
}

impl Out<'_> {
    /// Whole pages that were read.
    fn pages(&mut self, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let page = self.page;
        let mut at = 0;
        while at < bytes.len() {
            let first = at;
            let zero = is_zero(&bytes[at..at + page]);
            while at < bytes.len() && (at == first || is_zero(&bytes[at..at + page]) == zero) {
                at += page;
            }
            let (start, len) = (vaddr + first as u64, (at - first) as u64);
            if zero {
                self.stats.zero += len;
                if self.zero.end != start {
                    self.flush()?;
                    self.zero = start..start;
                }
                self.zero.end += len;
            } else {
                self.flush()?;
                self.stats.data += len;
                (self.sink)(Chunk::Data { vaddr: start, bytes: &bytes[first..at] })?;
            }
        }
        Ok(())
    }

    fn gone(&mut self, range: Range<u64>) -> Result<()> {
        self.stats.gone += range.end - range.start;
        if self.gone.end != range.start {
            self.flush()?;
            self.gone = range.start..range.start;
        }
        self.gone.end = range.end;
        Ok(())
    }

    /// Hands on the runs that might have grown.
    fn flush(&mut self) -> Result<()> {
        for (range, zero) in [(std::mem::take(&mut self.zero), true), (std::mem::take(&mut self.gone), false)]
        {
            let (vaddr, len) = (range.start, range.end - range.start);
            match (len, zero) {
                (0, _) => {}
                (_, true) => (self.sink)(Chunk::Zero { vaddr, len })?,
                (_, false) => (self.sink)(Chunk::Gone { vaddr, len })?,
            }
        }
        Ok(())
    }
}

/// Nothing but zeros? Most pages that are not are told by their first bytes; the loop compiles to vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<256>();
    words.iter().all(|w| {
        let word = |i: usize| u64::from_ne_bytes(w[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        (0..32).fold(0, |any, i| any | word(i)) == 0
    }) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
