//! Spaces and sets of ranges as raw frames: `MemoryWant`, `RemotePages`, `HotPages`, `PagesExist` of [`crate::migrate::codec`].
//!
//! ```text
//! MemoryWant               kind u8 (1 process, 2 shared memory), id u64, start u64, end u64
//! RemotePages, HotPages    kind u8, id u64, then (start u64, end u64)*
//! PagesExist               (first chunk u64, the one behind the last u64, bits 8 * u64)*      chunks of 512 pages
//! ```
//!
//! Little-endian; ranges are half-open, whole pages, ascending and apart. A set of a GiB in very many pieces is 40 KiB of chunks
//! and may be megabytes of ranges. Pages themselves are [`super::batch`]'s.

use std::ops::Range;

use anyhow::{Result, bail, ensure};

use super::Space;
use super::range::{Chunk, RangeSet};
use crate::criu::ImageKind;
use crate::criu::page_server::page_size;
use crate::migrate::codec::MAX_DATA;

/// Bytes of a space.
pub const SPACE_LEN: usize = 9;
/// Ranges in one frame, at most.
pub const MAX_RANGES: usize = (MAX_DATA - SPACE_LEN) / 16;

/// A space in bytes.
pub fn encode_space(space: Space) -> [u8; SPACE_LEN] {
    let mut out = [0; SPACE_LEN];
    out[0] = match space.kind {
        ImageKind::Pid => 1,
        ImageKind::Shmem => 2,
    };
    out[1..].copy_from_slice(&space.id.to_le_bytes());
    out
}

/// A space from its bytes.
///
/// # Errors
/// It is of a kind that does not exist.
pub fn decode_space(bytes: &[u8; SPACE_LEN]) -> Result<Space> {
    let kind = match bytes[0] {
        1 => ImageKind::Pid,
        2 => ImageKind::Shmem,
        n => bail!("memory of unknown kind {n}"),
    };
    Ok(Space { kind, id: u64::from_le_bytes(bytes[1..].try_into()?) })
}

/// The payload of a `MemoryWant` frame.
pub fn encode_want(space: Space, range: &Range<u64>) -> [u8; SPACE_LEN + 16] {
    let mut out = [0; SPACE_LEN + 16];
    out[..9].copy_from_slice(&encode_space(space));
    out[9..17].copy_from_slice(&range.start.to_le_bytes());
    out[17..].copy_from_slice(&range.end.to_le_bytes());
    out
}

/// What a `MemoryWant` frame asks for.
///
/// # Errors
/// It is no whole number of pages of a space.
pub fn decode_want(payload: &[u8]) -> Result<(Space, Range<u64>)> {
    ensure!(payload.len() == SPACE_LEN + 16, "a MemoryWant frame of {} bytes", payload.len());
    let (space, set) = decode_ranges(payload)?;
    let range = set.iter().next();
    range.map_or_else(|| bail!("an empty MemoryWant frame"), |range| Ok((space, range)))
}

/// The payloads of as many `RemotePages` or `HotPages` frames as the set needs (one if it is empty).
pub fn encode_ranges(space: Space, set: &RangeSet) -> Vec<Vec<u8>> {
    let mut frames = vec![encode_space(space).to_vec()];
    for (n, range) in set.iter().enumerate() {
        if n > 0 && n % MAX_RANGES == 0 {
            frames.push(encode_space(space).to_vec());
        }
        let frame = frames.last_mut().expect("never empty");
        frame.extend_from_slice(&range.start.to_le_bytes());
        frame.extend_from_slice(&range.end.to_le_bytes());
    }
    frames
}

/// One such payload; the frames of a space are united by the caller.
///
/// # Errors
/// A range is empty, no whole number of pages, or not behind the one before it.
pub fn decode_ranges(payload: &[u8]) -> Result<(Space, RangeSet)> {
    let Some((space, ranges)) = payload.split_first_chunk() else {
        bail!("a frame of {} bytes where ranges of pages were due", payload.len());
    };
    let (ranges, rest) = ranges.as_chunks::<16>();
    ensure!(rest.is_empty(), "a frame with half a range");
    let (page, mut at, mut set) = (page_size() as u64, None, RangeSet::new());
    for range in ranges {
        let word = |at: usize| u64::from_le_bytes(range[at..at + 8].try_into().expect("eight bytes"));
        let (start, end) = (word(0), word(8));
        ensure!(start < end && at.is_none_or(|at| at < start), "ranges of pages out of order");
        ensure!(start % page == 0 && end % page == 0, "no whole pages: {start:#x} to {end:#x}");
        at = Some(end);
        set.insert(start..end);
    }
    Ok((decode_space(space)?, set))
}

/// Bytes of a chunk in a `PagesExist` frame.
const CHUNK_LEN: usize = 80;
/// Chunks in one such frame, at most.
const MAX_CHUNKS: usize = MAX_DATA / CHUNK_LEN;

/// The payloads of as many `PagesExist` frames as the set needs (none if it is empty).
pub fn encode_bits(set: &RangeSet) -> Vec<Vec<u8>> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    for (n, Chunk { at, bits }) in set.chunks().enumerate() {
        if n % MAX_CHUNKS == 0 {
            frames.push(Vec::new());
        }
        let words = [at.start, at.end].into_iter().chain(bits);
        frames.last_mut().expect("never empty").extend(words.flat_map(u64::to_le_bytes));
    }
    frames
}

/// One such payload; the frames of a memory are united by the caller.
///
/// # Errors
/// A chunk has no page or is not behind the one before it.
pub fn decode_bits(payload: &[u8]) -> Result<RangeSet> {
    let (chunks, rest) = payload.as_chunks::<CHUNK_LEN>();
    ensure!(rest.is_empty() && !chunks.is_empty(), "a PagesExist frame of {} bytes", payload.len());
    let mut set = RangeSet::new();
    for chunk in chunks {
        let word = |n: usize| u64::from_le_bytes(*chunk[8 * n..].first_chunk().expect("ten words"));
        let chunk = Chunk { at: word(0)..word(1), bits: std::array::from_fn(|n| word(2 + n)) };
        ensure!(set.append(chunk.clone()), "no chunk of pages, or one out of order: {chunk:x?}");
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Space = Space { kind: ImageKind::Shmem, id: 0x1234_5678_9abc };

    #[test]
    fn sets_of_any_size_arrive() {
        let page = page_size() as u64;
        for n in [0, 1, 2, MAX_RANGES as u64, MAX_RANGES as u64 + 1] {
            let set: RangeSet = (0..n).map(|i| i * 3 * page..(i * 3 + 1) * page).collect();
            let frames = encode_ranges(SPACE, &set);
            assert_eq!(frames.len(), if n > MAX_RANGES as u64 { 2 } else { 1 });
            let mut got = RangeSet::new();
            for frame in frames {
                assert!(frame.len() <= MAX_DATA);
                let (space, part) = decode_ranges(&frame).unwrap();
                assert_eq!(space, SPACE);
                got = got.union(&part);
            }
            assert_eq!(got, set);
        }
        let want = encode_want(SPACE, &(page..4 * page));
        assert_eq!(decode_want(&want).unwrap(), (SPACE, page..4 * page));
    }

    #[test]
    fn sets_of_any_size_arrive_as_bits() {
        let page = page_size() as u64;
        let chunk = 512 * page;
        let every_other = |n: u64| (0..n).map(move |i| 2 * i * chunk + page..2 * i * chunk + 3 * page);
        let many = MAX_CHUNKS as u64;
        for (set, frames) in [
            (RangeSet::new(), 0),
            ([page..2 * page, 3 * chunk..9 * chunk, 9 * chunk..9 * chunk + page].into_iter().collect(), 1),
            (every_other(many).collect(), 1),
            (every_other(many + 1).collect(), 2),
        ] {
            let encoded = encode_bits(&set);
            assert_eq!(encoded.len(), frames);
            assert!(encoded.iter().all(|frame| frame.len() <= MAX_DATA));
            let decoded = encoded.iter().map(|frame| decode_bits(frame).unwrap());
            assert_eq!(decoded.fold(RangeSet::new(), |all, part| all.union(&part)), set);
        }
    }

    #[test]
    fn what_are_no_bits_is_refused() {
        let frame = |chunks: &[(u64, u64, u64)]| -> Vec<u8> {
            let words = |(a, b, bits): &(u64, u64, u64)| [&[*a, *b][..], &[*bits; 8]].concat();
            chunks.iter().flat_map(words).flat_map(u64::to_le_bytes).collect()
        };
        assert!(decode_bits(&frame(&[(1, 2, 1), (2, 5, !0), (7, 8, 6)])).is_ok());
        for bad in [
            frame(&[(1, 2, 0)]),
            frame(&[(2, 2, !0)]),
            frame(&[(2, 1, !0)]),
            frame(&[(1, 3, 1)]),
            frame(&[(1, 2, 1), (1, 2, 2)]),
            frame(&[(1, 4, !0), (3, 4, 2)]),
            frame(&[(5, 6, 1), (1, 4, !0)]),
            frame(&[(1, u64::MAX, !0)]),
            frame(&[(u64::MAX - 1, u64::MAX, 1)]),
            frame(&[(1, 2, 1)])[..79].to_vec(),
            vec![],
        ] {
            assert!(decode_bits(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_set_is_refused() {
        let page = page_size() as u64;
        let frame = |ranges: &[(u64, u64)]| {
            let mut out = encode_space(SPACE).to_vec();
            ranges.iter().for_each(|(a, b)| out.extend([a.to_le_bytes(), b.to_le_bytes()].concat()));
            out
        };
        assert!(decode_ranges(&frame(&[(0, page), (2 * page, 3 * page)])).is_ok());
        for bad in [
            frame(&[(page, page)]),
            frame(&[(2 * page, page)]),
            frame(&[(0, 1)]),
            frame(&[(1, page)]),
            frame(&[(2 * page, 3 * page), (0, page)]),
            frame(&[(0, 2 * page), (page, 3 * page)]),
            frame(&[])[..8].to_vec(),
            frame(&[(0, page)])[..24].to_vec(),
            [&[7], &frame(&[])[1..]].concat(),
            vec![],
        ] {
            assert!(decode_ranges(&bad).is_err(), "{bad:?}");
        }
        assert!(decode_want(&frame(&[])).is_err());
        assert!(decode_want(&frame(&[(0, page), (2 * page, 3 * page)])).is_err());
    }
}
