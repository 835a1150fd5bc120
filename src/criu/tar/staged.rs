//! Files whose content is on the destination already: the archive then says where it is there and what it has to be, instead of
//! carrying it. Only in a migration, whose two ends both know of it: a checkpoint file has plain archives.
//!
//! On the source the shim leaves a table beside our `tar`, which archives a file of the table by its reference. The shim holds a lock
//! on the table for as long as it works on it. On the destination the files lie in a directory beside our `tar`, under their numbers.
//! Extracting compares every byte's hash with the reference: either it is the content that the source has sent last, or the restore
//! fails, which is before the commit.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::rootfs::content::{self, How};

/// The table's name, beside `tar`.
const TABLE: &str = "staged.json";
/// The directory of the files, beside `tar`.
const FILES: &str = "staged";
/// A reference is not longer than this.
pub(super) const CAP: u64 = 4096;

/// Content that is on the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The file's name in the directory.
    pub id: u64,
    /// Its size.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// For the hashes of blocks.
    pub seed: u64,
    /// See [`content::digest`].
    pub digest: content::Hash,
}

/// A file on the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// File system and inode.
    pub key: (u64, u64),
    /// Seconds and nanoseconds of its modification.
    pub mtime: (i64, i64),
    /// Where its content is.
    pub reference: Reference,
}

/// The table while it is made: a `tar` that is called meanwhile waits. Dropped without [`Table::finish`] it is empty.
pub struct Table {
    file: Flock<File>,
}

impl Table {
    /// In the directory that [`super::tools`] made.
    pub fn create(tools: &Path) -> Result<Table> {
        let path = tools.join(TABLE);
        let make = || -> std::io::Result<Flock<File>> {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            Ok(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e)?)
        };
        let file = make().with_context(|| format!("making {}", path.display()))?;
        Ok(Table { file })
    }

    /// It is complete.
    pub fn finish(mut self, all: &[Staged]) -> Result<()> {
        let bytes = serde_json::to_vec(all).context("encoding the table of staged files")?;
        self.file.write_all(&bytes).context("writing the table of staged files")
    }
}

/// What the source's `tar` knows. Empty where there is no table.
#[derive(Debug, Default)]
pub(super) struct Known(std::collections::HashMap<(u64, u64), Staged>);

impl Known {
    /// Reads the table beside this program, once it is complete.
    pub fn beside(executable: &Path) -> Known {
        let read = || -> Option<Vec<Staged>> {
            let file = File::open(executable.with_file_name(TABLE)).ok()?;
            let mut file = Flock::lock(file, FlockArg::LockShared).ok()?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).ok()?;
            serde_json::from_slice(&bytes).ok()
        };
        Known::new(read().unwrap_or_default())
    }

    pub fn new(all: Vec<Staged>) -> Known {
        Known(all.into_iter().map(|s| (s.key, s)).collect())
    }

    /// The reference of a file that is as it was when it was sent.
    pub fn of(&self, meta: &std::fs::Metadata) -> Option<&Reference> {
        let staged = self.0.get(&(meta.dev(), meta.ino()))?;
        let same = staged.reference.size == meta.size() && staged.mtime == (meta.mtime(), meta.mtime_nsec());
        same.then_some(&staged.reference)
    }
}

/// On the destination: has the `tar` in this directory find the files in `dir`.
pub fn files_in(tools: &Path, dir: &Path) -> Result<()> {
    let link = tools.join(FILES);
    // a second try finds that of the first
    match symlink(dir, &link) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
    .with_context(|| format!("making {}", link.display()))
}

/// The directory of the files for the `tar` with this path.
pub(super) fn files_beside(executable: &Path) -> PathBuf {
    executable.with_file_name(FILES)
}

/// The name of a file in it.
pub fn file_name(id: u64) -> String {
    format!("{id:x}")
}

/// Puts the content that is meant into `to`, a new file, and removes it where it was.
///
/// # Errors
/// It is not there, or is another one.
pub(super) fn take(files: &Path, reference: &Reference, to: &File) -> Result<()> {
    let Reference { id, size, block, seed, digest } = *reference;
    ensure!(block.is_power_of_two() && block <= 1 << 20, "a reference with blocks of {block} bytes");
    let path = files.join(file_name(id));
    let from = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let is = from.metadata().context("looking at staged content")?.size();
    ensure!(is == size, "the staged content {id} has {is} bytes instead of {size}");
    to.set_len(size).context("setting its size")?;
    let how = How { size, block, seed, threads: content::all_threads() };
    // what lies beside data in a block was read as zeros
    let blocks = content::scan(&from, &how, &|at, bytes, _| Ok(to.write_all_at(bytes, at)?))?;
    let found = content::digest(size, &blocks);
    ensure!(found == digest, "the staged content {id} is not what the source has: {found:x}, not {digest:x}");
    std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(id: u64, bytes: &[u8]) -> Reference {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let (size, block, seed) = (bytes.len() as u64, 4096, 5);
        let blocks = content::scan(&file, &How { size, block, seed, threads: 1 }, &|_, _, _| Ok(())).unwrap();
        Reference { id, size, block, seed, digest: content::digest(size, &blocks) }
    }

    #[test]
    fn only_the_very_content_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..70_000u32).map(|i| (i / 7) as u8).collect();
        let reference = reference(0x1f, &bytes);
        let path = dir.path().join("1f");
        let mut wrong = bytes.clone();
        wrong[69_999] ^= 1;
        for bad in [&wrong[..], &bytes[..69_999], &[&bytes[..], b"x"].concat()] {
            std::fs::write(&path, bad).unwrap();
            assert!(take(dir.path(), &reference, &tempfile::tempfile().unwrap()).is_err());
        }
        std::fs::write(&path, &bytes).unwrap();
        let to = dir.path().join("to");
        take(dir.path(), &reference, &File::create_new(&to).unwrap()).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), bytes);
        assert!(!path.exists(), "its memory is given back");
        assert!(take(dir.path(), &reference, &tempfile::tempfile().unwrap()).is_err(), "not there");
    }

    #[test]
    fn a_table_is_read_when_it_is_complete_and_only_for_files_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let tar = dir.path().join("tar");
        let file = dir.path().join("f");
        std::fs::write(&file, b"content").unwrap();
        let of = |known: &Known| known.of(&file.metadata().unwrap()).cloned();
        assert_eq!(of(&Known::beside(&tar)), None);
        let meta = file.metadata().unwrap();
        let staged = Staged {
            key: (meta.dev(), meta.ino()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            reference: reference(3, b"content"),
        };
        let table = Table::create(dir.path()).unwrap();
        let waiting = std::thread::spawn(move || Known::beside(&tar));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished());
        table.finish(std::slice::from_ref(&staged)).unwrap();
        let known = waiting.join().unwrap();
        assert_eq!(of(&known), Some(staged.reference));
        std::fs::write(&file, b"another").unwrap();
        assert_eq!(of(&known), None);
    }
}
