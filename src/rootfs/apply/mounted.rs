//! The mounted overlay: from when on changes are made through it, what cannot be said that way and takes the mount away,
//! and what the layer itself has whatever the mount shows. Which entries that are decides [`merged`].

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use super::{Apply, merged, open_root};
use crate::rootfs::entry::{self, Kind, Meta};
use crate::rootfs::sys::{self, Inode};
use crate::rootfs::xattr::OverlayXattrs;

/// What takes the mount away; told why.
pub type Unmount = Box<dyn FnMut(&str) -> Result<()> + Send>;

/// The mounted overlay.
pub(super) struct Mount {
    pub(super) root: OwnedFd,
    unmount: Option<Unmount>,
}

/// The mount must be taken away before this entry (and what follows) can be applied.
#[derive(Debug, thiserror::Error)]
#[error("the writable layer cannot be changed below the mounted root filesystem: {why}")]
pub struct NeedsUnmount {
    /// What cannot be said through the mount.
    pub why: String,
}

impl Apply {
    /// The overlay is mounted at `merged` by now: from here on changes are made through it. Does nothing for a layer
    /// that is no overlay's. Between two rounds only.
    ///
    /// An entry that cannot be made that way has `unmount` called, which must take the mount away (and with it whoever
    /// uses it); the rest then goes into the layer itself, [`Stats::unmounted`](crate::rootfs::Stats::unmounted) tells of
    /// it, and the caller mounts anew.
    /// Without `unmount` the entry is refused with [`NeedsUnmount`] and can be applied again after [`Apply::unmounted`].
    ///
    /// # Errors
    /// Not a directory; the mount shows other owners than the layer has (idmapped), which is [`NeedsUnmount`].
    pub fn through(&mut self, merged: &Path, unmount: Option<Unmount>) -> Result<()> {
        ensure!(self.last.is_none(), "the layer was mounted in the middle of a round");
        if self.overlay == OverlayXattrs::None {
            return Ok(());
        }
        let root = open_root(merged).with_context(|| format!("opening {}", merged.display()))?;
        let (through, layer) = (fstat(&root)?, fstat(&self.upper)?);
        let owner = |s: &FileStat| (s.st_uid, s.st_gid, s.st_mode, s.st_mtime, s.st_mtime_nsec);
        if owner(&through) != owner(&layer) {
            let why = format!("{} does not show the layer's own owners", merged.display());
            return Err(NeedsUnmount { why }.into());
        }
        self.mount = Some(Mount { root, unmount });
        Ok(())
    }

    /// The overlay is no longer mounted.
    ///
    /// # Errors
    /// A directory that is being filled is not in the layer.
    pub fn unmounted(&mut self) -> Result<()> {
        self.mount = None;
        self.stats.unmounted = true;
        for at in 0..self.directories.len() {
            let path = &self.directories[at].path;
            let below = if path.is_empty() { b"." } else { &path[..] };
            let fd = sys::open_beneath(self.upper.as_fd(), below, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                .with_context(|| format!("opening \"{}\" again", path.escape_ascii()))?;
            self.directories[at].fd = fd;
        }
        Ok(())
    }

    /// Takes the mount away if the entry cannot be made through it.
    pub(super) fn may_go_through(&mut self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        if self.mount.is_none() {
            return Ok(());
        }
        let node = self.in_layer(path)?;
        let has = |name: &[u8]| {
            let (fd, _) = node.as_ref()?;
            Inode::of_path_fd(fd.as_fd()).xattr(&CString::new(name).ok()?).ok()?
        };
        match merged::cannot(kind, meta, self.overlay, has) {
            Some(why) => self.take_mount_away(why),
            None => Ok(()),
        }
    }

    pub(super) fn take_mount_away(&mut self, why: String) -> Result<()> {
        let Some(Mount { unmount: Some(unmount), .. }) = &mut self.mount else {
            return Err(NeedsUnmount { why }.into());
        };
        let mut unmount = std::mem::replace(unmount, Box::new(|_| Ok(())));
        // Nothing of ours may keep it busy: descriptors of the layer's directories take the place of the mount's.
        self.unmounted()?;
        unmount(&why).with_context(|| format!("unmounting the root filesystem, because {why}"))
    }

    /// What the layer itself has under a path, whatever the mount shows.
    pub(super) fn in_layer(&self, path: &[u8]) -> Result<Option<(OwnedFd, FileStat)>> {
        self.look(self.upper.as_fd(), path)
    }

    pub(super) fn is_opaque_in_layer(&self, path: &[u8]) -> bool {
        let Ok(Some((fd, _))) = self.in_layer(path) else { return false };
        let inode = Inode::of_path_fd(fd.as_fd());
        [c"trusted.overlay.opaque", c"user.overlay.opaque"]
            .iter()
            .any(|n| inode.xattr(n).is_ok_and(|v| v.as_deref() == Some(b"y")))
    }

    /// A removal that hid a name of the image must be followed by something else under it: the layer of the source hides
    /// nothing there.
    pub(super) fn uncover(&mut self, next: Option<&[u8]>) -> Result<()> {
        if self.hidden.as_deref() == next {
            self.hidden = None;
        }
        let Some(path) = self.hidden.clone() else { return Ok(()) };
        if self.mount.is_some() {
            self.take_mount_away("a name of the image shows through again".into())?;
        }
        self.hidden = None;
        let (dir, name) = entry::split(&path);
        let dir = if dir.is_empty() { b"." } else { dir };
        let dir = sys::open_beneath(self.upper.as_fd(), dir, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        sys::remove(dir.as_fd(), name, 0).context("removing a whiteout").map(drop)
    }
}
