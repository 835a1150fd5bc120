//! A directory's content to an archive.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

use super::gzip::Stored;
use super::header::{
    BLOCK, BLOCK_DEVICE, CHAR, DIR, FIFO, FILE, Header, LINK, LONG_NAME, LONG_TARGET, REFERENCE, SPARSE,
    SYMLINK, fits, padding,
};
use super::staged::Known;

/// Archives everything in `dir` that is on the same file system, `dir` itself included, by names that begin with `./`. Files that are
/// `known` are archived by reference.
pub fn archive(dir: &Path, known: &Known, out: impl Write) -> Result<()> {
    let meta = std::fs::metadata(dir).context("looking at it")?;
    let mut archive = Archive { out: Stored::new(out)?, known, device: meta.dev(), links: HashMap::new() };
    archive.entry(dir, b"./", &meta)?;
    archive.content(dir, b"./")?;
    // which end it
    archive.out.write_all(&[0; 2 * BLOCK])?;
    archive.out.finish()
}

struct Archive<'a, W: Write> {
    out: Stored<W>,
    known: &'a Known,
    device: u64,
    /// The first name of each file with several.
    links: HashMap<u64, Vec<u8>>,
}

impl<W: Write> Archive<'_, W> {
    fn content(&mut self, dir: &Path, name: &[u8]) -> Result<()> {
        for entry in std::fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
            let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
            let meta = path.symlink_metadata().with_context(|| format!("looking at {}", path.display()))?;
            let own = path.file_name().context("a nameless entry")?.as_bytes();
            let mut name = [name, own].concat();
            if meta.is_dir() {
                name.push(b'/');
            }
            self.entry(&path, &name, &meta).with_context(|| format!("archiving {}", path.display()))?;
            // what is mounted below belongs to another archive
            if meta.is_dir() && meta.dev() == self.device {
                self.content(&path, &name)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &[u8], meta: &Metadata) -> Result<()> {
        let kind = meta.file_type();
        let mut header = Header {
            name: name.to_vec(),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
            ..Header::default()
        };
        if !kind.is_dir() && meta.nlink() > 1 {
            if let Some(first) = self.links.get(&meta.ino()) {
                header.target = first.clone();
                header.kind = LINK;
                return self.header(header);
            }
            self.links.insert(meta.ino(), name.to_vec());
        }
        header.kind = if kind.is_dir() {
            DIR
        } else if kind.is_symlink() {
            header.target = std::fs::read_link(path)?.as_os_str().as_bytes().to_vec();
            SYMLINK
        } else if kind.is_fifo() {
            FIFO
        } else if kind.is_char_device() || kind.is_block_device() {
            header.device =
                (nix::sys::stat::major(meta.rdev()) as u32, nix::sys::stat::minor(meta.rdev()) as u32);
            if kind.is_char_device() { CHAR } else { BLOCK_DEVICE }
        } else if kind.is_file() {
            return self.file(path, header, meta);
        } else {
            return Ok(());
        };
        self.header(header)
    }

    fn file(&mut self, path: &Path, mut header: Header, meta: &Metadata) -> Result<()> {
        if let Some(reference) = self.known.of(meta) {
            let body = serde_json::to_vec(reference)?;
            header.kind = REFERENCE;
            header.size = body.len() as u64;
            self.header(header)?;
            self.out.write_all(&body)?;
            self.out.write_all(&[0; BLOCK][..padding(body.len() as u64)])?;
            return Ok(());
        }
        let mut file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let size = meta.size();
        let mut pieces = vec![(0, size)];
        header.kind = FILE;
        if meta.blocks() * 512 < size {
            pieces = data_of(&file, size)?;
            header.kind = SPARSE;
            // a last piece of nothing tells where the file ends
            pieces.push((size, 0));
            header.sparse = Some((pieces.clone(), size));
        }
        header.size = pieces.iter().map(|(_, len)| len).sum();
        let stored = header.size;
        self.header(header)?;
        for (at, len) in pieces {
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at))?;
            let copied = std::io::copy(&mut (&file).take(len), &mut self.out)?;
            anyhow::ensure!(copied == len, "it has become shorter");
        }
        self.out.write_all(&[0; BLOCK][..padding(stored)])?;
        Ok(())
    }

    fn header(&mut self, mut header: Header) -> Result<()> {
        for (kind, text) in [(LONG_TARGET, &mut header.target), (LONG_NAME, &mut header.name)] {
            if fits(text) {
                continue;
            }
            let long = Header {
                kind,
                name: b"././@LongLink".to_vec(),
                size: text.len() as u64 + 1,
                ..Header::default()
            };
            self.out.write_all(&long.encode()?)?;
            self.out.write_all(text)?;
            self.out.write_all(&[0])?;
            self.out.write_all(&[0; BLOCK][..padding(long.size)])?;
            text.truncate(100);
        }
        self.out.write_all(&header.encode()?).context("writing an archive")
    }
}

/// The pieces of a file that are no holes.
fn data_of(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let seek = |at: u64, whence| -> Result<Option<u64>> {
        // SAFETY: lseek takes numbers.
        match unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) } {
            -1 => match std::io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                e => Err(e).context("looking for holes"),
            },
            n => Ok(Some(n as u64)),
        }
    };
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < size {
        let Some(data) = seek(at, libc::SEEK_DATA)?.filter(|d| *d < size) else { break };
        let end = seek(data, libc::SEEK_HOLE)?.unwrap_or(size).min(size);
        pieces.push((data, end - data));
        at = end;
    }
    Ok(pieces)
}
