//! Owner, attributes, mode, flags and times of what was written.

use std::ffi::CString;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmod, fchmodat, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat};

use std::os::fd::AsFd;

use crate::rootfs::entry::{FLAGS, Meta, PROTECTED, Time};
use crate::rootfs::sys::{self, Inode};
use crate::rootfs::xattr::{self, OverlayXattrs};

/// Sets everything of an open file or directory but the flags that forbid changes. With `exact`, attributes that it has
/// and should not have go. False if its filesystem does not know all of its flags.
pub fn set(fd: BorrowedFd<'_>, meta: &Meta, exact: Option<Exact>) -> Result<bool> {
    fchown(fd, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid))).context("owner")?;
    let inode = Inode::Open(fd);
    if let Some(exact) = exact {
        drop_others(&inode, meta, exact)?;
    }
    set_xattrs(&inode, meta)?;
    fchmod(fd, Mode::from_bits_truncate(meta.mode)).context("mode")?;
    let plain = meta.flags & !PROTECTED;
    let mut known = true;
    if plain != 0 || exact.is_some() {
        let now = sys::flags(fd)?;
        let want = if exact.is_some() { now & !(FLAGS & !PROTECTED) | plain } else { now | plain };
        // Some filesystems lack some of these; none of them changes what a program reads.
        known = want == now || sys::set_flags(fd, want).is_ok();
    }
    futimens(fd, &timespec(meta.atime), &timespec(meta.mtime)).context("times")?;
    Ok(known)
}

/// Attributes of what cannot be opened. The name was created just now, in a directory that only we know.
pub fn set_by_name(parent: BorrowedFd<'_>, name: &[u8], meta: &Meta, has_mode: bool) -> Result<()> {
    ensure!(meta.flags == 0, "inode flags on something that cannot have any");
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).context("owner")?;
    if has_mode || !meta.xattrs.is_empty() {
        let node = sys::open_beneath(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        let inode = Inode::of_path_fd(node.as_fd());
        set_xattrs(&inode, meta)?;
        if has_mode {
            // fchmod does not take an O_PATH descriptor; its path in /proc leads to the inode itself.
            let Inode::Path(path, _) = &inode else { bail!("not a path") };
            let mode = Mode::from_bits_truncate(meta.mode);
            fchmodat(AT_FDCWD, path.as_c_str(), mode, FchmodatFlags::FollowSymlink).context("mode")?;
        }
    }
    utimensat(parent, name, &timespec(meta.atime), &timespec(meta.mtime), UtimensatFlags::NoFollowSymlink)
        .context("times")
}

/// Which attributes go although nobody sent them.
#[derive(Clone, Copy, Debug)]
pub struct Exact {
    /// Where overlayfs keeps its marks, seen from where the inode is written.
    pub overlay: OverlayXattrs,
    /// Those marks stay: the root's belong to the mount.
    pub keep_marks: bool,
}

fn drop_others(inode: &Inode<'_>, meta: &Meta, exact: Exact) -> Result<()> {
    for name in inode.xattr_names()? {
        let bytes = name.to_bytes();
        let goes = xattr::is_leftover(bytes, exact.overlay)
            || !exact.keep_marks && xattr::is_sent_mark(bytes, exact.overlay);
        if goes && !meta.xattrs.iter().any(|x| x.name == bytes) {
            inode.remove_xattr(&name).with_context(|| format!("removing extended attribute {name:?}"))?;
        }
    }
    Ok(())
}

fn set_xattrs(inode: &Inode<'_>, meta: &Meta) -> Result<()> {
    for x in &meta.xattrs {
        let name = CString::new(x.name.as_slice())?;
        inode.set_xattr(&name, &x.value).with_context(|| format!("extended attribute {name:?}"))?;
    }
    Ok(())
}

fn timespec(time: Time) -> TimeSpec {
    TimeSpec::new(time.secs, time.nanos.into())
}
