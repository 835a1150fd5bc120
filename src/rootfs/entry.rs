//! One entry of a layer's stream, its limits, and the order of entries. Pure.

use std::cmp::Ordering;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::xattr::{self, OverlayXattrs, Verdict};

/// Longest path, in bytes. Longer than PATH_MAX: a container can make such trees by walking down with chdir.
pub const MAX_PATH: usize = 64 << 10;
/// Deepest path, in names. Either side holds one descriptor a level.
pub const MAX_DEPTH: usize = 512;
/// Longest name (NAME_MAX).
pub const MAX_NAME: usize = 255;
/// Longest symbolic link (PATH_MAX without its end).
pub const MAX_SYMLINK: usize = 4095;
/// Longest value of an extended attribute (XATTR_SIZE_MAX).
pub const MAX_XATTR_VALUE: usize = 64 << 10;
/// Most extended attributes of one entry: the kernel lists at most 64 KiB of names, the shortest of which takes 7.
pub const MAX_XATTRS: usize = 10_000;
/// Longest entry as bytes: many attributes of 64 KiB each fit only on XFS.
pub const MAX_ENTRY: usize = 4 << 20;
/// Largest size of a file (2^63-1, `loff_t`).
pub const MAX_SIZE: u64 = i64::MAX as u64;

/// The format of later rounds ([`Entry::Round`]).
pub const ROUND_FORMAT: u32 = 1;

/// One element of the stream. Paths are bytes relative to the layer's root, without a leading slash; the root is empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The first (or only) name of an inode.
    Node {
        /// Where it is.
        path: Vec<u8>,
        /// What it is.
        kind: Kind,
        /// Its attributes.
        meta: Meta,
    },
    /// Another name of an inode whose first name came before.
    Link {
        /// Where it is.
        path: Vec<u8>,
        /// The first name, relative to the layer's root.
        target: Vec<u8>,
    },
    /// The first entry of every round but the first: what follows are changes to what the earlier rounds brought.
    Round {
        /// [`ROUND_FORMAT`]; another number is refused.
        format: u32,
    },
    /// A name, with everything below it, is no more.
    Remove {
        /// What goes.
        path: Vec<u8>,
    },
    /// Zeros without blocks, in the [`Kind::Patch`] whose entry was sent last. In order with its data.
    Hole {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The end of the stream, so that one cut short is never taken for a whole one.
    End(Totals),
}

/// What a [`Entry::Node`] is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file; its data follows, holes are left out.
    File {
        /// Length in bytes, holes included.
        size: u64,
    },
    /// A regular file that the destination has already, under this very name: it gets this size and these attributes,
    /// and what follows of its data replaces what it holds. Only in later rounds.
    Patch {
        /// Length in bytes, holes included.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// What it says; never followed.
        target: Vec<u8>,
    },
    /// A named pipe.
    Fifo,
    /// A unix socket's name. Nobody listens on it: a listening one is restored by CRIU.
    Socket,
    /// A character device, other than 0:0.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// overlayfs' mark of a deleted name: character device 0:0.
    Whiteout,
}

impl Kind {
    /// For a device: whether it is a block device, major and minor number.
    pub fn device(&self) -> Option<(bool, u32, u32)> {
        match self {
            Kind::CharDevice { major, minor } => Some((false, *major, *minor)),
            Kind::BlockDevice { major, minor } => Some((true, *major, *minor)),
            _ => None,
        }
    }
}

/// Attributes of an inode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky (07777).
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Last modification of the content.
    pub mtime: Time,
    /// Last read.
    pub atime: Time,
    /// Inode flags (`FS_*_FL`, ioctl_iflags(2)) out of [`FLAGS`].
    pub flags: u32,
    /// Extended attributes, by name.
    pub xattrs: Vec<Xattr>,
}

/// Inode flags that travel: sync, immutable, append-only, nodump, noatime, dirsync. The others belong to the filesystem
/// (extents, encryption, compression, project quotas).
pub const FLAGS: u32 = 0x8 | PROTECTED | 0x40 | 0x80 | 0x1_0000;
/// Those that forbid changes and are therefore set last: immutable, append-only.
pub const PROTECTED: u32 = 0x10 | 0x20;

/// Seconds and nanoseconds since 1970; negative seconds are before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds, below 10^9.
    pub nanos: u32,
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xattr {
    /// With its namespace, `user.x`.
    pub name: Vec<u8>,
    /// Any bytes.
    pub value: Vec<u8>,
}

/// Sums that end the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Entries before the end mark.
    pub entries: u64,
    /// Bytes of data.
    pub bytes: u64,
}

impl Entry {
    /// The entry's path; none for marks and holes.
    pub fn path(&self) -> Option<&[u8]> {
        match self {
            Entry::Node { path, .. } | Entry::Link { path, .. } | Entry::Remove { path } => Some(path),
            Entry::Round { .. } | Entry::Hole { .. } | Entry::End(_) => None,
        }
    }

    /// Checks everything that can be seen in the entry alone: the limits, no way out of the root, no attribute that
    /// [`super::capture()`] would not have sent.
    ///
    /// # Errors
    /// Says which rule the entry breaks.
    pub fn check(&self, overlay: OverlayXattrs) -> Result<()> {
        match self {
            Entry::Node { path, kind, meta } => {
                check_path(path)?;
                check_kind(path, kind)?;
                check_meta(meta, overlay)
            }
            Entry::Link { path, target } => {
                check_path(path)?;
                check_path(target)?;
                ensure!(!path.is_empty() && !target.is_empty(), "the root cannot be a hard link");
                ensure!(path != target, "a hard link to itself");
                Ok(())
            }
            Entry::Round { format } => {
                ensure!(
                    *format == ROUND_FORMAT,
                    "a round of format {format}, which this version does not know"
                );
                Ok(())
            }
            Entry::Remove { path } => {
                check_path(path)?;
                ensure!(!path.is_empty(), "the root cannot be removed");
                Ok(())
            }
            Entry::Hole { offset, len } => {
                let end = offset.checked_add(*len).filter(|end| *len > 0 && *end <= MAX_SIZE);
                ensure!(end.is_some(), "a hole of {len} bytes at {offset}");
                Ok(())
            }
            Entry::End(_) => Ok(()),
        }
    }
}

fn check_kind(path: &[u8], kind: &Kind) -> Result<()> {
    match kind {
        Kind::Directory => {}
        _ if path.is_empty() => bail!("the root is not a directory"),
        Kind::File { size } | Kind::Patch { size } => ensure!(*size <= MAX_SIZE, "a file of {size} bytes"),
        Kind::Symlink { target } => {
            ensure!(!target.is_empty() && target.len() <= MAX_SYMLINK, "a symlink of {} bytes", target.len());
            ensure!(!target.contains(&0), "a symlink with a NUL");
        }
        // The limits of the kernel's dev_t: 12 and 20 bits. 0:0 has a kind of its own.
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            ensure!(*major < 1 << 12 && *minor < 1 << 20, "device number {major}:{minor}");
            ensure!(!matches!(kind, Kind::CharDevice { major: 0, minor: 0 }), "a whiteout sent as a device");
        }
        Kind::Fifo | Kind::Socket | Kind::Whiteout => {}
    }
    Ok(())
}

fn check_meta(meta: &Meta, overlay: OverlayXattrs) -> Result<()> {
    ensure!(meta.mode & !0o7777 == 0, "mode {:o}", meta.mode);
    // The kernel takes -1 as "leave it".
    ensure!(meta.uid != u32::MAX && meta.gid != u32::MAX, "owner {}:{}", meta.uid, meta.gid);
    ensure!(
        meta.mtime.nanos < 1_000_000_000 && meta.atime.nanos < 1_000_000_000,
        "a time with too many nanoseconds"
    );
    ensure!(meta.flags & !FLAGS == 0, "inode flags {:#x}", meta.flags);
    ensure!(meta.xattrs.len() <= MAX_XATTRS, "{} extended attributes", meta.xattrs.len());
    for (i, x) in meta.xattrs.iter().enumerate() {
        let name = x.name.escape_ascii();
        ensure!(
            !x.name.is_empty() && x.name.len() <= MAX_NAME && !x.name.contains(&0),
            "attribute name \"{name}\""
        );
        ensure!(x.value.len() <= MAX_XATTR_VALUE, "attribute {name} of {} bytes", x.value.len());
        ensure!(i == 0 || meta.xattrs[i - 1].name < x.name, "attribute {name} twice or out of order");
        match xattr::judge(&x.name, overlay) {
            Verdict::Keep => {
                ensure!(
                    xattr::is_value(&x.name, &x.value, overlay),
                    "attribute {name} with a value that it never has"
                )
            }
            Verdict::Drop => bail!("attribute {name}, which is never sent"),
            Verdict::Refuse(why) => bail!("attribute {name}: {why}"),
        }
    }
    Ok(())
}

/// Checks that a path cannot leave the root and is within the limits. The empty path is the root.
pub fn check_path(path: &[u8]) -> Result<()> {
    ensure!(path.len() <= MAX_PATH, "a path of {} bytes (at most {MAX_PATH})", path.len());
    if path.is_empty() {
        return Ok(());
    }
    let mut depth = 0;
    for name in path.split(|b| *b == b'/') {
        depth += 1;
        ensure!(!name.is_empty(), "a path with an empty name");
        ensure!(name != b"." && name != b"..", "a path with \"{}\" in it", name.escape_ascii());
        ensure!(name.len() <= MAX_NAME, "a name of {} bytes", name.len());
        ensure!(!name.contains(&0), "a name with a NUL");
    }
    ensure!(depth <= MAX_DEPTH, "a path of {depth} levels (at most {MAX_DEPTH})");
    Ok(())
}

/// The order of the stream: name by name, so that a directory's content follows it at once.
pub fn order(a: &[u8], b: &[u8]) -> Ordering {
    match (a.is_empty(), b.is_empty()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
        (false, false) => a.split(|c| *c == b'/').cmp(b.split(|c| *c == b'/')),
    }
}

/// Splits a path into its parent ("" for the root) and its last name.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_depth_first() {
        let sorted: [&[u8]; 7] = [b"", b"a", b"a/b", b"a/b/c", b"a/c", b"a!", b"ab"];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(order(a, b), i.cmp(&j), "{} {}", a.escape_ascii(), b.escape_ascii());
            }
        }
    }

    #[test]
    fn paths_that_leave_are_refused() {
        for bad in [&b"/etc"[..], b"..", b"a/../b", b"a/..", b".", b"a//b", b"a/", b"a\0b", &[b'x'; 256]] {
            assert!(check_path(bad).is_err(), "{}", bad.escape_ascii());
        }
        for good in [&b""[..], b"a", b"...", b"a/..b", b"\xff\xfe/\n", &[b'x'; 255]] {
            check_path(good).unwrap();
        }
        assert!(check_path([&b"a/"[..]; 512].concat().as_slice()).is_err());
        assert!(check_path(&[&b"a/"[..]; 513].concat()[..1025]).is_err());
        check_path(&[&b"a/"[..]; 512].concat()[..1023]).unwrap();
    }

    #[test]
    fn parent_and_name() {
        assert_eq!(split(b"a"), (&b""[..], &b"a"[..]));
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
    }

    #[test]
    fn entries_that_capture_never_sends_are_refused() {
        let check =
            |kind, meta| Entry::Node { path: b"a".to_vec(), kind, meta }.check(OverlayXattrs::Trusted);
        let meta = Meta::default;
        check(Kind::Whiteout, meta()).unwrap();
        assert!(check(Kind::CharDevice { major: 0, minor: 0 }, meta()).is_err());
        assert!(check(Kind::BlockDevice { major: 1 << 12, minor: 0 }, meta()).is_err());
        assert!(check(Kind::File { size: u64::MAX }, meta()).is_err());
        assert!(check(Kind::Symlink { target: vec![] }, meta()).is_err());
        assert!(check(Kind::Fifo, Meta { mode: 0o10000, ..meta() }).is_err());
        assert!(check(Kind::Fifo, Meta { uid: u32::MAX, ..meta() }).is_err());
        assert!(check(Kind::Fifo, Meta { flags: 0x800, ..meta() }).is_err());
        assert!(check(Kind::Fifo, Meta { mtime: Time { secs: 0, nanos: 1_000_000_000 }, ..meta() }).is_err());
        let with = |names: &[&str]| Meta {
            xattrs: names.iter().map(|n| Xattr { name: n.as_bytes().to_vec(), value: vec![] }).collect(),
            ..meta()
        };
        check(Kind::Fifo, with(&["trusted.a", "trusted.b"])).unwrap();
        assert!(check(Kind::Fifo, with(&["trusted.b", "trusted.a"])).is_err());
        assert!(check(Kind::Fifo, with(&["trusted.b", "trusted.b"])).is_err());
        assert!(check(Kind::Fifo, with(&["trusted.overlay.metacopy"])).is_err());
        assert!(check(Kind::Fifo, with(&["trusted.overlay.origin"])).is_err());
        assert!(check(Kind::Directory, with(&["trusted.overlay.opaque"])).is_err(), "without its value");
        let link = |path: &[u8], target: &[u8]| {
            Entry::Link { path: path.to_vec(), target: target.to_vec() }.check(OverlayXattrs::Trusted)
        };
        link(b"b", b"a").unwrap();
        for (path, target) in [(&b"a"[..], &b"a"[..]), (b"a", b""), (b"", b""), (b"b", b"../a")] {
            assert!(link(path, target).is_err());
        }
        let bad = [
            Entry::Remove { path: vec![] },
            Entry::Remove { path: b"../a".to_vec() },
            Entry::Remove { path: b"/a".to_vec() },
            Entry::Round { format: ROUND_FORMAT + 1 },
            Entry::Hole { offset: 0, len: 0 },
            Entry::Hole { offset: u64::MAX, len: 2 },
            Entry::Hole { offset: MAX_SIZE, len: 1 },
        ];
        for entry in bad {
            assert!(entry.check(OverlayXattrs::Trusted).is_err(), "{entry:?}");
        }
        assert!(check(Kind::Patch { size: u64::MAX }, meta()).is_err());
        let root = Entry::Node { path: vec![], kind: Kind::Fifo, meta: meta() };
        assert!(root.check(OverlayXattrs::Trusted).is_err());
    }
}
