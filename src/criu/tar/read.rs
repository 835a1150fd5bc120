//! An archive's content to a directory.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::gzip::Unstored;
use super::header::{
    BLOCK, BLOCK_DEVICE, CHAR, DIR, FIFO, FILE, Header, LINK, LONG_NAME, LONG_TARGET, REFERENCE, SPARSE,
    SYMLINK, padding,
};
use super::staged;

/// A name or a target is not longer than this.
const NAME_CAP: u64 = 64 << 10;

/// Extracts what [`super::write::archive`] has written. What is there under the same name is replaced. Content
/// that is only named is taken from the directory `staged`.
pub fn extract(dir: &Path, staged: &Path, input: impl Read) -> Result<()> {
    let mut input = Unstored::new(input)?;
    // The directories that were made: nothing is put anywhere else, so no link leads out.
    let mut made: Vec<(PathBuf, Header)> = Vec::new();
    let mut known = HashSet::new();
    let (mut name, mut target) = (None, None);
    while let Some(mut header) = next(&mut input)? {
        match header.kind {
            LONG_NAME | LONG_TARGET => {
                ensure!(header.size <= NAME_CAP, "a name of {} bytes", header.size);
                let mut text = vec![0; header.size as usize];
                input.read_exact(&mut text)?;
                skip(&mut input, padding(header.size))?;
                text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
                *(if header.kind == LONG_NAME { &mut name } else { &mut target }) = Some(text);
                continue;
            }
            _ => {
                header.name = name.take().unwrap_or(header.name);
                header.target = target.take().unwrap_or(header.target);
            }
        }
        let relative = relative(&header.name)?;
        ensure!(
            relative.as_os_str().is_empty() || known.contains(relative.parent().unwrap_or(Path::new(""))),
            "{} is in no directory of the archive",
            relative.display()
        );
        let path = dir.join(&relative);
        if header.kind == LINK {
            let target = self::relative(&header.target)?;
            ensure!(
                known.contains(target.parent().unwrap_or(Path::new(""))),
                "{} is a link to {}, which is in no directory of the archive",
                relative.display(),
                target.display()
            );
        }
        if header.kind == DIR {
            known.insert(relative);
            if !path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
                remove(&path)?;
                std::fs::create_dir(&path)?;
            }
            made.push((path, header));
            continue;
        }
        // a link to somewhere else on the way would lead out
        let linked = relative_of(&header)?;
        ensure!(
            linked.as_ref().is_none_or(|to| known.contains(to.parent().unwrap_or(Path::new("")))),
            "{} is linked to what is in no directory of the archive",
            relative.display()
        );
        entry(dir, staged, &path, &header, &mut input)
            .with_context(|| format!("making {}", path.display()))?;
        skip(&mut input, padding(header.size))?;
    }
    input.finish()?;
    // From the inside out: what is made in a directory changes its time.
    for (path, header) in made.iter().rev() {
        attributes(path, header).with_context(|| format!("making {}", path.display()))?;
    }
    Ok(())
}

fn next(input: &mut impl Read) -> Result<Option<Header>> {
    let mut block = [0; BLOCK];
    input.read_exact(&mut block).context("reading an archive")?;
    Header::decode(&block, &mut || {
        let mut more = [0; BLOCK];
        input.read_exact(&mut more).context("reading an archive")?;
        Ok(more)
    })
}

fn skip(input: &mut impl Read, bytes: usize) -> Result<()> {
    input.read_exact(&mut [0; BLOCK][..bytes]).context("reading an archive")
}

/// The name below the directory, empty for itself.
fn relative(name: &[u8]) -> Result<PathBuf> {
    let mut out = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::CurDir => {}
            _ => bail!("the name {:?} leads out", OsStr::from_bytes(name)),
        }
    }
    Ok(out)
}

/// What a hard link names.
fn relative_of(header: &Header) -> Result<Option<PathBuf>> {
    (header.kind == LINK).then(|| relative(&header.target)).transpose()
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("replacing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn entry(dir: &Path, staged: &Path, path: &Path, header: &Header, input: &mut impl Read) -> Result<()> {
    remove(path)?;
    let node = |kind, device| mknod(path, kind, Mode::from_bits_truncate(header.mode), device);
    let device = makedev(header.device.0.into(), header.device.1.into());
    match header.kind {
        FILE | SPARSE => file(path, header, input)?,
        REFERENCE => referred(path, staged, header, input)?,
        // it has its owner already
        LINK => return Ok(std::fs::hard_link(dir.join(relative(&header.target)?), path)?),
        SYMLINK => symlink(OsStr::from_bytes(&header.target), path)?,
        FIFO => node(SFlag::S_IFIFO, 0)?,
        CHAR => node(SFlag::S_IFCHR, device)?,
        BLOCK_DEVICE => node(SFlag::S_IFBLK, device)?,
        other => bail!("an entry of the unknown type {other}"),
    }
    attributes(path, header)
}

fn file(path: &Path, header: &Header, input: &mut impl Read) -> Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let (pieces, size) = match &header.sparse {
        Some((pieces, size)) => (pieces.clone(), *size),
        None => (vec![(0, header.size)], header.size),
    };
    let sum = pieces.iter().try_fold(0u64, |sum, (_, len)| sum.checked_add(*len));
    ensure!(sum == Some(header.size), "its pieces are not its size");
    for (at, len) in pieces {
        file.seek(SeekFrom::Start(at))?;
        ensure!(std::io::copy(&mut input.take(len), &mut file)? == len, "the archive ends");
    }
    if header.sparse.is_some() {
        file.set_len(size)?;
    }
    Ok(())
}

fn referred(path: &Path, staged: &Path, header: &Header, input: &mut impl Read) -> Result<()> {
    ensure!(header.size <= staged::CAP, "a reference of {} bytes", header.size);
    let mut body = vec![0; header.size as usize];
    input.read_exact(&mut body)?;
    let reference = serde_json::from_slice(&body).context("reading a reference")?;
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    staged::take(staged, &reference, &file)
}

fn attributes(path: &Path, header: &Header) -> Result<()> {
    lchown(path, Some(header.uid), Some(header.gid))?;
    if header.kind != SYMLINK {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(header.mode))?;
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mtime = TimeSpec::new(header.mtime, 0);
    utimensat(
        nix::fcntl::AT_FDCWD,
        path.as_c_str(),
        &TimeSpec::UTIME_OMIT,
        &mtime,
        UtimensatFlags::NoFollowSymlink,
    )?;
    Ok(())
}
