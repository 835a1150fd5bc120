//! The content of a file that is copied ahead of a migration as plain content, without a name: read block by block, each
//! block with a hash of 128 bits, by several threads where that pays. Both ends use the same reading, so that the digest
//! of what one has sent can be compared with that of what the other has put together.
//!
//! Blocks without data are not listed; blocks of nothing but zeros are, as [`ZERO`], but do not count in a [`digest`]:
//! two file systems may hold the same zeros in different ways.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

pub use super::blocks::{Blocks, block_size};
use super::sys;

/// The hash of a block: xxh3 with a seed that no container knows.
pub type Hash = u128;

/// Instead of the hash of a block of zeros.
pub const ZERO: Hash = 0;

/// Bytes read at once, unless a block is larger: they stay in the cache while they are hashed and written or sent.
const WINDOW: u64 = 256 << 10;
/// What a thread takes at a time, unless the file is very large.
const SPAN: u64 = 4 << 20;
/// Pieces of work that a file has at most, about.
const SPANS: u64 = 64 << 10;
/// Less than this is not worth a thread.
const WORTHWHILE: u64 = 8 << 20;

/// Takes whole blocks as they were read: where they begin, their bytes (the file's last block may be cut), and the hash of
/// each. Called by several threads.
pub type Each<'a> = dyn Fn(u64, &[u8], &[Hash]) -> Result<()> + Sync + 'a;

/// How a file is read.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Bytes of it; what is behind is not looked at.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// For the hashes.
    pub seed: u64,
    /// At most so many.
    pub threads: usize,
}

/// As many threads as this machine runs at once, within reason.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(8))
}

/// Reads all data of a file. A file that is cut meanwhile has fewer blocks, one that is written to has some state of them:
/// the hashes are always those of the bytes that `each` was given.
///
/// # Errors
/// It cannot be read, or `each` failed.
pub fn scan(file: &File, how: &How, each: &Each<'_>) -> Result<Blocks<Hash>> {
    let span = (how.size / SPANS).next_power_of_two().max(SPAN).max(how.block);
    // once for the whole file: each search for a hole goes as far as the data does
    let mut spans = Vec::new();
    for run in data(file, how.size, how.block)? {
        let mut from = run.start;
        while from < run.end {
            let end = (from / span + 1).saturating_mul(span).min(run.end);
            spans.push(from..end.min(how.size));
            from = end;
        }
    }
    let threads = how.threads.min((how.size / WORTHWHILE) as usize).max(1);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done: Mutex<Vec<(usize, Found)>> = Mutex::default();
    let work = || -> Result<()> {
        let mut buffer = vec![0; WINDOW.max(how.block) as usize];
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(span) = spans.get(n).filter(|_| !failed.load(Ordering::Relaxed)) else { return Ok(()) };
            let found = scan_span(file, how, span.clone(), &mut buffer, each);
            let found = found.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            if !found.is_empty() {
                done.lock().expect("no thread panics with it").push((n, found));
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().fold(own, |all, other| all.and(other.join().expect("no panic in reading")))
    })?;
    let mut done = done.into_inner().expect("no thread has panicked");
    done.sort_unstable_by_key(|(n, _)| *n);
    let mut blocks = Blocks::new(how.block, how.seed);
    done.into_iter().flat_map(|(_, found)| found).for_each(|(n, hash)| blocks.push(n, hash));
    Ok(blocks)
}

/// Blocks and their hashes.
type Found = Vec<(u64, Hash)>;

fn scan_span(
    file: &File,
    how: &How,
    span: std::ops::Range<u64>,
    buffer: &mut [u8],
    each: &Each<'_>,
) -> Result<Found> {
    let mut all = Vec::new();
    let mut hashes: Vec<Hash> = Vec::new();
    let mut from = span.start;
    while from < span.end {
        let want = ((span.end - from) as usize).min(buffer.len());
        let got = read(file, &mut buffer[..want], from)?;
        hashes.clear();
        // what was cut off in the middle of a block is no block any more
        let whole = if got < want { got / how.block as usize * how.block as usize } else { got };
        let bytes = &buffer[..whole];
        hashes.extend(bytes.chunks(how.block as usize).map(|b| hash(b, how.seed)));
        if !hashes.is_empty() {
            each(from, bytes, &hashes)?;
        }
        all.extend(hashes.iter().enumerate().map(|(i, h)| (from / how.block + i as u64, *h)));
        if got < want {
            break;
        }
        from += want as u64;
    }
    Ok(all)
}

/// Where a file of this size has data, in whole blocks, ascending; neighbours may touch.
pub fn data(file: &File, size: u64, block: u64) -> Result<Vec<std::ops::Range<u64>>> {
    let (mut all, mut at) = (Vec::new(), 0);
    while let Some((from, to)) = sys::next_data(file.as_fd(), at, size).context("looking for holes")? {
        let end = to.next_multiple_of(block);
        all.push((from / block * block).max(at)..end);
        at = end;
    }
    Ok(all)
}

/// Fills the buffer as far as the file goes.
fn read(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], at + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).with_context(|| format!("reading at {at}")),
        }
    }
    Ok(got)
}

/// The hash of a block.
pub fn hash(block: &[u8], seed: u64) -> Hash {
    if is_zero(block) {
        return ZERO;
    }
    xxh3_128_with_seed(block, seed)
}

/// Whether all bytes are zero: the first ones nearly always tell.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|w| u64::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

/// What a file of this size with these blocks is known by.
pub fn digest(size: u64, blocks: &Blocks<Hash>) -> Hash {
    let mut sum = Xxh3::with_seed(blocks.seed());
    sum.update(&size.to_le_bytes());
    sum.update(&blocks.size().to_le_bytes());
    for (n, hash) in blocks.iter().filter(|(_, hash)| *hash != ZERO) {
        sum.update(&n.to_le_bytes());
        sum.update(&hash.to_le_bytes());
    }
    sum.digest128()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how(size: u64, threads: usize) -> How {
        How { size, block: 4096, seed: 7, threads }
    }

    /// Data, zeros, holes, and a last block that is cut.
    fn sample(size: u64) -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        for at in (0..size).step_by(64 << 10).filter(|at| at / (64 << 10) % 3 != 1) {
            let len = (20 << 10).min(size - at) as usize;
            let bytes: Vec<u8> = (0..len).map(|i| (at / 4096) as u8 ^ (i / 13) as u8).collect();
            file.write_all_at(&bytes, at).unwrap();
        }
        file.write_all_at(&[0; 8192], 64 << 10).unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn what_threads_find_is_what_one_finds_and_what_is_there() {
        let size = (40 << 20) + 1234;
        let file = sample(size);
        let copy = tempfile::tempfile_in("/dev/shm").unwrap();
        copy.set_len(size).unwrap();
        let one = scan(&file, &how(size, 1), &|_, _, _| Ok(())).unwrap();
        let four = scan(&file, &how(size, 4), &|at, bytes, hashes| {
            assert_eq!(hashes.len(), bytes.len().div_ceil(4096));
            Ok(copy.write_all_at(bytes, at)?)
        });
        let four = four.unwrap();
        assert_eq!(one, four);
        assert_eq!(one.get(16), Some(ZERO));
        assert_eq!(one.get(20), None, "a hole");
        let mut whole = [vec![0; size as usize], vec![1; size as usize]];
        file.read_exact_at(&mut whole[0], 0).unwrap();
        copy.read_exact_at(&mut whole[1], 0).unwrap();
        assert!(whole[0] == whole[1]);
        let again = scan(&copy, &how(size, 2), &|_, _, _| Ok(())).unwrap();
        assert_eq!(digest(size, &again), digest(size, &one));
    }

    #[test]
    fn a_digest_knows_every_byte_and_the_size_but_not_how_zeros_are_held() {
        let size = 100_000;
        let of = |file: &File, size| digest(size, &scan(file, &how(size, 1), &|_, _, _| Ok(())).unwrap());
        let file = sample(size);
        let before = of(&file, size);
        // a hole becomes zeros
        file.write_all_at(&[0; 4096], 5 * 4096).unwrap();
        assert_eq!(of(&file, size), before);
        for at in [0, 4095, 5 * 4096, size - 1] {
            let mut was = [0];
            file.read_exact_at(&mut was, at).unwrap();
            file.write_all_at(&[was[0] ^ 1], at).unwrap();
            assert_ne!(of(&file, size), before, "byte {at}");
            file.write_all_at(&was, at).unwrap();
        }
        assert_eq!(of(&file, size), before);
        file.set_len(size + 1).unwrap();
        assert_ne!(of(&file, size + 1), before);
    }

    #[test]
    fn a_file_that_is_shorter_by_now_has_fewer_blocks() {
        let file = sample(100_000);
        file.set_len(9000).unwrap();
        let blocks = scan(&file, &how(100_000, 1), &|at, bytes, _| {
            assert!(at + bytes.len() as u64 <= 8192);
            Ok(())
        });
        assert_eq!(blocks.unwrap().iter().map(|(n, _)| n).collect::<Vec<_>>(), [0, 1]);
    }
}
