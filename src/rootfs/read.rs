//! One inode's entry read from a descriptor.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail};
use nix::sys::stat::FileStat;

use super::Stats;
use super::entry::{Kind, MAX_XATTR_VALUE, Meta, Time, Xattr};
use super::sys::Inode;
use super::xattr::{OverlayXattrs, Verdict, judge};

/// Everything but the flags, which need an open descriptor.
pub fn meta(stat: &FileStat, inode: &Inode<'_>, overlay: OverlayXattrs, stats: &mut Stats) -> Result<Meta> {
    let mut xattrs = Vec::new();
    for name in inode.xattr_names().context("listing extended attributes")? {
        let shown = name.to_bytes().escape_ascii();
        match judge(name.to_bytes(), overlay) {
            Verdict::Drop => {
                stats.xattrs_dropped += 1;
                continue;
            }
            Verdict::Refuse(why) => bail!("cannot be moved, extended attribute {shown}: {why}"),
            Verdict::Keep => {}
        }
        let value = inode.xattr(&name).with_context(|| format!("reading extended attribute {shown}"))?;
        let Some(value) = value else { continue };
        debug_assert!(value.len() <= MAX_XATTR_VALUE);
        xattrs.push(Xattr { name: name.into_bytes(), value });
    }
    Ok(Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        flags: 0,
        xattrs,
    })
}

/// What an `O_PATH` descriptor stands for, if it is neither a directory nor a regular file.
pub fn special(node: BorrowedFd<'_>, stat: &FileStat) -> Result<Kind> {
    let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    Ok(match stat.st_mode & libc::S_IFMT {
        libc::S_IFLNK => {
            // Relative to the link itself (readlinkat(2), empty path): no name is looked up again.
            let target = nix::fcntl::readlinkat(node, c"").context("reading the symlink")?;
            Kind::Symlink { target: std::os::unix::ffi::OsStringExt::into_vec(target) }
        }
        libc::S_IFIFO => Kind::Fifo,
        libc::S_IFSOCK => Kind::Socket,
        libc::S_IFCHR if stat.st_rdev == 0 => Kind::Whiteout,
        libc::S_IFCHR => Kind::CharDevice { major, minor },
        libc::S_IFBLK => Kind::BlockDevice { major, minor },
        other => bail!("unknown file type {other:o}"),
    })
}

/// Seconds and nanoseconds of stat(2).
pub fn time(secs: i64, nanos: i64) -> Time {
    Time { secs, nanos: nanos as u32 }
}
