//! The archive of an empty directory, which most of a container's tmpfs mounts are: as [`super::write`] makes it and [`super::read`] takes
//! it, byte for byte. Nothing here allocates, panics or needs a C library: the program `transship-quick` has neither.

use super::gzip::{Crc, HEAD};
use super::header::{BLOCK, DIR, GID, GNU, MAGIC, MODE, MTIME, SIZE, TYPE, UID, number, parse, seal};

/// The directory's own name in it.
const SELF: &[u8; 2] = b"./";
/// The head of the only stored block: it is the last one, its length, and that inverted.
const STORED: [u8; 5] = {
    let [a, b] = (CONTENT as u16).to_le_bytes();
    [1, a, b, !a, !b]
};
/// One header and the two blocks of nothing that end an archive.
const CONTENT: usize = 3 * BLOCK;
const AT: usize = HEAD.len() + STORED.len();
/// Bytes of the archive.
pub const LEN: usize = AT + CONTENT + 8;

/// What an archive keeps of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Permissions, without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 of its modification.
    pub mtime: i64,
}

/// The archive.
pub fn write(directory: Directory) -> [u8; LEN] {
    let Directory { mode, uid, gid, mtime } = directory;
    let mut all = [0; LEN];
    all[..HEAD.len()].copy_from_slice(HEAD);
    all[HEAD.len()..AT].copy_from_slice(&STORED);
    let header = &mut all[AT..AT + BLOCK];
    header[..SELF.len()].copy_from_slice(SELF);
    number(&mut header[MODE], mode.into());
    number(&mut header[UID], uid.into());
    number(&mut header[GID], gid.into());
    number(&mut header[SIZE], 0);
    number(&mut header[MTIME], mtime.into());
    header[TYPE] = DIR;
    header[MAGIC].copy_from_slice(GNU);
    seal(header);
    let tail = tail(&all);
    all[AT + CONTENT..].copy_from_slice(&tail);
    all
}

/// What it says; none of any other archive than [`write`]'s.
pub fn read(all: &[u8; LEN]) -> Option<Directory> {
    let header = &all[AT..AT + BLOCK];
    let directory = Directory {
        mode: parse(&header[MODE])?.try_into().ok()?,
        uid: parse(&header[UID])?.try_into().ok()?,
        gid: parse(&header[GID])?.try_into().ok()?,
        mtime: parse(&header[MTIME])?.try_into().ok()?,
    };
    // its name and its checksums are in that as well
    (write(directory) == *all).then_some(directory)
}

/// Checksum and length of the content.
fn tail(all: &[u8; LEN]) -> [u8; 8] {
    let mut crc = Crc::new();
    crc.update(&all[AT..AT + CONTENT]);
    let mut tail = [0; 8];
    tail[..4].copy_from_slice(&crc.value().to_le_bytes());
    tail[4..].copy_from_slice(&(CONTENT as u32).to_le_bytes());
    tail
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::super::{read as reader, staged, write as writer};
    use super::*;

    #[test]
    fn it_is_what_our_tar_makes_of_an_empty_directory() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("empty");
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o1735)).unwrap();
        let meta = dir.metadata().unwrap();
        let of = Directory { mode: 0o1735, uid: meta.uid(), gid: meta.gid(), mtime: meta.mtime() };
        let mut made = Vec::new();
        writer::archive(&dir, &staged::Known::default(), &mut made).unwrap();
        assert!(write(of)[..] == made[..]);
        assert_eq!(read(made.as_slice().try_into().unwrap()), Some(of));
        // and into another one
        let to = top.path().join("to");
        std::fs::create_dir(&to).unwrap();
        reader::extract(&to, top.path(), &write(Directory { mtime: -5, mode: 0o711, ..of })[..]).unwrap();
        let meta = to.metadata().unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o711, -5));
    }

    #[test]
    fn no_other_archive_is_taken_for_one() {
        let of = Directory { mode: 0o755, uid: 1 << 31, gid: 7, mtime: 1 << 40 };
        let good = write(of);
        assert_eq!(read(&good), Some(of));
        for at in 0..LEN {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(read(&bad), None, "byte {at}");
        }
    }
}
