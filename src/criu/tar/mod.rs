//! A `tar` for the content of tmpfs mounts, for which CRIU runs `tar` (and that gzip) once each: 4 ms at a dump and 3 at a restore,
//! most of it programs being started. Ours does no compression, in one process.
//!
//! What it writes is what stock `tar --extract --gzip` reads: a GNU archive in a gzip file whose blocks are stored ([`gzip`]).
//! What it reads is only that; everything else, and every call that is not CRIU's, goes to the stock program, found in the rest of PATH.
//! Kept is what CRIU's own call keeps: names, types, owners, modes, times of modification in seconds, links, devices, holes. Sockets are
//! left out, CRIU makes them itself.
//!
//! In a migration the content of files may be a reference to what the destination has already ([`staged`]).

pub mod call;
pub mod flat;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gzip;
mod header;
mod read;
pub mod staged;
#[cfg(test)]
mod tests;
mod write;

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io::{BufReader, BufWriter, Seek};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use self::call::{Job, job};
use crate::program::{self, Programs};

/// The name under which CRIU calls it.
pub const NAME: &str = "tar";
/// The directory's name: who is called as `tar` from elsewhere is something else.
const DIR: &str = "transship-tools";

/// Makes a directory in `parent` in which our program is named `tar`. What is to be put first in CRIU's PATH is [`first`].
pub fn tools(parent: &Path, programs: &Programs) -> Result<PathBuf> {
    let dir = parent.join(DIR);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .and_then(|()| programs.named(&dir, NAME))
        .with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// The directory of the `tar` that CRIU is to find, of one that [`tools`] made.
pub fn first(tools: &Path) -> PathBuf {
    let quick = tools.join(program::QUICK_DIR);
    if quick.is_dir() { quick } else { tools.to_owned() }
}

/// Is this the name of our `tar`?
pub(super) fn is_ours(executable: &Path) -> bool {
    executable.ends_with(Path::new(DIR).join(NAME))
}

/// Runs as CRIU's tar.
pub(super) fn main(executable: &Path) -> Result<ExitCode> {
    // files of the container pass through here
    crate::private::process();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let dir = |bytes| Path::new(OsStr::from_bytes(bytes));
    match job(args.iter().map(|a| a.as_bytes())) {
        Some(Job::Create(of)) => {
            let dir = dir(of);
            write::archive(
                dir,
                &staged::Known::beside(executable),
                BufWriter::with_capacity(1 << 20, standard(1)),
            )
            .with_context(|| format!("archiving {}", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Job::Extract(to)) if gzip::is_stored(&standard(0))? => {
            let dir = dir(to);
            read::extract(
                dir,
                &staged::files_beside(executable),
                BufReader::with_capacity(1 << 20, standard(0)),
            )
            .with_context(|| format!("extracting into {}", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        _ => stock(executable.parent(), &args),
    }
}

/// Stdin or stdout as a file without the standard library's own buffer; never closed.
fn standard(fd: i32) -> Standard {
    // SAFETY: the descriptor is open for the life of the process, and is not closed through this file.
    Standard(ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }))
}

struct Standard(ManuallyDrop<File>);

impl std::io::Read for Standard {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl std::io::Write for Standard {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.write(buf)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Standard {
    /// The first bytes, without taking them. Nothing when it is no file.
    fn peek(&self, buf: &mut [u8]) -> Result<usize> {
        let Ok(at) = (&*self.0).stream_position() else { return Ok(0) };
        let n = nix::sys::uio::pread(&*self.0, buf, at.try_into().context("an offset")?);
        n.with_context(|| format!("looking at descriptor {}", self.0.as_raw_fd()))
    }
}

/// Becomes the stock tar.
fn stock(dir: Option<&Path>, args: &[OsString]) -> Result<ExitCode> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // neither this program nor the one that has called it
    let ours = |p: &PathBuf| dir.is_some_and(|dir| p == dir || *p == dir.join(program::QUICK_DIR));
    let rest: Vec<PathBuf> = std::env::split_paths(&path).filter(|p| !ours(p)).collect();
    let rest = std::env::join_paths(rest).context("PATH")?;
    // found through our own PATH, so that is what changes
    let program = which(&rest).context("no stock tar in PATH")?;
    Err(Command::new(&program).arg0(NAME).args(args).env("PATH", rest).exec())
        .with_context(|| format!("running {}", program.display()))
}

fn which(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).map(|d| d.join(NAME)).find(|p| p.is_file())
}
