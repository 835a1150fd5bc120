//! Where the bytes of a stream come from ([`Source`]) and where they go ([`Sink`]): the two ends that a pump joins.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, FileTypeExt},
    },
    path::Path,
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use tokio::io::{Interest, unix::AsyncFd};

use super::fd;

/// A descriptor registered with the event loop.
pub type Watched = Arc<AsyncFd<OwnedFd>>;

/// Registers a descriptor whose description is already non-blocking.
pub fn watch(fd: impl Into<OwnedFd>, interest: Interest) -> Result<Watched> {
    // SAFETY: an OwnedFd is open and stays the same descriptor for as long as it lives; here that is as long as the AsyncFd.
    let watched = unsafe { AsyncFd::register_with_interest(fd.into(), interest) };
    Ok(Arc::new(watched.map_err(std::io::Error::from).context("registering a stream with the event loop")?))
}

/// Where bytes come from.
pub enum Source {
    /// A pipe's or FIFO's read end.
    Pipe(Watched),
    /// The master of a pty. `EIO` says that no process has the slave open now, which may change.
    Tty(Watched),
    /// A regular file as stdin.
    File(File),
    /// Never a byte, and no end before the stream is closed: stdin of a moved container that nobody feeds.
    Silent,
}

/// What a read found.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Bytes.
    Bytes(usize),
    /// Nothing now.
    Empty,
    /// Nothing now, and no process at the other end of the pty.
    Vacant,
    /// Nothing any more.
    End,
}

impl Source {
    /// Opens what containerd names as stdin.
    pub fn open(path: &Path) -> Result<Source> {
        let what = || format!("opening stdin {}", path.display());
        let file = fd::open(path, true, false).with_context(what)?;
        let kind = file.metadata().with_context(what)?.file_type();
        if kind.is_file() {
            Ok(Source::File(file))
        } else if kind.is_fifo() {
            Ok(Source::Pipe(watch(file, Interest::READABLE).with_context(what)?))
        } else {
            bail!("stdin {} is neither a FIFO nor a file", path.display())
        }
    }

    /// Reads once. [`Read::Empty`] has told the event loop to report when there is more.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        let outcome = match self {
            // First without the loop's leave: it may not have looked yet, and a pause needs the truth.
            Source::Pipe(w) | Source::Tty(w) => match fd::read(w.get_ref(), buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    w.try_io(Interest::READABLE, |fd| fd::read(fd, buffer))
                }
                other => other,
            },
            Source::File(file) => fd::read(file, buffer),
            Source::Silent => return Ok(Read::Empty),
        };
        match (outcome, self) {
            (Ok(0), _) => Ok(Read::End),
            (Ok(n), _) => Ok(Read::Bytes(n)),
            (Err(e), _) if e.kind() == io::ErrorKind::WouldBlock => Ok(Read::Empty),
            (Err(e), Source::Tty(_)) if e.raw_os_error() == Some(libc::EIO) => Ok(Read::Vacant),
            (Err(e), _) => Err(e),
        }
    }

    /// What a read would return, left where it is. A pty cannot be looked into: empty.
    pub fn peek(&self) -> Result<Vec<u8>> {
        match self {
            Source::Pipe(w) => fd::peek(w.get_ref()),
            Source::Tty(_) | Source::Silent => Ok(Vec::new()),
            Source::File(file) => {
                let at = io::Seek::stream_position(&mut &*file).context("position in stdin")?;
                let left = file.metadata().context("size of stdin")?.len().saturating_sub(at);
                if left > fd::PEEK_LIMIT as u64 {
                    bail!("{left} bytes of the file on stdin are unread, more than can be carried");
                }
                let mut bytes = vec![0; left as usize];
                file.read_exact_at(&mut bytes, at).context("reading ahead in stdin")?;
                Ok(bytes)
            }
        }
    }

    /// Registers the descriptor anew. The event loop remembers a hang-up for ever; when the other end has come back that memory
    /// would make every wait return at once.
    pub fn rearm(&mut self) -> Result<()> {
        if let Source::Pipe(w) | Source::Tty(w) = self {
            *w = watch(fd::duplicate(w.get_ref())?, Interest::READABLE)?;
        }
        Ok(())
    }
}

/// Where bytes go.
#[derive(Clone)]
pub enum Sink {
    /// Nobody wants them.
    Nowhere,
    /// A FIFO, a pipe or a pty master.
    Pipe(Watched),
    /// A regular file or device; written on a blocking thread.
    File(Arc<File>),
}

impl Sink {
    /// Opens what containerd names as stdout or stderr. A FIFO is opened for reading too: then opening does not wait for a reader
    /// and a reader that leaves does not turn writes into `EPIPE`; bytes wait in the FIFO for the next one.
    pub fn open(path: &Path) -> Result<Sink> {
        let what = || format!("opening {}", path.display());
        let kind = std::fs::metadata(path).with_context(what)?.file_type();
        if kind.is_fifo() {
            let file = fd::open(path, true, true).with_context(what)?;
            return Ok(Sink::Pipe(watch(file, Interest::WRITABLE).with_context(what)?));
        }
        Ok(Sink::File(Arc::new(OpenOptions::new().append(true).open(path).with_context(what)?)))
    }

    /// Opens a log file for appending, creating it and its directory.
    pub fn append(path: &Path) -> Result<Sink> {
        let what = || format!("opening log file {}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(what)?;
        }
        Ok(Sink::File(Arc::new(OpenOptions::new().append(true).create(true).open(path).with_context(what)?)))
    }
}
