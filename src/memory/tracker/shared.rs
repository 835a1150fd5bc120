//! Bookkeeping of shared memory over looks: which tasks map an object where, and whether one of these mappings has vanished. Writes
//! through a mapping that has vanished were seen by nobody, so the object then counts as written whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::scan::PAGE;
use super::{Found, Source};
use crate::criu::ImageKind;
use crate::memory::maps::Mapping;
use crate::memory::{RangeSet, Space};

/// Which addresses of which task map an object; the second number is the address of the object's first byte, were it mapped.
type Coverage = BTreeMap<(i32, u64), RangeSet>;

#[derive(Debug, Default)]
struct Object {
    maps: Vec<(i32, Range<u64>, u64)>,
    whole: bool,
    written: RangeSet,
}

impl Object {
    fn coverage(&self) -> Coverage {
        let mut all = Coverage::new();
        for (pid, range, pgoff) in &self.maps {
            all.entry((*pid, range.start.wrapping_sub(*pgoff))).or_default().insert(range.clone());
        }
        all
    }
}

/// The objects of one look, and what the one before saw.
#[derive(Debug, Default)]
pub struct Shared {
    before: BTreeMap<u64, Coverage>,
    now: BTreeMap<u64, Object>,
}

impl Shared {
    /// A mapping of the object that was watched since the last look: `written` are addresses.
    pub fn watched(&mut self, shmid: u64, pid: i32, m: &Mapping, written: &RangeSet) {
        let object = self.map(shmid, pid, m);
        for run in written.iter() {
            object.written.insert(run.start - m.range.start + m.offset..run.end - m.range.start + m.offset);
        }
    }

    /// A mapping that was not watched: through it everything may have been written.
    pub fn unwatched(&mut self, shmid: u64, pid: i32, m: &Mapping) {
        self.map(shmid, pid, m).whole = true;
    }

    fn map(&mut self, shmid: u64, pid: i32, m: &Mapping) -> &mut Object {
        let object = self.now.entry(shmid).or_default();
        object.maps.push((pid, m.range.clone(), m.offset));
        object
    }

    /// Ends the look.
    pub fn finish(&mut self) -> Vec<Found> {
        let now = std::mem::take(&mut self.now);
        let before = std::mem::take(&mut self.before);
        let mut all = Vec::new();
        for (shmid, object) in now {
            let coverage = object.coverage();
            let whole = object.whole || before.get(&shmid).is_none_or(|b| vanished(b, &coverage));
            all.extend(found(shmid, object, whole));
            self.before.insert(shmid, coverage);
        }
        all
    }
}

/// Is something that was mapped before not mapped in the same place any more?
fn vanished(before: &Coverage, now: &Coverage) -> bool {
    before.iter().any(|(key, ranges)| now.get(key).is_none_or(|n| !ranges.difference(n).is_empty()))
}

fn found(shmid: u64, object: Object, whole: bool) -> Option<Found> {
    let (pid, range, pgoff) = object.maps.first()?.clone();
    let mut source = Source::SharedMap { pid, start: range.start, end: range.end, pgoff };
    let mut written = object.written;
    if whole {
        written = RangeSet::new();
        let data = object
            .maps
            .iter()
            .find_map(|(pid, range, pgoff)| Some((data(*pid, range).ok()?, *pid, range.clone(), *pgoff)));
        match data {
            Some((data, pid, range, pgoff)) => {
                source = Source::SharedMap { pid, start: range.start, end: range.end, pgoff };
                written = data;
            }
            // Every mapping has just gone: whoever reads will see that too.
            None => object.maps.iter().for_each(|(_, r, off)| written.insert(*off..off + (r.end - r.start))),
        }
    }
    let space = Space { kind: ImageKind::Shmem, id: shmid };
    (!written.is_empty()).then_some(Found { space, source, written })
}

/// The parts of the object that are not holes, by any mapping of it. Swapped pages are data.
pub fn data(pid: i32, map: &Range<u64>) -> io::Result<RangeSet> {
    let file = File::open(map_file(pid, map))?;
    let size = file.metadata()?.len();
    let mut all = RangeSet::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(&file, at, libc::SEEK_DATA)? else { break };
        let end = seek(&file, start, libc::SEEK_HOLE)?.unwrap_or(size);
        all.insert(start / PAGE * PAGE..end.next_multiple_of(PAGE));
        at = end.max(start + 1);
    }
    Ok(all)
}

/// The link by which a mapping's file is opened.
pub fn map_file(pid: i32, map: &Range<u64>) -> String {
    format!("/proc/{pid}/map_files/{:x}-{:x}", map.start, map.end)
}

/// None: nothing of that kind follows.
fn seek(file: &File, at: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: no pointers.
    let r = unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) };
    if r >= 0 {
        return Ok(Some(r as u64));
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coverage(all: &[(i32, u64, Range<u64>)]) -> Coverage {
        let mut c = Coverage::new();
        for (pid, base, range) in all {
            c.entry((*pid, *base)).or_default().insert(range.clone());
        }
        c
    }

    #[test]
    fn what_counts_as_vanished() {
        let before = coverage(&[(1, 0x1000, 0x1000..0x5000), (2, 0x9000, 0x9000..0xa000)]);
        assert!(!vanished(&before, &before));
        // Split by mprotect, and one more task: nothing is lost.
        let split = coverage(&[
            (1, 0x1000, 0x1000..0x2000),
            (1, 0x1000, 0x2000..0x5000),
            (2, 0x9000, 0x9000..0xa000),
            (3, 0, 0..0x1000),
        ]);
        assert!(!vanished(&before, &split));
        // A hole, another place, a task that has gone.
        assert!(vanished(&before, &coverage(&[(1, 0x1000, 0x1000..0x4000), (2, 0x9000, 0x9000..0xa000)])));
        assert!(vanished(&before, &coverage(&[(1, 0x2000, 0x1000..0x5000), (2, 0x9000, 0x9000..0xa000)])));
        assert!(vanished(&before, &coverage(&[(1, 0x1000, 0x1000..0x5000)])));
    }
}
