//! What was sent, as a hash per page, to compare memory with that has no other tracking.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use xxhash_rust::xxh3::xxh3_128;

use super::scan::PAGE;
use super::shared::map_file;
use super::{Found, Source};
use crate::memory::{RangeSet, Space};

/// Read at a time.
const CHUNK: u64 = 256 << 10;

/// Hashes of the pages that the destination has.
#[derive(Debug, Default)]
pub struct Sent {
    spaces: HashMap<Space, HashMap<u64, u128>>,
}

impl Sent {
    /// These pages were sent.
    pub fn put(&mut self, space: Space, vaddr: u64, bytes: &[u8]) {
        let pages = self.spaces.entry(space).or_default();
        for (page, at) in bytes.chunks(PAGE as usize).zip((vaddr..).step_by(PAGE as usize)) {
            pages.insert(at, xxh3_128(page));
        }
    }

    /// Pages of zeros were sent.
    pub fn put_zero(&mut self, space: Space, vaddr: u64, len: u64) {
        let zero = xxh3_128(&[0; PAGE as usize]);
        let pages = self.spaces.entry(space).or_default();
        pages.extend((vaddr..vaddr + len).step_by(PAGE as usize).map(|at| (at, zero)));
    }

    /// Narrows what may have been written to what differs from what was sent. Those pages count as not sent from here on, until
    /// [`Self::put`] says what they were sent as.
    pub fn narrow(&mut self, mut found: Found) -> Result<Found> {
        let known = self.spaces.entry(found.space).or_default();
        let mut differs = RangeSet::new();
        let reader = Reader::open(&found.source)?;
        let mut buffer = vec![0; CHUNK as usize];
        for run in found.written.iter() {
            for at in (run.start..run.end).step_by(CHUNK as usize) {
                let len = (run.end - at).min(CHUNK) as usize;
                let mut pages = (at..).step_by(PAGE as usize);
                if reader.read(at, &mut buffer[..len]).is_ok() {
                    for (page, at) in buffer[..len].chunks(PAGE as usize).zip(pages) {
                        if known.get(&at).is_none_or(|h| *h != xxh3_128(page)) {
                            known.remove(&at);
                            differs.insert(at..at + PAGE);
                        }
                    }
                } else {
                    // Something in it went away: page by page, and what cannot be read is named, for the reader to find it gone.
                    for at in pages.by_ref().take(len / PAGE as usize) {
                        let page = &mut buffer[..PAGE as usize];
                        let same = reader.read(at, page).is_ok() && known.get(&at) == Some(&xxh3_128(page));
                        if !same {
                            known.remove(&at);
                            differs.insert(at..at + PAGE);
                        }
                    }
                }
            }
        }
        found.written = differs;
        Ok(found)
    }
}

/// Exact reads from a source.
struct Reader {
    file: File,
    task: Option<i32>,
}

impl Reader {
    fn open(source: &Source) -> Result<Self> {
        let (path, task) = match source {
            Source::Task(pid) => (format!("/proc/{pid}/mem"), Some(*pid)),
            Source::SharedMap { pid, start, end, .. } => (map_file(*pid, &(*start..*end)), None),
        };
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        Ok(Self { file, task })
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        if let Some(pid) = self.task {
            let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
            let remote = libc::iovec { iov_base: at as *mut _, iov_len: into.len() };
            // SAFETY: writes to `into`, as long as `local` says.
            let n = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
            if n == into.len() as isize {
                return Ok(());
            }
        }
        // Also what the task itself may not read: PROT_NONE.
        match self.file.read_exact_at(into, at) {
            // Shared memory beyond the file's end.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof && self.task.is_none() => {
                into.fill(0);
                let _ = self.file.read_at(into, at)?;
                Ok(())
            }
            other => other,
        }
    }
}
