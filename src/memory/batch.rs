//! Pages on the wire: the payload of a [`Kind::Memory`](crate::migrate::codec::Kind::Memory) frame, many runs of one
//! space in it.
//!
//! ```text
//!  0      1             2         4      8    16        20           24
//!  | kind | compression | nothing | runs | id | plain u32 | stored u32 | data (stored bytes) | runs * (vaddr u64, run u64) |
//! ```
//!
//! All little-endian. A run's second word is its length in bytes with what it is in the top byte: 0 data, 1 zeros, 2 gone.
//! The data runs' bytes stand in `data` in the order of the runs, `plain` bytes in all; compression covers `data` as a
//! whole. Runs come in any order; where they overlap, the later one counts.
//!
//! A payload is the peer's word, or a file's: [`decode`] checks everything before memory is taken or a run is believed.
//! How data is compressed is [`super::compress`]'s business.

use anyhow::{Context, Result, ensure};

use super::Space;
use super::compress::{self, Codec};
use super::read::Chunk;
use super::sets::{SPACE_LEN, decode_space, encode_space};
use crate::criu::page_server::page_size;
use crate::migrate::codec::MAX_MEMORY;

/// The most data in one payload before compression, in bytes.
pub const MAX_BATCH: usize = 1 << 20;
/// The most runs in one payload.
pub const MAX_RUNS: usize = 4096;
pub(super) const HEADER: usize = 24;
const RUN: usize = 16;
/// The longest run of zero or gone pages, in bytes: more than any address space has.
const MAX_LEN: u64 = (1 << 56) - 1;

const _: () = assert!(HEADER + MAX_BATCH + MAX_RUNS * RUN <= MAX_MEMORY);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    kind: u8,
    vaddr: u64,
    len: u64,
}

const DATA: u8 = 0;
const ZERO: u8 = 1;
const GONE: u8 = 2;

/// Collects the pages of one space into payloads.
pub struct Builder {
    space: Space,
    limit: usize,
    payload: Vec<u8>,
    runs: Vec<Run>,
    spare: Vec<Vec<u8>>,
}

impl Builder {
    /// A payload is full at `limit` bytes of data ([`MAX_BATCH`] at most), or with [`MAX_RUNS`] runs.
    pub fn new(space: Space, limit: usize) -> Builder {
        let limit = limit.clamp(page_size(), MAX_BATCH);
        Builder { space, limit, payload: Vec::new(), runs: Vec::new(), spare: Vec::new() }
    }

    /// Goes on with another space; what was pushed before must have been taken by [`Builder::finish`].
    pub fn space(&mut self, space: Space) {
        debug_assert!(self.runs.is_empty(), "pages of another space are still in it");
        self.space = space;
    }

    /// Gives a payload's memory back, to be used again: fresh memory costs a page fault for each 4 KiB.
    pub fn reuse(&mut self, payload: Vec<u8>) {
        if self.spare.len() < 8 {
            self.spare.push(payload);
        }
    }

    /// Adds a run; a payload that became full on the way is returned (plain, see
    /// [`Compressor::pack`](super::compress::Compressor::pack)).
    ///
    /// # Panics
    /// If the run is no whole number of pages or has more data than [`MAX_BATCH`]: a bug of the caller.
    pub fn push(&mut self, chunk: Chunk<'_>) -> Option<Vec<u8>> {
        let (run, bytes): (Run, &[u8]) = match chunk {
            Chunk::Data { vaddr, bytes } => (Run { kind: DATA, vaddr, len: bytes.len() as u64 }, bytes),
            Chunk::Zero { vaddr, len } => (Run { kind: ZERO, vaddr, len }, &[]),
            Chunk::Gone { vaddr, len } => (Run { kind: GONE, vaddr, len }, &[]),
        };
        let page = page_size() as u64;
        assert!(run.len % page == 0 && run.vaddr % page == 0, "a run of {} bytes at {}", run.len, run.vaddr);
        assert!(bytes.len() <= MAX_BATCH && run.len <= MAX_LEN, "a run of {} bytes", run.len);
        if run.len == 0 {
            return None;
        }
        let used = self.payload.len().saturating_sub(HEADER);
        let (fits, rest) = bytes.split_at(bytes.len().min(MAX_BATCH - used));
        let head = Run { len: if run.kind == DATA { fits.len() as u64 } else { run.len }, ..run };
        self.add(head, fits);
        let full = (used + fits.len() >= self.limit || self.runs.len() >= MAX_RUNS).then(|| self.emit());
        if !rest.is_empty() {
            let vaddr = run.vaddr + fits.len() as u64;
            self.add(Run { kind: DATA, vaddr, len: rest.len() as u64 }, rest);
        }
        full
    }

    /// The last payload, if anything is in it.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        (!self.runs.is_empty()).then(|| self.emit())
    }

    fn add(&mut self, run: Run, bytes: &[u8]) {
        if run.len == 0 {
            return;
        }
        if self.payload.is_empty() {
            self.payload.resize(HEADER, 0);
        }
        self.payload.extend_from_slice(bytes);
        match self.runs.last_mut() {
            // neighbours join: the data of both stands together, too
            Some(last)
                if last.kind == run.kind
                    && last.vaddr + last.len == run.vaddr
                    && last.len + run.len <= MAX_LEN =>
            {
                last.len += run.len;
            }
            _ => self.runs.push(run),
        }
    }

    fn emit(&mut self) -> Vec<u8> {
        let mut next = self.spare.pop().unwrap_or_default();
        next.clear();
        let mut payload = std::mem::replace(&mut self.payload, next);
        let plain = (payload.len() - HEADER) as u32;
        payload[0] = encode_space(self.space)[0];
        payload[1] = Codec::None as u8;
        payload[4..8].copy_from_slice(&(self.runs.len() as u32).to_le_bytes());
        payload[8..16].copy_from_slice(&self.space.id.to_le_bytes());
        payload[16..20].copy_from_slice(&plain.to_le_bytes());
        payload[20..24].copy_from_slice(&plain.to_le_bytes());
        for run in self.runs.drain(..) {
            payload.extend_from_slice(&run.vaddr.to_le_bytes());
            payload.extend_from_slice(&(run.len | u64::from(run.kind) << 56).to_le_bytes());
        }
        payload
    }
}

/// A payload's header, checked against its length.
pub(super) struct Header {
    pub codec: Codec,
    pub plain: usize,
    pub stored: usize,
}

impl Header {
    pub(super) fn read(payload: &[u8]) -> Result<Header> {
        ensure!(payload.len() >= HEADER, "a Memory frame of {} bytes", payload.len());
        let codec = Codec::from_wire(payload[1]).context("a Memory frame with unknown compression")?;
        ensure!(payload[2..4] == [0, 0], "a Memory frame of another version");
        let (plain, stored) = (u32_at(payload, 16) as usize, u32_at(payload, 20) as usize);
        let runs = u32_at(payload, 4) as usize;
        ensure!(plain <= MAX_BATCH && stored <= MAX_BATCH, "a Memory frame with {plain} bytes of data");
        ensure!(runs <= MAX_RUNS, "a Memory frame with {runs} runs");
        ensure!(codec != Codec::None || plain == stored, "a Memory frame with two lengths");
        let want = HEADER + stored + runs * RUN;
        ensure!(payload.len() == want, "a Memory frame of {} bytes, {want} expected", payload.len());
        Ok(Header { codec, plain, stored })
    }
}

/// A payload that was checked.
#[derive(Debug)]
pub struct Batch<'a> {
    space: Space,
    data: &'a [u8],
    runs: &'a [u8],
}

/// Reads a payload. `scratch` takes decompressed data (no more than [`MAX_BATCH`]); use it again for the next payload.
///
/// # Errors
/// Anything about it is wrong: nothing of it should be used.
pub fn decode<'a>(payload: &'a [u8], scratch: &'a mut Vec<u8>) -> Result<Batch<'a>> {
    let header = Header::read(payload)?;
    let mut space = [0; SPACE_LEN];
    space[0] = payload[0];
    space[1..].copy_from_slice(&payload[8..16]);
    let space = decode_space(&space)?;
    let (stored, runs) = payload[HEADER..].split_at(header.stored);
    let (page, mut data) = (page_size() as u64, 0u64);
    for run in runs.as_chunks().0.iter().map(run_at) {
        let Run { kind, vaddr, len } = run;
        ensure!(kind <= GONE, "a run of unknown kind {kind}");
        ensure!(len > 0 && len % page == 0 && vaddr % page == 0, "a run of {len} bytes at {vaddr:#x}");
        ensure!(vaddr.checked_add(len).is_some(), "a run that ends behind the last address");
        // each is below 2^56 and there are few: no overflow
        data += if kind == DATA { len } else { 0 };
    }
    ensure!(data == header.plain as u64, "runs of {data} bytes with {} bytes of data", header.plain);
    let data = match header.codec {
        Codec::None => stored,
        codec => compress::decompress(codec, stored, header.plain, scratch)?,
    };
    Ok(Batch { space, data, runs })
}

impl<'a> Batch<'a> {
    /// Whose pages these are.
    pub fn space(&self) -> Space {
        self.space
    }

    /// The runs, in the order in which they count.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk<'a>> + use<'a> {
        let mut data = self.data;
        self.runs.as_chunks().0.iter().map(run_at).map(move |Run { kind, vaddr, len }| match kind {
            DATA => {
                let (bytes, rest) = data.split_at(len as usize);
                data = rest;
                Chunk::Data { vaddr, bytes }
            }
            ZERO => Chunk::Zero { vaddr, len },
            _ => Chunk::Gone { vaddr, len },
        })
    }

    /// Bytes of data in it, decompressed.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }
}

fn run_at(run: &[u8; RUN]) -> Run {
    let word = |at: usize| u64::from_le_bytes(run[at..at + 8].try_into().expect("eight bytes"));
    Run { kind: (word(8) >> 56) as u8, vaddr: word(0), len: word(8) & MAX_LEN }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes, length checked by the caller"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::ImageKind;
    use crate::memory::compress::{Compression, Compressor};
    use std::collections::BTreeMap;

    const SPACE: Space = Space { kind: ImageKind::Pid, id: 4711 };

    fn random(seed: &mut u64, n: u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) % n
    }

    /// Pages of a space as they are after these chunks: content, or what else.
    fn pages<'a>(chunks: impl Iterator<Item = Chunk<'a>>, into: &mut BTreeMap<u64, Result<Vec<u8>, u8>>) {
        let page = page_size() as u64;
        for chunk in chunks {
            let (vaddr, len, what) = match chunk {
                Chunk::Data { vaddr, bytes } => (vaddr, bytes.len() as u64, None),
                Chunk::Zero { vaddr, len } => (vaddr, len, Some(ZERO)),
                Chunk::Gone { vaddr, len } => (vaddr, len, Some(GONE)),
            };
            for at in (0..len).step_by(page as usize) {
                let content = match chunk {
                    Chunk::Data { bytes, .. } => Ok(bytes[at as usize..][..page as usize].to_vec()),
                    _ => Err(what.unwrap()),
                };
                into.insert(vaddr + at, content);
            }
        }
    }

    #[test]
    fn what_is_pushed_arrives_in_any_order_and_compression() {
        let page = page_size() as u64;
        let mut seed = 3;
        for (compression, limit) in [
            (Compression::None, MAX_BATCH),
            (Compression::Lz4, 64 << 10),
            (Compression::Zstd, 1),
            (Compression::Auto, MAX_BATCH),
        ] {
            let (mut builder, mut pack) = (Builder::new(SPACE, limit), Compressor::new(compression));
            pack.limit(1_000_000);
            let (mut want, mut got, mut payloads) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
            for _ in 0..200 {
                let (vaddr, n) = (random(&mut seed, 4000) * page, 1 + random(&mut seed, 40));
                let len = (n * page) as usize;
                let bytes: Vec<u8> = match random(&mut seed, 2) {
                    0 => (0..len).map(|_| random(&mut seed, 256) as u8).collect(),
                    _ => (0..len).map(|i| (i / 100) as u8).collect(),
                };
                let chunk = match random(&mut seed, 6) {
                    0 => Chunk::Zero { vaddr, len: n * page },
                    1 => Chunk::Gone { vaddr, len: n * page },
                    _ => Chunk::Data { vaddr, bytes: &bytes },
                };
                pages([chunk].into_iter(), &mut want);
                payloads.extend(builder.push(chunk));
            }
            let big = vec![9; MAX_BATCH];
            for n in 0..3 {
                let chunk = Chunk::Data { vaddr: n * page, bytes: &big };
                pages([chunk].into_iter(), &mut want);
                payloads.extend(builder.push(chunk));
            }
            payloads.extend(builder.finish());
            assert!(builder.finish().is_none());
            let mut scratch = Vec::new();
            for payload in payloads {
                let payload = pack.pack(payload);
                assert!(payload.len() <= MAX_MEMORY);
                let batch = decode(&payload, &mut scratch).unwrap();
                assert_eq!(batch.space(), SPACE);
                pages(batch.chunks(), &mut got);
                builder.reuse(payload);
            }
            assert!(want == got, "{compression}");
        }
    }

    #[test]
    fn neighbours_join_and_many_single_pages_fit() {
        let page = page_size() as u64;
        let mut builder = Builder::new(SPACE, MAX_BATCH);
        let one = vec![1; page as usize];
        for n in [0, 1, 2, 5, 6] {
            assert_eq!(builder.push(Chunk::Data { vaddr: n * page, bytes: &one }), None);
        }
        builder.push(Chunk::Zero { vaddr: 7 * page, len: page });
        builder.push(Chunk::Zero { vaddr: 8 * page, len: 1 << 40 });
        let payload = builder.finish().unwrap();
        assert_eq!(decode(&payload, &mut Vec::new()).unwrap().chunks().count(), 3);
        let many = (0..3 * MAX_RUNS as u64)
            .filter_map(|n| builder.push(Chunk::Zero { vaddr: n * 2 * page, len: page }));
        assert_eq!(many.count(), 3);
        assert!(builder.finish().is_none());
    }

    #[test]
    fn neighbours_that_are_too_long_together_stay_apart() {
        let mut builder = Builder::new(SPACE, MAX_BATCH);
        let half = 1 << 55;
        for at in [0, half, 2 * half] {
            assert_eq!(builder.push(Chunk::Zero { vaddr: at, len: half }), None);
        }
        let (payload, mut scratch) = (builder.finish().unwrap(), Vec::new());
        let batch = decode(&payload, &mut scratch).unwrap();
        let zeros = batch.chunks().map(|c| match c {
            Chunk::Zero { len, .. } => len,
            other => panic!("{other:?}"),
        });
        assert_eq!(zeros.sum::<u64>(), 3 * half);
    }

    #[test]
    fn hostile_payloads_neither_panic_nor_take_memory() {
        let page = page_size() as u64;
        let mut seed = 11;
        let mut samples = Vec::new();
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
            let mut builder = Builder::new(SPACE, MAX_BATCH);
            for n in 0..12 {
                let bytes: Vec<u8> = (0..page as usize * 2).map(|i| (i / 50 * n) as u8).collect();
                builder.push(Chunk::Data { vaddr: n as u64 * 7 * page, bytes: &bytes });
                builder.push(Chunk::Zero { vaddr: (n as u64 * 7 + 3) * page, len: page });
            }
            samples.push(Compressor::new(compression).pack(builder.finish().unwrap()));
        }
        assert_eq!(samples.iter().map(|s| s[1]).collect::<Vec<_>>(), [0, 1, 2]);
        let (mut scratch, mut refused) = (Vec::new(), 0);
        let interesting = [0, 1, 0x7f, 0x80, 0xff];
        for round in 0..30_000 {
            let mut bad = samples[round % 3].clone();
            for _ in 0..=random(&mut seed, 3) {
                // the header and the list of runs are what a length is taken from: hit them more often
                let at = match random(&mut seed, 3) {
                    0 => random(&mut seed, HEADER as u64) as usize,
                    1 => bad.len().saturating_sub(1 + random(&mut seed, 24 * 16) as usize),
                    _ => random(&mut seed, bad.len() as u64) as usize,
                };
                let at = at.min(bad.len() - 1);
                match random(&mut seed, 8) {
                    0 => bad.truncate(at.max(1)),
                    1 => bad.insert(at, random(&mut seed, 256) as u8),
                    2 => bad[at] = interesting[random(&mut seed, 5) as usize],
                    _ => bad[at] ^= 1 << random(&mut seed, 8),
                }
            }
            match decode(&bad, &mut scratch) {
                // data that was changed is TLS's business; it must still be a well-formed batch
                Ok(batch) => batch.chunks().for_each(|chunk| match chunk {
                    Chunk::Data { vaddr, bytes } => {
                        assert!(
                            vaddr % page == 0
                                && (bytes.len() as u64).is_multiple_of(page)
                                && !bytes.is_empty()
                        );
                    }
                    Chunk::Zero { vaddr, len } | Chunk::Gone { vaddr, len } => {
                        assert!(vaddr % page == 0 && len % page == 0 && vaddr.checked_add(len).is_some());
                    }
                }),
                Err(_) => refused += 1,
            }
            assert!(scratch.capacity() <= MAX_BATCH + 64, "{}", scratch.capacity());
        }
        assert!(refused > 10_000, "{refused}");
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let page = page_size() as u64;
        let mut builder = Builder::new(SPACE, MAX_BATCH);
        builder.push(Chunk::Data { vaddr: page, bytes: &vec![1; 2 * page as usize] });
        let good = builder.finish().unwrap();
        let with = |at: usize, word: u64| {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&word.to_le_bytes());
            decode(&bad, &mut Vec::new()).map(drop)
        };
        let run = good.len() - RUN;
        assert!(with(run, 5 * page).is_ok() && with(8, 1).is_ok());
        assert!(with(run, 5 * page + 1).is_err(), "no page's address");
        assert!(with(run, u64::MAX - page + 1).is_err(), "behind the last address");
        assert!(with(run + 8, page).is_err() && with(run + 8, 3 * page).is_err(), "other data");
        assert!(with(run + 8, (2 * page) | (1 << 56)).is_err(), "data that belongs to no run");
        assert!(with(run + 8, (2 * page) | (3 << 56)).is_err(), "an unknown kind of run");
        assert!(with(16, u64::MAX).is_err());
    }
}
