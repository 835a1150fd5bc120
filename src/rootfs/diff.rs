//! Two directories compared entry by entry, for tests and the doctor. It shares no code with capture and
//! apply, not even the list of attributes that are not sent, so that it can find their mistakes: everything goes by path
//! names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::xattr::OverlayXattrs;

/// What counts as a difference.
#[derive(Clone, Copy, Debug)]
pub struct CompareOptions {
    /// Where overlayfs keeps its marks, for those that are not sent. [`OverlayXattrs::None`] for merged views.
    pub overlay: OverlayXattrs,
    /// Access times too. They change when a directory is listed.
    pub atime: bool,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Relative to both roots.
    pub path: PathBuf,
    /// Which property, with both values.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\": {}", self.path.as_os_str().as_bytes().escape_ascii(), self.what)
    }
}

/// Compares type, mode, owner, times, device number, size, holes, content, symlink target, extended attributes, inode
/// flags and groups of hard links of everything below two directories, themselves included. Not compared: inode
/// numbers, link counts and sizes of directories, change times.
///
/// # Errors
/// Either side cannot be read.
pub fn compare(a: &Path, b: &Path, options: CompareOptions) -> Result<Vec<Difference>> {
    let mut walk =
        Walk { roots: [a, b], options, groups: [HashMap::new(), HashMap::new()], found: Vec::new() };
    walk.node(Path::new(""))?;
    Ok(walk.found)
}

struct Walk<'a> {
    roots: [&'a Path; 2],
    options: CompareOptions,
    /// First name of each inode that may have several.
    groups: [HashMap<(u64, u64), PathBuf>; 2],
    found: Vec<Difference>,
}

impl Walk<'_> {
    fn node(&mut self, path: &Path) -> Result<()> {
        let sides = self.roots.map(|root| root.join(path));
        let stats = [stat(&sides[0])?, stat(&sides[1])?];
        let [a, b] = &stats;
        self.same(
            path,
            "type",
            format!("{:o}", a.mode() & libc::S_IFMT),
            format!("{:o}", b.mode() & libc::S_IFMT),
        );
        if a.mode() & libc::S_IFMT != b.mode() & libc::S_IFMT {
            return Ok(());
        }
        self.same(path, "mode", format!("{:o}", a.mode()), format!("{:o}", b.mode()));
        self.same(path, "owner", (a.uid(), a.gid()), (b.uid(), b.gid()));
        self.same(path, "mtime", (a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        self.same(path, "device number", a.rdev(), b.rdev());
        let first_look = self.links(path, &stats);
        // Reading changes it: a file's under its other names, a symlink's with every look at where it leads.
        if self.options.atime && first_look && !a.is_symlink() {
            self.same(path, "atime", (a.atime(), a.atime_nsec()), (b.atime(), b.atime_nsec()));
        }
        let xattrs = [xattrs(&sides[0], self.options.overlay)?, xattrs(&sides[1], self.options.overlay)?];
        self.xattrs(path, &xattrs);
        if a.is_dir() {
            self.same(path, "inode flags", flags(&sides[0])?, flags(&sides[1])?);
            self.children(path, &sides)?;
        } else if a.is_symlink() {
            self.same(path, "target", std::fs::read_link(&sides[0])?, std::fs::read_link(&sides[1])?);
        } else if a.is_file() {
            self.same(path, "size", a.len(), b.len());
            self.same(path, "inode flags", flags(&sides[0])?, flags(&sides[1])?);
            if a.len() == b.len() {
                self.content(path, &sides, a.len())?;
            }
        }
        Ok(())
    }

    fn children(&mut self, path: &Path, sides: &[PathBuf; 2]) -> Result<()> {
        let [a, b] = [names(&sides[0])?, names(&sides[1])?];
        for name in a.union(&b) {
            let child = path.join(OsStr::from_bytes(name));
            match (a.contains(name), b.contains(name)) {
                (true, true) => self.node(&child)?,
                (true, false) => self.push(&child, "only in the first".into()),
                _ => self.push(&child, "only in the second".into()),
            }
        }
        Ok(())
    }

    /// Compares which name an inode was first seen under; true if that is this one on both sides.
    fn links(&mut self, path: &Path, stats: &[Metadata; 2]) -> bool {
        let whiteout = stats.iter().all(|s| s.mode() & libc::S_IFMT == libc::S_IFCHR && s.rdev() == 0);
        // Whether whiteouts share an inode depends on the filesystem, and means nothing.
        if stats[0].is_dir() || whiteout {
            return true;
        }
        let first = [0, 1].map(|i| {
            let key = (stats[i].dev(), stats[i].ino());
            self.groups[i].entry(key).or_insert_with(|| path.to_owned()).clone()
        });
        self.same(path, "hard link to", &first[0], &first[1]);
        first.iter().all(|f| f == path)
    }

    fn xattrs(&mut self, path: &Path, sides: &[BTreeMap<Vec<u8>, Vec<u8>>; 2]) {
        let names: BTreeSet<_> = sides.iter().flat_map(|s| s.keys()).collect();
        for name in names {
            let [a, b] = [0, 1].map(|i| sides[i].get(name).map(|v| v.escape_ascii().to_string()));
            self.same(path, &format!("xattr {}", name.escape_ascii()), a, b);
        }
    }

    fn content(&mut self, path: &Path, sides: &[PathBuf; 2], size: u64) -> Result<()> {
        let open = |p: &Path| File::open(p).with_context(|| format!("opening {}", p.display()));
        let (a, b) = (open(&sides[0])?, open(&sides[1])?);
        // Before anything is read: reading can fill holes with pages on some filesystems.
        let [in_a, in_b] = [ranges(&a, size)?, ranges(&b, size)?];
        self.same(path, "data ranges", &in_a, &in_b);
        let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
        // What is a hole on both sides is zeros on both sides; a large file need not be read for that.
        for (start, end) in in_a.into_iter().chain(in_b) {
            let mut at = start;
            while at < end {
                let n = (end - at).min(1 << 20) as usize;
                a.read_exact_at(&mut buffers[0][..n], at)?;
                b.read_exact_at(&mut buffers[1][..n], at)?;
                if buffers[0][..n] != buffers[1][..n] {
                    let first = (0..n).find(|i| buffers[0][*i] != buffers[1][*i]).unwrap_or(0);
                    self.push(path, format!("content differs from byte {}", at + first as u64));
                    return Ok(());
                }
                at += n as u64;
            }
        }
        Ok(())
    }

    fn same<T: PartialEq + fmt::Debug>(&mut self, path: &Path, what: &str, a: T, b: T) {
        if a != b {
            self.push(path, format!("{what} {a:?} and {b:?}"));
        }
    }

    fn push(&mut self, path: &Path, what: String) {
        self.found.push(Difference { path: path.to_owned(), what });
    }
}

fn stat(path: &Path) -> Result<Metadata> {
    std::fs::symlink_metadata(path).with_context(|| format!("looking at {}", path.display()))
}

fn names(path: &Path) -> Result<BTreeSet<Vec<u8>>> {
    let listing = std::fs::read_dir(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(listing.map(|e| e.map(|e| e.file_name().into_vec())).collect::<std::io::Result<_>>()?)
}

/// Where a file has data. All of it on a filesystem that cannot tell.
fn ranges(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < size {
        // SAFETY: no memory is involved.
        let start = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
        if start < 0 {
            match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::ENXIO) => break,
                _ => return Ok(vec![(0, size)]),
            }
        }
        // SAFETY: as above.
        let end = unsafe { libc::lseek(file.as_raw_fd(), start, libc::SEEK_HOLE) };
        if end <= start {
            break;
        }
        at = (end as u64).min(size);
        found.push((start as u64, at));
    }
    Ok(found)
}

fn flags(path: &Path) -> Result<u32> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    Ok(super::sys::flags(std::os::fd::AsFd::as_fd(&file))? & super::entry::FLAGS)
}

/// Attributes that hold handles and keyed hashes of inodes of one disk.
fn is_local(name: &[u8], overlay: OverlayXattrs) -> bool {
    match overlay {
        OverlayXattrs::Trusted => name == b"trusted.overlay.origin" || name == b"trusted.overlay.upper",
        OverlayXattrs::User => name == b"user.overlay.origin" || name == b"user.overlay.upper",
        OverlayXattrs::None => false,
    }
}

/// All attributes of a path itself that would be sent.
fn xattrs(path: &Path, overlay: OverlayXattrs) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    let mut list = vec![0u8; 64 << 10];
    // SAFETY: the path ends with a NUL; the buffer is valid for its length.
    let n = unsafe { libc::llistxattr(c_path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    if n < 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            return Ok(BTreeMap::new());
        }
        return Err(error).with_context(|| format!("listing attributes of {}", path.display()));
    }
    let mut found = BTreeMap::new();
    for name in list[..n as usize].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if is_local(name, overlay) {
            continue;
        }
        let c_name = CString::new(name)?;
        let mut value = vec![0u8; 64 << 10];
        // SAFETY: path and name end with a NUL; the buffer is valid for its length.
        let n = unsafe {
            libc::lgetxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        if n < 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("reading {c_name:?} of {}", path.display()));
        }
        value.truncate(n as usize);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
