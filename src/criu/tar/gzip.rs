//! gzip (RFC 1952) with stored blocks (RFC 1951, 3.2.4): framing and a checksum, no compression. A comment in the head tells ours.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

/// Magic, deflate, a comment follows, no time, no extra flags, Unix; the comment.
pub(super) const HEAD: &[u8; 20] = b"\x1f\x8b\x08\x10\0\0\0\0\0\x03transship\0";
/// Most that a stored block holds.
const BLOCK: usize = 0xffff;

/// Was this written here?
pub fn is_stored(input: &super::Standard) -> Result<bool> {
    let mut head = [0; HEAD.len()];
    Ok(input.peek(&mut head)? == HEAD.len() && head == *HEAD)
}

/// Writes; [`Stored::finish`] ends it.
pub struct Stored<W: Write> {
    out: W,
    block: Vec<u8>,
    crc: Crc,
    len: u32,
}

impl<W: Write> Stored<W> {
    pub fn new(mut out: W) -> Result<Self> {
        out.write_all(HEAD)?;
        Ok(Self { out, block: Vec::with_capacity(BLOCK), crc: Crc::new(), len: 0 })
    }

    fn block(&mut self, last: bool) -> std::io::Result<()> {
        let len = self.block.len() as u16;
        self.out.write_all(&[u8::from(last)])?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(&(!len).to_le_bytes())?;
        self.out.write_all(&self.block)?;
        self.block.clear();
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        self.block(true)?;
        self.out.write_all(&self.crc.value().to_le_bytes())?;
        self.out.write_all(&self.len.to_le_bytes())?;
        self.out.flush().context("writing an archive")
    }
}

impl<W: Write> Write for Stored<W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.block.len() == BLOCK {
            self.block(false)?;
        }
        let n = buf.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&buf[..n]);
        self.crc.update(&buf[..n]);
        self.len = self.len.wrapping_add(n as u32);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads what [`Stored`] has written.
pub struct Unstored<R: Read> {
    input: R,
    left: usize,
    last: bool,
    crc: Crc,
    len: u32,
}

impl<R: Read> Unstored<R> {
    pub fn new(mut input: R) -> Result<Self> {
        let mut head = [0; HEAD.len()];
        input.read_exact(&mut head).context("reading an archive")?;
        ensure!(head == *HEAD, "an archive that was not written here");
        Ok(Self { input, left: 0, last: false, crc: Crc::new(), len: 0 })
    }

    /// Reads to the end and checks the sum.
    pub fn finish(mut self) -> Result<()> {
        std::io::copy(&mut self, &mut std::io::sink()).context("reading an archive")?;
        let mut tail = [0; 8];
        self.input.read_exact(&mut tail).context("reading an archive's end")?;
        let want = [self.crc.value().to_le_bytes(), self.len.to_le_bytes()].concat();
        ensure!(tail == *want, "an archive's checksum is wrong");
        Ok(())
    }
}

impl<R: Read> Read for Unstored<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.left == 0 && !self.last {
            let mut head = [0; 5];
            self.input.read_exact(&mut head)?;
            let len = u16::from_le_bytes([head[1], head[2]]);
            if head[0] > 1 || u16::from_le_bytes([head[3], head[4]]) != !len {
                return Err(std::io::Error::other("a block of an archive that is not stored"));
            }
            self.last = head[0] == 1;
            self.left = len.into();
        }
        let n = buf.len().min(self.left);
        let n = self.input.read(&mut buf[..n])?;
        if n == 0 && self.left > 0 && !buf.is_empty() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n;
        self.crc.update(&buf[..n]);
        self.len = self.len.wrapping_add(n as u32);
        Ok(n)
    }
}

/// CRC-32 as gzip has it, eight bytes at a time.
pub(super) struct Crc(u32);

// no constant: without optimisation each use of one would copy it
static TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
            bit += 1;
        }
        tables[0][i] = c;
        i += 1;
    }
    let mut t = 1;
    while t < 8 {
        let mut i = 0;
        while i < 256 {
            let before = tables[t - 1][i];
            tables[t][i] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            i += 1;
        }
        t += 1;
    }
    tables
};

impl Crc {
    pub(super) fn new() -> Self {
        Self(!0)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        let mut c = self.0;
        let (chunks, rest) = bytes.as_chunks::<8>();
        for eight in chunks {
            let v = u64::from_le_bytes(*eight) ^ u64::from(c);
            c = 0;
            for (t, byte) in v.to_le_bytes().iter().enumerate() {
                c ^= TABLES[7 - t][usize::from(*byte)];
            }
        }
        for byte in rest {
            c = (c >> 8) ^ TABLES[0][((c ^ u32::from(*byte)) & 0xff) as usize];
        }
        self.0 = c;
    }

    pub(super) fn value(&self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_gzip() {
        let of = |bytes: &[u8]| {
            let mut crc = Crc::new();
            crc.update(bytes);
            crc.value()
        };
        assert_eq!(of(b"123456789"), 0xcbf4_3926);
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        let mut pieces = Crc::new();
        bytes.chunks(13).for_each(|c| pieces.update(c));
        assert_eq!(pieces.value(), of(&bytes));
    }

    #[test]
    fn what_was_framed_comes_back_and_damage_is_seen() {
        for len in [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let mut framed = Vec::new();
            let mut out = Stored::new(&mut framed).unwrap();
            out.write_all(&bytes).unwrap();
            out.finish().unwrap();
            let mut back = Vec::new();
            let mut input = Unstored::new(&framed[..]).unwrap();
            input.read_to_end(&mut back).unwrap();
            assert_eq!(back, bytes);
            input.finish().unwrap();
            if len > 0 {
                framed[30] ^= 1;
                assert!(Unstored::new(&framed[..]).unwrap().finish().is_err());
            }
        }
    }
}
