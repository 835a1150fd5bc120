//! What is said about the content of staged files ([`Kind::Staged`](crate::migrate::codec::Kind::Staged)), as bytes and back. Pure.
//!
//! ```text
//! op u8 | id u64 | ...        1 Size    size u64              4 Hole    offset u64, len u64
//!                             2 Data    offset u64, bytes     5 Gone
//!                             3 Zeros   offset u64, len u64            all little-endian
//! ```

use anyhow::{Context, Result, bail};

/// One statement about the file with a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// It has this size; new ones begin with it.
    Size { id: u64, size: u64 },
    /// Bytes.
    Data { id: u64, offset: u64, bytes: &'a [u8] },
    /// Zeros that take memory, as they do on the source.
    Zeros { id: u64, offset: u64, len: u64 },
    /// Nothing is there any more.
    Hole { id: u64, offset: u64, len: u64 },
    /// It is no more.
    Gone { id: u64 },
}

impl<'a> Piece<'a> {
    /// Hands the parts of the payload to `send`.
    pub fn encode<T>(&self, send: impl FnOnce(&[&[u8]]) -> T) -> T {
        let head = |op: u8, id: u64, more: [u64; 2]| {
            let mut bytes = vec![op];
            [id, more[0], more[1]].iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes
        };
        match *self {
            Piece::Size { id, size } => send(&[&head(1, id, [size, 0])[..17]]),
            Piece::Data { id, offset, bytes } => send(&[&head(2, id, [offset, 0])[..17], bytes]),
            Piece::Zeros { id, offset, len } => send(&[&head(3, id, [offset, len])]),
            Piece::Hole { id, offset, len } => send(&[&head(4, id, [offset, len])]),
            Piece::Gone { id } => send(&[&head(5, id, [0, 0])[..9]]),
        }
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// It is none of these.
    pub fn decode(payload: &'a [u8]) -> Result<Piece<'a>> {
        let number = |n: usize| -> Result<u64> {
            let bytes =
                payload.get(1 + 8 * n..9 + 8 * n).context("a statement about a staged file is cut")?;
            Ok(u64::from_le_bytes(bytes.try_into()?))
        };
        let id = number(0)?;
        let (piece, len) = match payload[0] {
            1 => (Piece::Size { id, size: number(1)? }, 17),
            2 => (Piece::Data { id, offset: number(1)?, bytes: &payload[17..] }, payload.len()),
            3 => (Piece::Zeros { id, offset: number(1)?, len: number(2)? }, 25),
            4 => (Piece::Hole { id, offset: number(1)?, len: number(2)? }, 25),
            5 => (Piece::Gone { id }, 9),
            op => bail!("an unknown statement {op} about a staged file"),
        };
        if payload.len() != len {
            bail!("a statement about a staged file of {} bytes instead of {len}", payload.len());
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_nothing_else() {
        let (id, offset, len) = (u64::MAX - 1, 1 << 40, 77);
        for piece in [
            Piece::Size { id, size: offset },
            Piece::Data { id, offset, bytes: b"some bytes" },
            Piece::Zeros { id, offset, len },
            Piece::Hole { id, offset, len },
            Piece::Gone { id },
        ] {
            let bytes = piece.encode(|parts| parts.concat());
            assert_eq!(Piece::decode(&bytes).unwrap(), piece);
            let least = if matches!(piece, Piece::Data { .. }) { 17 } else { bytes.len() };
            for cut in 0..least {
                assert!(Piece::decode(&bytes[..cut]).is_err(), "{piece:?} cut at {cut}");
            }
            if !matches!(piece, Piece::Data { .. }) {
                assert!(Piece::decode(&[&bytes[..], b"x"].concat()).is_err());
            }
        }
        assert!(Piece::decode(&[9; 40]).is_err());
    }
}
