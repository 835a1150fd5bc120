//! What a directory tree holds, one line an entry, to be compared with what another node has later. By path names and
//! system calls only: nothing here is shared with the code that moves layers.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr};
use std::fmt::Write;
use std::fs::{self, File, Metadata, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Of an overlay's upper directory, or of the merged view of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// What overlayfs keeps on disk: its whiteouts and marks belong to it.
    Upper,
    /// What the container sees.
    Merged,
}

/// Each entry's path and everything that can be known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest(BTreeMap<String, String>);

/// Attributes of overlayfs that name inodes of one disk and therefore differ on another.
const LOCAL: [&[u8]; 2] = [b"trusted.overlay.origin", b"trusted.overlay.upper"];

impl Manifest {
    /// Reads the tree below `root`, itself included; access times are left as they are.
    pub fn of(root: &Path, view: View) -> Result<Manifest> {
        let mut manifest = Manifest::default();
        let mut inodes = HashMap::new();
        let mut open = vec![root.to_owned()];
        while let Some(path) = open.pop() {
            let meta = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
            let name = path.strip_prefix(root)?.as_os_str().as_bytes().escape_ascii().to_string();
            let line = describe(&path, &meta, view).with_context(|| path.display().to_string())?;
            if meta.is_dir() {
                for entry in fs::read_dir(&path)? {
                    open.push(entry?.path());
                }
            } else if meta.nlink() > 1 && !(meta.rdev() == 0 && line.starts_with('c')) {
                // whether whiteouts share an inode means nothing
                inodes.entry((meta.dev(), meta.ino())).or_insert_with(Vec::new).push(name.clone());
            }
            manifest.0.insert(name, line);
        }
        for mut names in inodes.into_values() {
            names.sort();
            for name in &names {
                if let Some(line) = manifest.0.get_mut(name) {
                    let _ = write!(line, " links={}", names.join("|"));
                }
            }
        }
        Ok(manifest)
    }

    /// How many entries `other` has otherwise, the first of them in words.
    pub fn differences(&self, other: &Manifest) -> Vec<String> {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let differs = |name: &&&String| self.0.get(**name) != other.0.get(**name);
        let show = |m: &Manifest, name: &String| m.0.get(name).cloned().unwrap_or("nothing".into());
        names
            .iter()
            .filter(differs)
            .map(|n| format!("{n:?}:\n    {}\n    {}", show(self, n), show(other, n)))
            .collect()
    }

    /// How many entries have `pattern` in their line.
    pub fn count(&self, pattern: &str) -> usize {
        self.0.values().filter(|line| line.contains(pattern)).count()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// `TYPE mode=.. owner=.. mtime=..` and what belongs to the type.
fn describe(path: &Path, meta: &Metadata, view: View) -> Result<String> {
    let kind = match meta.mode() & libc::S_IFMT {
        libc::S_IFREG => "file",
        libc::S_IFDIR => "dir",
        libc::S_IFLNK => "symlink",
        libc::S_IFIFO => "fifo",
        libc::S_IFSOCK => "socket",
        libc::S_IFBLK => "block",
        libc::S_IFCHR if meta.rdev() == 0 && view == View::Upper => "cwhiteout",
        _ => "char",
    };
    let mut line = format!(
        "{kind} mode={:o} owner={}:{} mtime={}.{:09}",
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    match kind {
        "char" | "block" => write!(line, " device={:x}", meta.rdev())?,
        "symlink" => {
            write!(line, " to={}", fs::read_link(path)?.as_os_str().as_bytes().escape_ascii())?;
        }
        "file" => {
            if view == View::Upper {
                write!(line, " atime={}.{:09}", meta.atime(), meta.atime_nsec())?;
            }
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(path)?;
            let (ranges, digest) = content(&file, meta.len())?;
            let holes =
                if ranges.iter().map(|(a, b)| b - a).sum::<u64>() < meta.len() { " sparse" } else { "" };
            write!(line, " size={}{holes} sha={digest}", meta.len())?;
            if view == View::Upper {
                write!(line, " data={ranges:?}")?;
            }
        }
        _ => {}
    }
    for (name, value) in xattrs(path)? {
        if !LOCAL.contains(&name.as_slice()) {
            write!(line, " {}={}", name.escape_ascii(), value.escape_ascii())?;
        }
    }
    Ok(line)
}

/// Where the file has data, and a digest of that and its places.
fn content(file: &File, size: u64) -> Result<(Vec<(u64, u64)>, String)> {
    let seek = |at: u64, whence| {
        // SAFETY: no memory is involved.
        let found = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
        u64::try_from(found).ok()
    };
    let (mut ranges, mut at, mut sha) = (Vec::new(), 0, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    while let Some(start) = seek(at, libc::SEEK_DATA).filter(|start| *start < size) {
        let end = seek(start, libc::SEEK_HOLE).unwrap_or(size).min(size);
        at = start;
        while at < end {
            let part = &mut buffer[..(end - at).min(1 << 20) as usize];
            file.read_exact_at(part, at)?;
            sha.update(at.to_le_bytes());
            sha.update(&*part);
            at += part.len() as u64;
        }
        ranges.push((start, end));
    }
    Ok((ranges, format!("{:x}", sha.finalize())))
}

/// The extended attributes of a path itself, by name.
fn xattrs(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = CString::new(OsStr::new(path).as_bytes())?;
    let checked = |n: libc::ssize_t| {
        usize::try_from(n).map_err(|_| std::io::Error::last_os_error()).context("extended attributes")
    };
    let mut list = vec![0u8; 64 << 10];
    // SAFETY: the path ends with a NUL, the buffer is as long as is said.
    let n = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(checked(n)?);
    let mut found = Vec::new();
    for name in list.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let c_name = CString::new(name)?;
        let mut value = vec![0u8; 64 << 10];
        // SAFETY: path and name end with a NUL, the buffer is as long as is said.
        let n = unsafe {
            libc::lgetxattr(path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        value.truncate(checked(n)?);
        found.push((name.to_owned(), value));
    }
    found.sort();
    Ok(found)
}
