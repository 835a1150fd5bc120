//! The 512-byte header of an entry, in the GNU form: numbers in octal or, when too large, in base 256; holes in the `S` type.

use anyhow::{Context, Result, ensure};

pub const BLOCK: usize = 512;

// Type flags.
pub const FILE: u8 = b'0';
pub const LINK: u8 = b'1';
pub const SYMLINK: u8 = b'2';
pub const CHAR: u8 = b'3';
pub const BLOCK_DEVICE: u8 = b'4';
pub const DIR: u8 = b'5';
pub const FIFO: u8 = b'6';
pub const LONG_NAME: u8 = b'L';
pub const LONG_TARGET: u8 = b'K';
pub const SPARSE: u8 = b'S';
/// Ours: in the place of a file's content, where it is ([`super::staged`]).
pub const REFERENCE: u8 = b'T';

/// Pieces of data in the header itself, and in each block that continues it.
const HERE: usize = 4;
const MORE: usize = 21;

/// A field's place.
type Field = std::ops::Range<usize>;
pub(super) const NAME: Field = 0..100;
pub(super) const MODE: Field = 100..108;
pub(super) const UID: Field = 108..116;
pub(super) const GID: Field = 116..124;
pub(super) const SIZE: Field = 124..136;
pub(super) const MTIME: Field = 136..148;
const SUM: Field = 148..156;
pub(super) const TYPE: usize = 156;
pub(super) const TARGET: Field = 157..257;
pub(super) const MAGIC: Field = 257..265;
pub(super) const MAJOR: Field = 329..337;
pub(super) const MINOR: Field = 337..345;
const SPARSES: usize = 386;
const EXTENDED: usize = 482;
const REAL_SIZE: Field = 483..495;
pub(super) const GNU: &[u8; 8] = b"ustar  \0";

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    pub name: Vec<u8>,
    pub target: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    /// Bytes that follow.
    pub size: u64,
    pub device: (u32, u32),
    /// Of a file with holes: offset and length of each piece of data, and the file's size.
    pub sparse: Option<(Vec<(u64, u64)>, u64)>,
}

impl Header {
    /// The blocks; the name and the target have to be short enough (see [`fits`]).
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut b = vec![0; BLOCK];
        ensure!(fits(&self.name) && fits(&self.target), "a name too long for a header");
        b[..self.name.len()].copy_from_slice(&self.name);
        b[TARGET.start..TARGET.start + self.target.len()].copy_from_slice(&self.target);
        number(&mut b[MODE], self.mode.into());
        number(&mut b[UID], self.uid.into());
        number(&mut b[GID], self.gid.into());
        number(&mut b[SIZE], self.size.into());
        number(&mut b[MTIME], self.mtime.into());
        b[TYPE] = self.kind;
        b[MAGIC].copy_from_slice(GNU);
        if matches!(self.kind, CHAR | BLOCK_DEVICE) {
            number(&mut b[MAJOR], self.device.0.into());
            number(&mut b[MINOR], self.device.1.into());
        }
        if let Some((pieces, size)) = &self.sparse {
            number(&mut b[REAL_SIZE], (*size).into());
            let (here, mut rest) = pieces.split_at(pieces.len().min(HERE));
            put_pieces(&mut b[SPARSES..], here);
            b[EXTENDED] = u8::from(!rest.is_empty());
            while !rest.is_empty() {
                let (some, after) = rest.split_at(rest.len().min(MORE));
                let mut more = [0; BLOCK];
                put_pieces(&mut more, some);
                more[MORE * 24] = u8::from(!after.is_empty());
                b.extend(more);
                rest = after;
            }
        }
        seal(&mut b);
        Ok(b)
    }

    /// Reads a header; `next` gives further blocks. None at the archive's end.
    pub fn decode(b: &[u8; BLOCK], next: &mut dyn FnMut() -> Result<[u8; BLOCK]>) -> Result<Option<Self>> {
        if b.iter().all(|x| *x == 0) {
            return Ok(None);
        }
        ensure!(is_sealed(b), "a damaged header");
        let value =
            |f: Field, what: &str| parse(&b[f]).with_context(|| format!("a header's {what} is no number"));
        let small = |f: Field, what: &str| -> Result<u32> {
            u32::try_from(value(f, what)?).with_context(|| format!("a header's {what}"))
        };
        let sparse = match b[TYPE] {
            SPARSE => {
                let mut pieces = Vec::new();
                take_pieces(&b[SPARSES..], HERE, &mut pieces)?;
                let mut more = b[EXTENDED] == 1;
                while more {
                    let block = next()?;
                    take_pieces(&block, MORE, &mut pieces)?;
                    more = block[MORE * 24] == 1;
                }
                Some((pieces, u64::try_from(value(REAL_SIZE, "size")?)?))
            }
            _ => None,
        };
        Ok(Some(Self {
            kind: b[TYPE],
            name: text(&b[NAME]),
            target: text(&b[TARGET]),
            mode: small(MODE, "mode")?,
            uid: small(UID, "owner")?,
            gid: small(GID, "group")?,
            mtime: i64::try_from(value(MTIME, "time")?)?,
            size: u64::try_from(value(SIZE, "size")?)?,
            device: match b[TYPE] {
                CHAR | BLOCK_DEVICE => (small(MAJOR, "device")?, small(MINOR, "device")?),
                _ => (0, 0),
            },
            sparse,
        }))
    }
}

/// Is it short enough for a header?
pub fn fits(name: &[u8]) -> bool {
    name.len() <= NAME.len()
}

/// Bytes of padding behind so many bytes.
pub fn padding(len: u64) -> usize {
    (BLOCK - (len % BLOCK as u64) as usize) % BLOCK
}

fn text(field: &[u8]) -> Vec<u8> {
    field.iter().copied().take_while(|b| *b != 0).collect()
}

/// Puts the checksum into a header. Here and below nothing is allocated: [`super::flat`] needs that.
pub(super) fn seal(block: &mut [u8]) {
    let sum = checksum(block);
    octal(&mut block[SUM.start..SUM.end - 2], sum.into());
    block[SUM.end - 2] = 0;
    block[SUM.end - 1] = b' ';
}

/// Has it the checksum that it should?
fn is_sealed(block: &[u8]) -> bool {
    parse(&block[SUM]) == Some(checksum(block).into())
}

fn checksum(block: &[u8]) -> u32 {
    let head = &block[..BLOCK];
    head.iter().enumerate().map(|(i, b)| if SUM.contains(&i) { 32 } else { u32::from(*b) }).sum()
}

fn octal(digits: &mut [u8], mut value: i128) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value & 7) as u8;
        value >>= 3;
    }
}

/// In octal with a nul, or in base 256 where that is too short.
pub(super) fn number(field: &mut [u8], value: i128) {
    let digits = field.len() - 1;
    if (0..1 << (3 * digits)).contains(&value) {
        octal(&mut field[..digits], value);
        field[digits] = 0;
        return;
    }
    let bytes = value.to_be_bytes();
    let len = field.len();
    field.copy_from_slice(&bytes[bytes.len() - len..]);
    field[0] |= 0x80;
}

/// None if it is not a number.
pub(super) fn parse(field: &[u8]) -> Option<i128> {
    if field[0] & 0x80 != 0 {
        // 0x80 begins a positive number, 0xff a negative one
        let first = if field[0] == 0xff { -1 } else { i128::from(field[0] & 0x7f) };
        return Some(field[1..].iter().fold(first, |n, b| n << 8 | i128::from(*b)));
    }
    let mut value = 0;
    for b in field.iter().skip_while(|b| **b == b' ').take_while(|b| !matches!(**b, 0 | b' ')) {
        match b {
            b'0'..=b'7' => value = value * 8 + i128::from(b - b'0'),
            _ => return None,
        }
    }
    Some(value)
}

fn put_pieces(to: &mut [u8], pieces: &[(u64, u64)]) {
    for (slot, (at, len)) in to.as_chunks_mut::<24>().0.iter_mut().zip(pieces) {
        number(&mut slot[..12], (*at).into());
        number(&mut slot[12..], (*len).into());
    }
}

fn take_pieces(from: &[u8], most: usize, pieces: &mut Vec<(u64, u64)>) -> Result<()> {
    for slot in from.as_chunks::<24>().0.iter().take(most) {
        if slot[0] == 0 {
            break;
        }
        let value = |field| -> Result<u64> { Ok(parse(field).context("a piece is no number")?.try_into()?) };
        pieces.push((value(&slot[..12])?, value(&slot[12..])?));
    }
    Ok(())
}
