//! An entry as bytes and back. Compact: numbers take as many bytes as they need (LEB128), nothing is named.
//!
//! The bytes come from a peer. Decoding allocates no more than the input is long, accepts one encoding only for each
//! number, and leaves nothing unread; [`Entry::check`] then judges what the entry says. The protocol around it carries
//! the version.

use anyhow::{Context, Result, bail, ensure};

use super::entry::{Entry, Kind, MAX_ENTRY, MAX_XATTRS, Meta, Time, Totals, Xattr};

const END: u8 = 0;
const LINK: u8 = 1;
const DIRECTORY: u8 = 2;
const FILE: u8 = 3;
const SYMLINK: u8 = 4;
const FIFO: u8 = 5;
const SOCKET: u8 = 6;
const CHAR_DEVICE: u8 = 7;
const BLOCK_DEVICE: u8 = 8;
const WHITEOUT: u8 = 9;
const ROUND: u8 = 10;
const REMOVE: u8 = 11;
const HOLE: u8 = 12;
const PATCH: u8 = 13;

impl Entry {
    /// Appends the entry's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Entry::End(totals) => {
                out.push(END);
                put_number(out, totals.entries);
                put_number(out, totals.bytes);
            }
            Entry::Link { path, target } => {
                out.push(LINK);
                put_bytes(out, path);
                put_bytes(out, target);
            }
            Entry::Round { format } => {
                out.push(ROUND);
                put_number(out, (*format).into());
            }
            Entry::Remove { path } => {
                out.push(REMOVE);
                put_bytes(out, path);
            }
            Entry::Hole { offset, len } => {
                out.push(HOLE);
                put_number(out, *offset);
                put_number(out, *len);
            }
            Entry::Node { path, kind, meta } => {
                out.push(tag(kind));
                put_bytes(out, path);
                match kind {
                    Kind::File { size } | Kind::Patch { size } => put_number(out, *size),
                    Kind::Symlink { target } => put_bytes(out, target),
                    Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                        put_number(out, (*major).into());
                        put_number(out, (*minor).into());
                    }
                    Kind::Directory | Kind::Fifo | Kind::Socket | Kind::Whiteout => {}
                }
                put_meta(out, meta);
            }
        }
    }

    /// Reads one entry, which must be the whole of `bytes`.
    ///
    /// # Errors
    /// More than [`MAX_ENTRY`] bytes, cut short, something left over, or not an encoding at all. What the entry says is
    /// not judged here: see [`Entry::check`].
    pub fn decode(bytes: &[u8]) -> Result<Entry> {
        ensure!(bytes.len() <= MAX_ENTRY, "a layer entry of {} bytes (at most {MAX_ENTRY})", bytes.len());
        let mut reader = Reader { rest: bytes };
        let entry = reader.entry().context("malformed layer entry")?;
        ensure!(reader.rest.is_empty(), "malformed layer entry: {} bytes left over", reader.rest.len());
        Ok(entry)
    }
}

fn tag(kind: &Kind) -> u8 {
    match kind {
        Kind::Directory => DIRECTORY,
        Kind::File { .. } => FILE,
        Kind::Patch { .. } => PATCH,
        Kind::Symlink { .. } => SYMLINK,
        Kind::Fifo => FIFO,
        Kind::Socket => SOCKET,
        Kind::CharDevice { .. } => CHAR_DEVICE,
        Kind::BlockDevice { .. } => BLOCK_DEVICE,
        Kind::Whiteout => WHITEOUT,
    }
}

fn put_number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_time(out: &mut Vec<u8>, time: Time) {
    // Zigzag: small negative numbers stay short.
    put_number(out, ((time.secs << 1) ^ (time.secs >> 63)) as u64);
    put_number(out, time.nanos.into());
}

fn put_meta(out: &mut Vec<u8>, meta: &Meta) {
    for n in [meta.mode, meta.uid, meta.gid, meta.flags] {
        put_number(out, n.into());
    }
    put_time(out, meta.mtime);
    put_time(out, meta.atime);
    put_number(out, meta.xattrs.len() as u64);
    for x in &meta.xattrs {
        put_bytes(out, &x.name);
        put_bytes(out, &x.value);
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn entry(&mut self) -> Result<Entry> {
        let tag = self.byte()?;
        match tag {
            END => return Ok(Entry::End(Totals { entries: self.number()?, bytes: self.number()? })),
            LINK => return Ok(Entry::Link { path: self.bytes()?, target: self.bytes()? }),
            ROUND => return Ok(Entry::Round { format: self.small()? }),
            REMOVE => return Ok(Entry::Remove { path: self.bytes()? }),
            HOLE => return Ok(Entry::Hole { offset: self.number()?, len: self.number()? }),
            _ => {}
        }
        let path = self.bytes()?;
        let kind = match tag {
            DIRECTORY => Kind::Directory,
            FILE => Kind::File { size: self.number()? },
            PATCH => Kind::Patch { size: self.number()? },
            SYMLINK => Kind::Symlink { target: self.bytes()? },
            FIFO => Kind::Fifo,
            SOCKET => Kind::Socket,
            CHAR_DEVICE => Kind::CharDevice { major: self.small()?, minor: self.small()? },
            BLOCK_DEVICE => Kind::BlockDevice { major: self.small()?, minor: self.small()? },
            WHITEOUT => Kind::Whiteout,
            other => bail!("unknown kind {other}"),
        };
        Ok(Entry::Node { path, kind, meta: self.meta()? })
    }

    fn meta(&mut self) -> Result<Meta> {
        let (mode, uid, gid, flags) = (self.small()?, self.small()?, self.small()?, self.small()?);
        let (mtime, atime) = (self.time()?, self.time()?);
        let count = self.number()?;
        ensure!(count <= MAX_XATTRS as u64, "{count} extended attributes");
        // Grown as they come: the count alone must not cost memory.
        let mut xattrs = Vec::new();
        for _ in 0..count {
            xattrs.push(Xattr { name: self.bytes()?, value: self.bytes()? });
        }
        Ok(Meta { mode, uid, gid, mtime, atime, flags, xattrs })
    }

    fn time(&mut self) -> Result<Time> {
        let n = self.number()?;
        Ok(Time { secs: (n >> 1) as i64 ^ -((n & 1) as i64), nanos: self.small()? })
    }

    fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.rest.split_first().context("cut short")?;
        self.rest = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            ensure!(bits << shift >> shift == bits, "a number over 64 bits");
            n |= bits << shift;
            if byte & 0x80 == 0 {
                ensure!(byte != 0 || shift == 0, "a number with superfluous zeros");
                return Ok(n);
            }
        }
        bail!("a number over 64 bits")
    }

    fn small(&mut self) -> Result<u32> {
        Ok(u32::try_from(self.number()?)?)
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        let len = self.number()?;
        ensure!(len <= self.rest.len() as u64, "cut short: {len} bytes announced, {} there", self.rest.len());
        let (bytes, rest) = self.rest.split_at(len as usize);
        self.rest = rest;
        Ok(bytes.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::testing::Random;

    fn entry(rng: &mut Random) -> Entry {
        let path = rng.bytes(12);
        let kind = match rng.below(14) {
            0 => return Entry::End(Totals { entries: rng.next(), bytes: rng.next() }),
            1 => return Entry::Link { path, target: rng.bytes(300) },
            2 => Kind::Directory,
            3 => Kind::File { size: rng.next() >> rng.below(64) },
            4 => Kind::Symlink { target: rng.bytes(200) },
            5 => Kind::Fifo,
            6 => Kind::Socket,
            7 => Kind::CharDevice { major: rng.next() as u32, minor: 3 },
            8 => Kind::BlockDevice { major: 7, minor: rng.next() as u32 },
            9 => return Entry::Round { format: rng.next() as u32 },
            10 => return Entry::Remove { path },
            11 => return Entry::Hole { offset: rng.next() >> rng.below(64), len: rng.next() },
            12 => Kind::Patch { size: rng.next() >> rng.below(64) },
            _ => Kind::Whiteout,
        };
        let time =
            |rng: &mut Random| Time { secs: rng.next() as i64 >> rng.below(64), nanos: rng.next() as u32 };
        let meta = Meta {
            mode: rng.next() as u32,
            uid: rng.next() as u32,
            gid: 0,
            mtime: time(rng),
            atime: time(rng),
            flags: rng.below(256) as u32,
            xattrs: (0..rng.below(4)).map(|_| Xattr { name: rng.bytes(20), value: rng.bytes(400) }).collect(),
        };
        Entry::Node { path, kind, meta }
    }

    #[test]
    fn round_trip_and_every_truncation() {
        let mut rng = Random::new(1);
        for _ in 0..500 {
            let entry = entry(&mut rng);
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            assert_eq!(Entry::decode(&bytes).unwrap(), entry);
            for len in 0..bytes.len() {
                assert!(Entry::decode(&bytes[..len]).is_err());
            }
            bytes.push(0);
            assert!(Entry::decode(&bytes).unwrap_err().to_string().contains("left over"));
        }
    }

    #[test]
    fn garbage_is_refused_or_canonical() {
        let mut rng = Random::new(2);
        for i in 0..200_000 {
            let bytes = if i % 2 == 0 {
                rng.bytes(60)
            } else {
                let mut bytes = Vec::new();
                entry(&mut rng).encode(&mut bytes);
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.next() as u8;
                bytes
            };
            if let Ok(entry) = Entry::decode(&bytes) {
                let mut again = Vec::new();
                entry.encode(&mut again);
                assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn announced_lengths_cost_nothing() {
        // A path of 2^63 bytes, 9,999 attributes, an oversized entry.
        let huge = [&[FILE][..], &[0xff; 8], &[0x7f]].concat();
        assert!(format!("{:#}", Entry::decode(&huge).unwrap_err()).contains("cut short"));
        let many = [FIFO, 1, b'a', 0, 0, 0, 0, 0, 0, 0, 0, 0x8f, 0x4e];
        assert!(format!("{:#}", Entry::decode(&many).unwrap_err()).contains("cut short"));
        assert!(Entry::decode(&vec![0; MAX_ENTRY + 1]).is_err());
        assert!(Entry::decode(&[END, 0x80, 0, 0]).is_err(), "two encodings of one number");
    }
}
