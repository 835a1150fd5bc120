//! The container's state as frames: memory, image files, writable layer, queued stdio. The same for a peer and for a
//! checkpoint file.
//!
//! ```text
//! PagesOpen  kind u8 (1 process, 2 shared memory), id u64         LayerEntry  rootfs::Entry
//! Pages      vaddr u64, flags u32, bytes                          LayerData   offset u64, bytes
//! PagesHole  (vaddr u64, pages u64, flags u32)*                   File        JSON FileHeader, then FileData frames
//! PagesExist memory::sets
//! ```
//!
//! All integers are little-endian. Nothing here is ever stored as a whole: what CRIU hands over goes out at once.
//!
//! Here: how the frames that are no message look, and the counting of them. [`sender`] sends, [`receiver`] takes in.

mod receiver;
mod sender;

use anyhow::{Result, bail, ensure};

use super::codec::Kind;
use super::protocol::{FileHeader, Final};
use super::tmpfs::Piece;
use crate::criu::ImageKind;
use crate::criu::page_server::page_size;

pub(crate) use receiver::EAGER;
pub use receiver::Receiver;
pub use sender::Sender;

/// Content bytes in one frame.
const PIECE: usize = 1 << 20;
/// Bytes of one run in a PagesHole frame.
const HOLE: usize = 20;
/// Runs in one PagesHole frame at most.
const HOLES: usize = Kind::PagesHole.cap() / HOLE;

/// Counts what goes through, on either side and when a file is verified.
#[derive(Debug, Default)]
pub struct Counter {
    totals: Final,
    file_left: u64,
}

impl Counter {
    /// Takes note of one frame.
    ///
    /// # Errors
    /// The frame does not fit what came before it.
    pub fn count(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let t = &mut self.totals;
        if kind != Kind::FileData {
            ensure!(self.file_left == 0, "{} bytes of an image file are missing", self.file_left);
        }
        match kind {
            Kind::File => {
                t.files += 1;
                self.file_left = serde_json::from_slice::<FileHeader>(payload)?.size;
            }
            Kind::FileData => {
                let len = payload.len() as u64;
                ensure!(len <= self.file_left, "an image file is longer than announced");
                self.file_left -= len;
                t.file_bytes += len;
            }
            Kind::Pages => {
                let (_, _, bytes) = decode_pages(payload)?;
                t.pages += (bytes.len() / page_size()) as u64;
                t.page_bytes += bytes.len() as u64;
            }
            Kind::LayerEntry => t.layer_entries += 1,
            // what is said about a file is counted by its content alone
            Kind::Staged => {
                if let Piece::Data { bytes, .. } = Piece::decode(payload)? {
                    t.tmpfs_bytes += bytes.len() as u64;
                }
            }
            Kind::LayerData => t.layer_bytes += payload.len().saturating_sub(8) as u64,
            Kind::Frozen | Kind::PagesOpen | Kind::PagesHole | Kind::PagesExist | Kind::PagesClose => {}
            // memory that travels while the container runs is checked by the page: see `Planner`
            Kind::Memory | Kind::RemotePages | Kind::HotPages => {}
            Kind::LayerEnd | Kind::Stdio => {}
            other => bail!("a {other:?} frame inside the container's state"),
        }
        Ok(())
    }

    /// What was counted.
    pub fn totals(&self) -> Final {
        self.totals.clone()
    }
}

fn kind_number(kind: ImageKind) -> u8 {
    match kind {
        ImageKind::Pid => 1,
        ImageKind::Shmem => 2,
    }
}

fn kind_of(number: u8) -> Result<ImageKind> {
    match number {
        1 => Ok(ImageKind::Pid),
        2 => Ok(ImageKind::Shmem),
        n => bail!("memory of unknown kind {n}"),
    }
}

pub(super) fn decode_pages(payload: &[u8]) -> Result<(u64, u32, &[u8])> {
    ensure!(payload.len() >= 12, "a Pages frame of {} bytes", payload.len());
    let flags = u32::from_le_bytes(payload[8..12].try_into()?);
    ensure!(
        payload[12..].len().is_multiple_of(page_size()),
        "a Pages frame that is no whole number of pages"
    );
    Ok((u64_at(payload, 0), flags, &payload[12..]))
}

/// One run of a PagesHole frame.
fn hole_bytes(vaddr: u64, pages: u64, flags: u32) -> [u8; HOLE] {
    let mut hole = [0; HOLE];
    hole[..8].copy_from_slice(&vaddr.to_le_bytes());
    hole[8..16].copy_from_slice(&pages.to_le_bytes());
    hole[16..].copy_from_slice(&flags.to_le_bytes());
    hole
}

/// The runs of a PagesHole frame: addresses, numbers of pages, flags.
fn holes(payload: &[u8]) -> Result<impl Iterator<Item = (u64, u64, u32)> + '_> {
    let (holes, rest) = payload.as_chunks::<HOLE>();
    ensure!(rest.is_empty() && !holes.is_empty(), "a PagesHole frame of {} bytes", payload.len());
    Ok(holes.iter().map(|hole| {
        let flags = u32::from_le_bytes([hole[16], hole[17], hole[18], hole[19]]);
        (u64_at(hole, 0), u64_at(hole, 8), flags)
    }))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes, length checked by the caller"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_without_bytes_come_back() {
        let all: Vec<(u64, u64, u32)> = (0..HOLES as u64).map(|n| (n << 20, n + 1, n as u32 % 3)).collect();
        let payload: Vec<u8> = all.iter().flat_map(|(a, n, f)| hole_bytes(*a, *n, *f)).collect();
        assert!(payload.len() <= Kind::PagesHole.cap(), "a full frame may be sent");
        assert_eq!(holes(&payload).unwrap().collect::<Vec<_>>(), all);
        for wrong in [&payload[..0], &payload[..HOLE - 1], &payload[..HOLE + 1]] {
            assert!(holes(wrong).is_err());
        }
    }
}
