//! Bytes <-> frames. A frame is a 16-byte header and a payload; every length is capped before memory is allocated.
//!
//! ```text
//!  0        4      6       8                16
//!  | length | kind | flags | xxh3 of payload | payload (length bytes) |      all little-endian
//! ```
//!
//! The checksum is for checkpoint files; it costs about 0.1 ms a MiB. On a connection, which TLS protects, memory goes
//! without it and says so in the flags; where nothing else protects the bytes, such a frame is refused.
//! What a payload means is [`super::protocol`]'s business.

use std::io::{self, Write};

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes in a frame's header.
pub const HEADER_LEN: usize = 16;
/// The largest payload of a data frame (pages, file and layer content), in bytes.
pub const MAX_DATA: usize = (1 << 20) + 64;
/// The largest payload of a [`Kind::Memory`] frame, in bytes: a megabyte of pages, the list of their runs, and what
/// compression may add to data that does not shrink.
pub const MAX_MEMORY: usize = (1 << 20) + (128 << 10);
/// The largest payload of a control frame (JSON), in bytes: an offer holds a container's whole spec.
pub const MAX_CONTROL: usize = 16 << 20;
/// Flag: a receiver that does not know this kind may skip the frame.
pub const FLAG_SKIPPABLE: u16 = 1;
/// Flag: the payload has no checksum (the field is 0). Only between two ends of a protected connection.
pub const FLAG_UNCHECKED: u16 = 2;

/// What a frame carries. The numbers are the wire format: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// JSON [`super::protocol::Hello`].
    Hello = 1,
    /// JSON [`super::protocol::Welcome`].
    Welcome = 2,
    /// JSON [`super::protocol::Manifest`].
    Manifest = 3,
    /// JSON [`super::protocol::Frozen`]: the source's tasks stand still from here on.
    Frozen = 4,
    /// JSON [`super::protocol::FileHeader`]: an image file begins.
    File = 10,
    /// Raw bytes of the image file begun last.
    FileData = 11,
    /// Raw: the memory of one process or shared segment begins, see [`super::stream`].
    PagesOpen = 20,
    /// Raw: a run of pages.
    Pages = 21,
    /// Raw: a run of pages without content here (zero or in a parent).
    PagesHole = 22,
    /// The memory opened last is complete.
    PagesClose = 23,
    /// Raw: pages of one space, many runs, maybe compressed ([`crate::memory::batch`]).
    Memory = 24,
    /// Raw: post-copy, the destination asks for pages: kind u8, id u64, start u64, end u64.
    MemoryWant = 25,
    /// JSON (may be `{}`): post-copy, everything that was still on the source has been sent.
    MemoryDone = 26,
    /// JSON: a pre-copy round begins or ends.
    Round = 27,
    /// JSON: the source is about to freeze.
    Prepare = 28,
    /// JSON: the destination stands at gate 1 and waits for the rest.
    Ready = 29,
    /// Raw: one entry of the writable layer ([`crate::rootfs::Entry`]).
    LayerEntry = 30,
    /// Raw: content of the entry sent last: offset u64, bytes.
    LayerData = 31,
    /// JSON: the layer is complete.
    LayerEnd = 32,
    /// Raw: what of one space is still on the source at the commit: kind u8, id u64, then (start u64, end u64)*.
    /// A space with more ranges than one frame holds has several frames.
    RemotePages = 33,
    /// Raw, in the same form: what of one space was written or used last, and is best restored eagerly.
    HotPages = 34,
    /// Raw: content of a tmpfs file, copied ahead ([`super::tmpfs`]); protocol 3.
    Staged = 35,
    /// Raw: packets that came to the frozen container ([`super::backlog`]); skippable.
    Backlog = 36,
    /// Raw: pages of the memory opened last without content here, as bits ([`crate::memory::sets`]); protocol 4.
    PagesExist = 37,
    /// JSON: stdio that was queued at the freeze (opaque to this crate, the shim's `Carry`).
    Stdio = 40,
    /// JSON [`super::protocol::Final`]: everything was sent.
    Final = 50,
    /// JSON [`super::protocol::Restored`].
    Restored = 51,
    /// JSON [`super::protocol::Commit`].
    Commit = 52,
    /// JSON [`super::protocol::Running`].
    Running = 53,
    /// JSON [`super::protocol::Failure`].
    Failed = 54,
    /// Nothing but a sign of life.
    Heartbeat = 60,
}

impl Kind {
    /// Every kind, for decoding and for tests.
    pub const ALL: [Kind; 31] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Manifest,
        Kind::Frozen,
        Kind::File,
        Kind::FileData,
        Kind::PagesOpen,
        Kind::Pages,
        Kind::PagesHole,
        Kind::PagesClose,
        Kind::Memory,
        Kind::MemoryWant,
        Kind::MemoryDone,
        Kind::Round,
        Kind::Prepare,
        Kind::Ready,
        Kind::LayerEntry,
        Kind::LayerData,
        Kind::LayerEnd,
        Kind::RemotePages,
        Kind::HotPages,
        Kind::Staged,
        Kind::Backlog,
        Kind::PagesExist,
        Kind::Stdio,
        Kind::Final,
        Kind::Restored,
        Kind::Commit,
        Kind::Running,
        Kind::Failed,
        Kind::Heartbeat,
    ];

    /// The kind with this number on the wire.
    pub fn from_wire(n: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| *k as u16 == n)
    }

    /// The largest payload that this kind may have.
    pub const fn cap(self) -> usize {
        match self {
            Kind::FileData | Kind::Pages | Kind::LayerData | Kind::LayerEntry => MAX_DATA,
            Kind::RemotePages | Kind::HotPages | Kind::PagesExist => MAX_DATA,
            Kind::Staged | Kind::Backlog => MAX_DATA,
            Kind::Memory => MAX_MEMORY,
            Kind::Stdio => MAX_CONTROL,
            Kind::Manifest => MAX_CONTROL,
            _ => 64 << 10,
        }
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Error)]
pub enum CodecError {
    /// The stream ended, failed or timed out.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The stream ended inside a frame or where one was due.
    #[error("the stream ends after {got} of {want} bytes of a frame")]
    Truncated {
        /// Bytes that arrived.
        got: usize,
        /// Bytes that the frame has.
        want: usize,
    },
    /// The payload is longer than its kind may be.
    #[error("a frame of kind {kind:?} claims {len} bytes, at most {cap} are allowed")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// The length it claims.
        len: usize,
        /// The length it may have.
        cap: usize,
    },
    /// The kind is unknown and may not be skipped.
    #[error("unknown frame kind {0}")]
    UnknownKind(u16),
    /// The payload has no checksum where one is needed.
    #[error("a {kind:?} frame of {len} bytes without a checksum")]
    Unchecked {
        /// The frame's kind.
        kind: Kind,
        /// The payload's length.
        len: usize,
    },
    /// The payload is not what was sent.
    #[error("checksum of a {kind:?} frame of {len} bytes does not match")]
    Checksum {
        /// The frame's kind.
        kind: Kind,
        /// The payload's length.
        len: usize,
    },
}

/// The 16 bytes in front of a payload made of `parts` (their concatenation). `protected`: something below protects the
/// bytes, memory needs no checksum.
///
/// # Panics
/// If the payload is longer than its kind's cap: a bug of the sender, not of the peer.
pub fn header(kind: Kind, parts: &[&[u8]], protected: bool) -> [u8; HEADER_LEN] {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    assert!(len <= kind.cap(), "a {kind:?} frame of {len} bytes");
    let unchecked = protected && kind == Kind::Memory;
    let sum = match parts {
        _ if unchecked => 0,
        [one] => xxh3_64(one),
        _ => {
            let mut h = xxhash_rust::xxh3::Xxh3::new();
            parts.iter().for_each(|p| h.update(p));
            h.digest()
        }
    };
    let skippable = if matches!(kind, Kind::Heartbeat | Kind::Backlog) { FLAG_SKIPPABLE } else { 0 };
    let flags = skippable | if unchecked { FLAG_UNCHECKED } else { 0 };
    let mut out = [0; HEADER_LEN];
    out[0..4].copy_from_slice(&(len as u32).to_le_bytes());
    out[4..6].copy_from_slice(&(kind as u16).to_le_bytes());
    out[6..8].copy_from_slice(&flags.to_le_bytes());
    out[8..16].copy_from_slice(&sum.to_le_bytes());
    out
}

/// Writes one frame whose payload is the concatenation of `parts`.
pub fn write(to: &mut impl Write, kind: Kind, parts: &[&[u8]], protected: bool) -> io::Result<()> {
    to.write_all(&header(kind, parts, protected))?;
    for p in parts {
        to.write_all(p)?;
    }
    Ok(())
}

/// Reads frames, a part at a time if need be: an error of the stream (nothing there yet) loses nothing, the next call goes
/// on. Never reads behind the frame.
#[derive(Default)]
pub struct Decoder {
    protected: bool,
    head: [u8; HEADER_LEN],
    head_len: usize,
    /// The longest payload so far; the present one is `payload[..len]`.
    payload: Vec<u8>,
    len: usize,
    got: usize,
}

impl Decoder {
    /// `protected`: something below protects the bytes, memory may come without a checksum.
    pub fn new(protected: bool) -> Decoder {
        Decoder { protected, ..Decoder::default() }
    }

    /// The payload of the frame that [`Decoder::next`] returned last.
    pub fn payload(&self) -> &[u8] {
        &self.payload[..self.len]
    }

    /// The same, to keep; `spare` is memory to go on with.
    pub fn take(&mut self, spare: Vec<u8>) -> Vec<u8> {
        let mut payload = std::mem::replace(&mut self.payload, spare);
        payload.truncate(self.len);
        self.len = 0;
        payload
    }

    /// Reads until a frame of a known kind is whole; skippable unknown ones are dropped.
    ///
    /// # Errors
    /// [`CodecError`]; a clean end of the stream in front of a frame is `Truncated { got: 0, .. }`. After an
    /// [`CodecError::Io`] the call may be repeated, after any other error not.
    pub fn next(&mut self, from: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>) -> Result<Kind, CodecError> {
        loop {
            read_full(from, &mut self.head, &mut self.head_len)?;
            let field =
                |a: usize, b: usize| self.head[a..b].iter().rev().fold(0u64, |n, x| n << 8 | u64::from(*x));
            let (len, number, flags, sum) =
                (field(0, 4) as usize, field(4, 6) as u16, field(6, 8) as u16, field(8, 16));
            let kind = Kind::from_wire(number);
            match kind {
                Some(kind) if len > kind.cap() => {
                    return Err(CodecError::TooLong { kind, len, cap: kind.cap() });
                }
                None if flags & FLAG_SKIPPABLE == 0 || len > MAX_DATA => {
                    return Err(CodecError::UnknownKind(number));
                }
                _ => {}
            }
            self.len = len;
            if self.payload.len() < len {
                self.payload.resize(len, 0);
            }
            read_full(from, &mut self.payload[..len], &mut self.got)?;
            (self.head_len, self.got) = (0, 0);
            let Some(kind) = kind else { continue };
            if flags & FLAG_UNCHECKED != 0 {
                if !self.protected {
                    return Err(CodecError::Unchecked { kind, len });
                }
            } else if xxh3_64(self.payload()) != sum {
                return Err(CodecError::Checksum { kind, len });
            }
            return Ok(kind);
        }
    }
}

/// Fills `buf` from where `got` says.
fn read_full(
    from: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    buf: &mut [u8],
    got: &mut usize,
) -> Result<(), CodecError> {
    while *got < buf.len() {
        match from(&mut buf[*got..]) {
            Ok(0) => return Err(CodecError::Truncated { got: *got, want: buf.len() }),
            Ok(n) => *got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // rustls says this for a connection that was cut without a close_notify
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(CodecError::Truncated { got: *got, want: buf.len() });
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn write(to: &mut Vec<u8>, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        super::write(to, kind, parts, false)
    }

    fn read(from: &mut &[u8], buf: &mut Vec<u8>) -> Result<Kind, CodecError> {
        let mut decoder = Decoder::new(false);
        let kind = decoder.next(&mut |b| from.read(b));
        *buf = decoder.take(Vec::new());
        kind
    }

    #[test]
    fn kinds_are_a_bijection() {
        for k in Kind::ALL {
            assert_eq!(Kind::from_wire(k as u16), Some(k));
            assert_eq!(Kind::ALL.iter().filter(|o| **o as u16 == k as u16).count(), 1);
        }
        assert_eq!(Kind::from_wire(0), None);
        let newest = [24, 25, 26, 27, 28, 29, 33, 34, 35].map(|n| Kind::from_wire(n).expect("a kind"));
        assert!(newest.iter().all(|k| k.cap() <= MAX_MEMORY));
    }

    #[test]
    fn a_frame_in_parts_arrives_whole() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Pages, &[b"head", &[7; 5000]]).unwrap();
        write(&mut bytes, Kind::Heartbeat, &[]).unwrap();
        let (mut from, mut buf) = (&bytes[..], Vec::new());
        assert_eq!(read(&mut from, &mut buf).unwrap(), Kind::Pages);
        assert_eq!((&buf[..4], buf.len(), buf[5003]), (&b"head"[..], 5004, 7));
        assert_eq!(read(&mut from, &mut buf).unwrap(), Kind::Heartbeat);
        assert!(matches!(read(&mut from, &mut buf), Err(CodecError::Truncated { got: 0, .. })));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::FileData, &[b"some content of a file"]).unwrap();
        let mut buf = Vec::new();
        for cut in 0..bytes.len() {
            assert!(read(&mut &bytes[..cut], &mut buf).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let got = read(&mut &bad[..], &mut buf);
            // the flags are not covered by the checksum, and may change without harm to a known kind
            assert!((48..64).contains(&bit) || !matches!(got, Ok(Kind::FileData)), "bit {bit}: {got:?}");
        }
    }

    #[test]
    fn a_length_is_capped_before_memory_is_taken() {
        let mut head = header(Kind::Hello, &[], false);
        head[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut buf = Vec::new();
        assert!(matches!(read(&mut &head[..], &mut buf), Err(CodecError::TooLong { .. })));
        assert_eq!(buf.capacity(), 0);
    }

    #[test]
    fn unknown_kinds_are_skipped_only_where_the_sender_allows_it() {
        let mut bytes = header(Kind::Heartbeat, &[b"xyz"], false).to_vec();
        bytes[4..6].copy_from_slice(&999u16.to_le_bytes());
        bytes.extend_from_slice(b"xyz");
        write(&mut bytes, Kind::Commit, &[b"{}"]).unwrap();
        let mut buf = Vec::new();
        assert_eq!(read(&mut &bytes[..], &mut buf).unwrap(), Kind::Commit);
        bytes[6] = 0;
        assert!(matches!(read(&mut &bytes[..], &mut buf), Err(CodecError::UnknownKind(999))));
    }

    #[test]
    fn a_frame_that_comes_in_bits_is_put_together() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::FileData, &[b"some content"]).unwrap();
        write(&mut bytes, Kind::Commit, &[b"{}"]).unwrap();
        let (mut decoder, mut from, mut ready) = (Decoder::new(false), &bytes[..], false);
        let mut kinds = Vec::new();
        while kinds.len() < 2 {
            // every second read finds nothing, the others one byte
            let got = decoder.next(&mut |b| {
                ready = !ready;
                if ready { from.read(&mut b[..1]) } else { Err(io::ErrorKind::WouldBlock.into()) }
            });
            match got {
                Ok(kind) => kinds.push((kind, decoder.payload().to_vec())),
                Err(CodecError::Io(_)) => {}
                Err(e) => panic!("{e}"),
            }
        }
        let want = [(Kind::FileData, b"some content".to_vec()), (Kind::Commit, b"{}".to_vec())];
        assert_eq!(kinds, want);
    }

    #[test]
    fn memory_goes_unchecked_only_where_something_else_protects_it() {
        for (kind, unchecked) in [(Kind::Memory, true), (Kind::Pages, false), (Kind::FileData, false)] {
            let mut bytes = Vec::new();
            super::write(&mut bytes, kind, &[b"bytes"], true).unwrap();
            assert_eq!(bytes[8..16] == [0; 8], unchecked, "{kind:?}");
            let next = |protected, mut from: &[u8]| Decoder::new(protected).next(&mut |b| from.read(b));
            assert_eq!(next(true, &bytes).unwrap(), kind);
            let file = next(false, &bytes);
            assert_eq!(matches!(file, Err(CodecError::Unchecked { .. })), unchecked, "{file:?}");
        }
    }
}
