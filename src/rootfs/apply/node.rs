//! What is made under a name: every kind of entry, and what goes first because it was there before. Attributes of files and
//! directories come later, see [`super::filled`].

use std::cmp::Ordering;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{ftruncate, linkat, symlinkat};

use super::filled::{Directory, File, is_below};
use super::{Apply, attributes, merged};
use crate::rootfs::entry::{self, Kind, MAX_DEPTH, Meta};
use crate::rootfs::sys::{self, Inode};
use crate::rootfs::xattr::is_leftover;

impl Apply {
    pub(super) fn node(&mut self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        if path.is_empty() {
            return self.root_entry(meta);
        }
        self.room.entry(self.upper.as_fd())?;
        if let (Some(nodes), Some((block, major, minor))) = (&self.nodes, kind.device()) {
            ensure!(
                nodes(block, major, minor),
                "the device {} {major}:{minor}, which this node's policy does not allow: `devices` in the section \
                 [policy] of its agent.toml would",
                if block { 'b' } else { 'c' }
            );
        }
        self.may_go_through(path, kind, meta)?;
        match kind {
            Kind::Directory => return self.directory(path, meta),
            Kind::Patch { size } => return self.patch(path, *size, meta),
            _ => {}
        }
        if self.delta {
            self.make_way(path)?;
        }
        let name = entry::split(path).1;
        let through = self.mount.as_ref().map(|_| merged::seen_through(meta, self.overlay));
        let parent = self.parent(path)?;
        let make = |kind: SFlag, device: libc::dev_t| {
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknodat(parent, name, kind, mode, device).context("creating the node")?;
            attributes::set_by_name(parent, name, through.as_ref().unwrap_or(meta), true)
        };
        match kind {
            Kind::Directory | Kind::Patch { .. } => unreachable!("handled above"),
            Kind::File { size } => {
                let fd = sys::create_file(parent, name).context("creating the file")?;
                ftruncate(&fd, *size as libc::off_t)
                    .with_context(|| format!("making a file of {size} bytes"))?;
                self.file = Some(File::new(path, fd, *size, meta, false));
            }
            Kind::Symlink { target } => {
                symlinkat(target.as_slice(), parent, name).context("creating the symlink")?;
                attributes::set_by_name(parent, name, through.as_ref().unwrap_or(meta), false)?;
            }
            Kind::Fifo => make(SFlag::S_IFIFO, 0)?,
            Kind::Socket => make(SFlag::S_IFSOCK, 0)?,
            // The mount has left one of its own if there is anything to hide.
            Kind::Whiteout if self.mount.is_some() => {}
            Kind::Whiteout => make(SFlag::S_IFCHR, 0)?,
            Kind::CharDevice { major, minor } => {
                make(SFlag::S_IFCHR, makedev((*major).into(), (*minor).into()))?;
            }
            Kind::BlockDevice { major, minor } => {
                make(SFlag::S_IFBLK, makedev((*major).into(), (*minor).into()))?;
            }
        }
        Ok(())
    }

    fn root_entry(&mut self, meta: &Meta) -> Result<()> {
        let fd = sys::open_beneath(self.root(), b".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        if self.delta {
            prepare(fd.as_fd()).context("preparing the root")?;
        } else {
            let inode = Inode::Open(fd.as_fd());
            for name in inode.xattr_names()? {
                if is_leftover(name.to_bytes(), self.overlay) {
                    inode.remove_xattr(&name).with_context(|| format!("removing {name:?}"))?;
                }
            }
        }
        self.directories.push(Directory { path: Vec::new(), fd, meta: meta.clone(), reused: true });
        Ok(())
    }

    fn directory(&mut self, path: &[u8], meta: &Meta) -> Result<()> {
        let name = entry::split(path).1;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut there = None;
        if self.delta {
            // One that is opaque is none of the image's.
            let other = self.mount.is_some() && merged::is_opaque(meta) && !self.is_opaque_in_layer(path);
            let node = if other { None } else { self.look(self.parent(path)?, name)? };
            match node {
                Some((_, stat)) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {
                    let fd = sys::open_beneath(self.parent(path)?, name, flags)?;
                    prepare(fd.as_fd()).context("preparing the directory")?;
                    there = Some(fd);
                }
                _ => self.make_way(path)?,
            }
        }
        let reused = there.is_some();
        let fd = match there {
            Some(fd) => fd,
            None => {
                let parent = self.parent(path)?;
                mkdirat(parent, name, Mode::S_IRWXU).context("creating the directory")?;
                sys::open_beneath(parent, name, flags)?
            }
        };
        self.directories.push(Directory { path: path.to_vec(), fd, meta: meta.clone(), reused });
        Ok(())
    }

    fn patch(&mut self, path: &[u8], size: u64, meta: &Meta) -> Result<()> {
        ensure!(self.delta, "a change to a file in the first round");
        let name = entry::split(path).1;
        let is_file = |n: &(OwnedFd, FileStat)| n.1.st_mode & libc::S_IFMT == libc::S_IFREG;
        // Not the image's file, which would be copied up.
        ensure!(
            self.in_layer(path)?.as_ref().is_some_and(is_file),
            "a change to a file that did not come before"
        );
        let Some((node, _)) = self.look(self.parent(path)?, name)?.filter(is_file) else {
            bail!("a change to something that is no file")
        };
        sys::clear_protection(sys::reopen(node.as_fd(), OFlag::O_RDONLY)?.as_fd())?;
        let fd = sys::reopen(node.as_fd(), OFlag::O_WRONLY).context("opening the file")?;
        ftruncate(&fd, size as libc::off_t).with_context(|| format!("making a file of {size} bytes"))?;
        self.file = Some(File::new(path, fd, size, meta, true));
        Ok(())
    }

    pub(super) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        // In the first round everything below the root was made by this stream; openat2 takes no symlink on the way.
        let node = sys::open_beneath(self.root(), target, OFlag::O_PATH | OFlag::O_NOFOLLOW)
            .with_context(|| format!("opening \"{}\" to link to it", target.escape_ascii()))?;
        if self.delta {
            self.make_way(path)?;
        } else {
            ensure!(entry::order(target, path) == Ordering::Less, "a hard link to a name that comes later");
        }
        let name = entry::split(path).1;
        let parent = self.parent(path)?;
        match linkat(&node, c"", parent, name, AtFlags::AT_EMPTY_PATH) {
            Ok(()) => Ok(()),
            // The filesystems differ in how many names an inode may have; overlayfs shares one whiteout among many, and
            // whiteouts are all alike.
            Err(Errno::EMLINK) => {
                let stat = fstat(&node)?;
                ensure!(
                    stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == 0,
                    "the destination's filesystem allows no more hard links to \"{}\"",
                    target.escape_ascii()
                );
                let mode = Mode::from_bits_truncate(stat.st_mode);
                mknodat(parent, name, SFlag::S_IFCHR, mode, 0).context("creating a whiteout")
            }
            Err(e) => Err(e).with_context(|| format!("linking to \"{}\"", target.escape_ascii())),
        }
    }

    pub(super) fn remove(&mut self, path: &[u8]) -> Result<()> {
        ensure!(self.delta, "a removal in the first round");
        let is_whiteout = |node: Option<(OwnedFd, FileStat)>| {
            node.is_some_and(|(_, s)| s.st_mode & libc::S_IFMT == libc::S_IFCHR && s.st_rdev == 0)
        };
        if self.mount.is_some() && is_whiteout(self.in_layer(path)?) {
            self.take_mount_away("a name of the image is no longer hidden".into())?;
        }
        self.make_way(path)?;
        if self.mount.is_some() && is_whiteout(self.in_layer(path)?) {
            self.hidden = Some(path.to_vec());
        }
        Ok(())
    }

    /// Removes what is under a name.
    fn make_way(&mut self, path: &[u8]) -> Result<()> {
        sys::remove(self.parent(path)?, entry::split(path).1, MAX_DEPTH * 2)
            .context("removing what was there before")?;
        let gone: Vec<_> = self
            .protected
            .range(path.to_vec()..)
            .map(|(p, _)| p)
            .take_while(|p| p.starts_with(path))
            .filter(|p| *p == path || is_below(p, path))
            .cloned()
            .collect();
        gone.iter().for_each(|p| {
            self.protected.remove(p);
        });
        Ok(())
    }

    pub(super) fn look(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<Option<(OwnedFd, FileStat)>> {
        match sys::open_beneath(dir, path, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Ok(fd) => {
                let stat = fstat(&fd)?;
                Ok(Some((fd, stat)))
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(e).context("looking for what is there"),
        }
    }

    /// The open directory that `path` goes into.
    fn parent(&self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        let (parent, _) = entry::split(path);
        let top = self.directories.last().filter(|d| d.path == parent);
        let Some(top) = top else { bail!("its directory was not sent before it") };
        Ok(top.fd.as_fd())
    }
}

/// Makes a directory that is there ready to be filled: through a mount this copies it up from the image.
fn prepare(fd: BorrowedFd<'_>) -> Result<()> {
    sys::clear_protection(fd)?;
    fchmod(fd, Mode::S_IRWXU)?;
    let inode = Inode::Open(fd);
    for name in inode.xattr_names()? {
        // Children would inherit it.
        if name.to_bytes() == b"system.posix_acl_default" {
            inode.remove_xattr(&name)?;
        }
    }
    Ok(())
}
