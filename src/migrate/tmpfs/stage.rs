//! Staged files on the destination: a directory of content under numbers, from which our `tar` takes it in CRIU's restore.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::piece::Piece;
use crate::criu::tar::staged::file_name;
use crate::rootfs;

/// What a file takes beside its content: its inode, and what is known of it here.
const FILE: u64 = 2048;
/// Files that are kept open.
const OPEN: usize = 256;
/// Empty ones take memory too.
const FILES: usize = 1 << 20;

/// What has come so far.
pub struct Stage {
    dir: PathBuf,
    open: HashMap<u64, File>,
    /// Bytes that each file takes, with [`FILE`].
    held: HashMap<u64, u64>,
    sum: u64,
    cap: u64,
}

impl Stage {
    /// The directory of the files below this one.
    pub fn dir_in(images: &Path) -> PathBuf {
        images.join("staged")
    }

    /// In a directory of its own below `images`; the files take `cap` bytes at most.
    pub fn create(images: &Path, cap: u64) -> Result<Stage> {
        let dir = Stage::dir_in(images);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("creating {}", dir.display()))?;
        Ok(Stage { dir, open: HashMap::new(), held: HashMap::new(), sum: 0, cap })
    }

    /// Takes a payload.
    ///
    /// # Errors
    /// It makes no sense, there is no room, or more than was allowed.
    pub fn take(&mut self, payload: &[u8]) -> Result<()> {
        match Piece::decode(payload)? {
            Piece::Size { id, size } => {
                let size_of = i64::try_from(size).context("a staged file's size")? as u64;
                self.file(id, true)?.set_len(size_of).context("setting a staged file's size")?;
                self.count(id)
            }
            Piece::Data { id, offset, bytes } => self.write(id, offset, bytes.len() as u64, |file| {
                file.write_all_at(bytes, offset).context("writing staged content (is the tmpfs full?)")
            }),
            Piece::Zeros { id, offset, len } => {
                // room first: it is checked against what was allowed
                ensure!(len <= self.cap, "{len} bytes of zeros in a staged file");
                self.write(id, offset, len, |file| {
                    let zeros = vec![0; len.min(1 << 20) as usize];
                    let mut at = 0;
                    while at < len {
                        let n = (len - at).min(zeros.len() as u64);
                        file.write_all_at(&zeros[..n as usize], offset + at)
                            .context("writing staged content (is the tmpfs full?)")?;
                        at += n;
                    }
                    Ok(())
                })
            }
            Piece::Hole { id, offset, len } => {
                self.write(id, offset, len, |file| Ok(rootfs::punch(file, offset, len)?))
            }
            Piece::Gone { id } => {
                self.open.remove(&id);
                self.sum -= self.held.remove(&id).unwrap_or(0);
                std::fs::remove_file(self.dir.join(file_name(id))).context("removing a staged file")
            }
        }
    }

    /// Nothing beyond the size that was announced.
    fn write(
        &mut self,
        id: u64,
        offset: u64,
        len: u64,
        write: impl FnOnce(&File) -> Result<()>,
    ) -> Result<()> {
        let file = self.file(id, false)?;
        let size = file.metadata().context("looking at a staged file")?.size();
        ensure!(
            offset.checked_add(len).is_some_and(|end| end <= size),
            "{len} bytes at {offset} of a staged file of {size}"
        );
        write(file)?;
        self.count(id)
    }

    fn file(&mut self, id: u64, create: bool) -> Result<&File> {
        if self.open.len() >= OPEN {
            self.open.clear();
        }
        if let std::collections::hash_map::Entry::Vacant(place) = self.open.entry(id) {
            let path = self.dir.join(file_name(id));
            let file = File::options().read(true).write(true).create(create).mode(0o600).open(&path);
            place.insert(file.with_context(|| format!("opening the staged file {id}"))?);
        }
        Ok(&self.open[&id])
    }

    fn count(&mut self, id: u64) -> Result<()> {
        let now = self.open[&id].metadata().context("looking at a staged file")?.blocks() * 512 + FILE;
        let was = self.held.insert(id, now).unwrap_or(0);
        ensure!(self.held.len() <= FILES, "the container has more than {FILES} files on its tmpfs mounts");
        self.sum = self.sum - was + now;
        ensure!(
            self.sum <= self.cap,
            "the container's tmpfs files need more memory than this node allows ({} bytes)",
            self.cap
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(stage: &mut Stage, piece: Piece<'_>) -> Result<()> {
        piece.encode(|parts| stage.take(&parts.concat()))
    }

    #[test]
    fn content_is_put_together_and_bounded() {
        let images = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut stage = Stage::create(images.path(), 64 << 10).unwrap();
        let id = 0xab;
        assert!(say(&mut stage, Piece::Data { id, offset: 0, bytes: b"x" }).is_err(), "no such file");
        say(&mut stage, Piece::Size { id, size: 40_000 }).unwrap();
        say(&mut stage, Piece::Data { id, offset: 8192, bytes: &[7; 8192] }).unwrap();
        say(&mut stage, Piece::Zeros { id, offset: 20_480, len: 4096 }).unwrap();
        say(&mut stage, Piece::Hole { id, offset: 12_288, len: 4096 }).unwrap();
        let path = stage.dir.join("ab");
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() == 40_000 && bytes[8192..12_288] == [7; 4096]);
        assert!(bytes[12_288..].iter().all(|b| *b == 0));
        assert_eq!((path.metadata().unwrap().blocks() * 512, stage.sum), (8192, 8192 + FILE));

        assert!(say(&mut stage, Piece::Data { id, offset: 39_999, bytes: b"xy" }).is_err(), "behind its end");
        assert!(say(&mut stage, Piece::Zeros { id, offset: u64::MAX, len: 2 }).is_err());
        say(&mut stage, Piece::Gone { id }).unwrap();
        assert_eq!(stage.sum, 0);
        assert!(!path.exists());
        say(&mut stage, Piece::Size { id, size: 1 << 40 }).unwrap();
        assert!(say(&mut stage, Piece::Zeros { id, offset: 0, len: 1 << 30 }).is_err(), "too much");
        let e = say(&mut stage, Piece::Data { id, offset: 0, bytes: &[1; 80 << 10] });
        assert!(e.unwrap_err().to_string().contains("more memory than this node allows"));
        // empty files are not free
        let mut stage = Stage { cap: 64 << 10, ..Stage::create(&images.path().join("staged"), 0).unwrap() };
        let many = (0..100).map(|id| say(&mut stage, Piece::Size { id, size: 0 }));
        assert_eq!(many.take_while(|said| said.is_ok()).count() as u64, (64 << 10) / FILE);
    }
}
