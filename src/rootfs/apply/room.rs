//! The disk that a layer is written to is not filled up: others live on it too, and a source may send as much as it likes.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::{Statvfs, fstatvfs};

/// The disk is looked at after so many bytes, or entries.
const BYTES: u64 = 8 << 20;
const ENTRIES: u32 = 1024;
/// At most so much is left free: a fiftieth of a small disk.
const RESERVE: u64 = 1 << 30;

/// What was written since the last look.
#[derive(Debug, Default)]
pub struct Room {
    bytes: u64,
    entries: u32,
}

impl Room {
    /// Something gets a name.
    pub fn entry(&mut self, dir: BorrowedFd<'_>) -> Result<()> {
        self.entries += 1;
        if self.entries < ENTRIES {
            return Ok(());
        }
        self.look(dir)
    }

    /// So many bytes are about to be written.
    pub fn data(&mut self, dir: BorrowedFd<'_>, bytes: u64) -> Result<()> {
        self.bytes += bytes;
        if self.bytes < BYTES {
            return Ok(());
        }
        self.look(dir)
    }

    fn look(&mut self, dir: BorrowedFd<'_>) -> Result<()> {
        (self.bytes, self.entries) = (0, 0);
        let stat = fstatvfs(dir).context("looking at the disk")?;
        match lacks(&Disk::of(&stat)) {
            None => Ok(()),
            Some(left) => bail!("the disk with the container's writable layer is nearly full ({left})"),
        }
    }
}

/// A disk's numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Disk {
    size: u64,
    free: u64,
    inodes: u64,
    inodes_free: u64,
}

impl Disk {
    fn of(stat: &Statvfs) -> Disk {
        let unit = stat.fragment_size();
        Disk {
            size: stat.blocks().saturating_mul(unit),
            free: stat.blocks_available().saturating_mul(unit),
            inodes: stat.files(),
            inodes_free: stat.files_available(),
        }
    }
}

/// What it has too little of. Pure. Some file systems count no inodes, or nothing at all.
fn lacks(disk: &Disk) -> Option<String> {
    if disk.size > 0 && disk.free < (disk.size / 50).min(RESERVE) {
        return Some(format!("{} MiB are left", disk.free >> 20));
    }
    (disk.inodes > 0 && disk.inodes_free < disk.inodes / 100)
        .then(|| format!("{} inodes are left", disk.inodes_free))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_not_filled() {
        let disk = Disk { size: 100 << 30, free: 50 << 30, inodes: 1000, inodes_free: 500 };
        assert_eq!(lacks(&disk), None);
        assert!(lacks(&Disk { free: 1 << 29, ..disk }).unwrap().contains("512 MiB"));
        assert!(lacks(&Disk { inodes_free: 5, ..disk }).unwrap().contains("inodes"));
        let small = Disk { size: 64 << 20, free: 2 << 20, inodes: 0, inodes_free: 0 };
        assert_eq!(lacks(&small), None);
        assert!(lacks(&Disk { free: 1 << 20, ..small }).is_some());
        assert_eq!(lacks(&Disk::default()), None);
    }
}
