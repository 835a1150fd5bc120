//! A `tar` for the content of tmpfs mounts, for which CRIU runs `tar` (and that gzip) once each: 4 ms at a dump and 3 at a restore,
//! most of it programs being started. Ours does no compression, in one process.
//!
//! What it writes is what stock `tar --extract --gzip` reads: a GNU archive in a gzip file whose blocks are stored ([`gzip`]).
//! What it reads is only that; everything else, and every call that is not CRIU's, goes to the stock program, found in the rest of PATH.
//! Kept is what CRIU's own call keeps: names, types, owners, modes, times of modification in seconds, links, devices, holes. Sockets are
//! left out, CRIU makes them itself.
//!
//! In a migration the content of files may be a reference to what the destination has already ([`staged`]).

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
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

/// The name under which CRIU calls it.
pub(super) const NAME: &str = "tar";
/// The directory's name: who is called as `tar` from elsewhere is something else.
const DIR: &str = "transship-tools";

/// Makes a directory in `parent` in which `program` is named `tar`, to be put first in CRIU's PATH. The program's main calls
/// [`super::gate::main_if_invoked`].
pub fn tools(parent: &Path, program: &Path) -> Result<PathBuf> {
    let dir = parent.join(DIR);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .and_then(|()| match symlink(program, dir.join(NAME)) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        })
        .with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// Is this the name of our `tar`?
pub(super) fn is_ours(executable: &Path) -> bool {
    executable.ends_with(Path::new(DIR).join(NAME))
}

/// What CRIU asks for (criu/filesystems.c).
#[derive(Debug, PartialEq, Eq)]
enum Job {
    /// Archive this directory to stdout.
    Create(PathBuf),
    /// Extract stdin into this directory.
    Extract(PathBuf),
}

/// None for anything but CRIU's two calls.
fn job(args: &[OsString]) -> Option<Job> {
    const MODIFIERS: [&str; 8] = [
        "--gzip",
        "--no-unquote",
        "--no-wildcards",
        "--one-file-system",
        "--check-links",
        "--preserve-permissions",
        "--sparse",
        "--numeric-owner",
    ];
    let (mut create, mut extract, mut directory, mut what) = (false, false, None, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--create") => create = true,
            Some("--extract") => extract = true,
            Some("--directory") => directory = args.next().map(PathBuf::from),
            Some(".") => what = Some(()),
            Some(known) if MODIFIERS.contains(&known) => {}
            _ => return None,
        }
    }
    match (create, extract, what) {
        (true, false, Some(())) => directory.map(Job::Create),
        (false, true, None) => directory.map(Job::Extract),
        _ => None,
    }
}

/// Runs as CRIU's tar.
pub(super) fn main(executable: &Path) -> Result<ExitCode> {
    // files of the container pass through here
    crate::private::process();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match job(&args) {
        Some(Job::Create(dir)) => {
            write::archive(
                &dir,
                &staged::Known::beside(executable),
                BufWriter::with_capacity(1 << 20, standard(1)),
            )
            .with_context(|| format!("archiving {}", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Job::Extract(dir)) if gzip::is_stored(&standard(0))? => {
            read::extract(
                &dir,
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
    let rest: Vec<PathBuf> = std::env::split_paths(&path).filter(|p| Some(p.as_path()) != dir).collect();
    let rest = std::env::join_paths(rest).context("PATH")?;
    // found through our own PATH, so that is what changes
    let program = which(&rest).context("no stock tar in PATH")?;
    Err(Command::new(&program).arg0(NAME).args(args).env("PATH", rest).exec())
        .with_context(|| format!("running {}", program.display()))
}

fn which(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).map(|d| d.join(NAME)).find(|p| p.is_file())
}
