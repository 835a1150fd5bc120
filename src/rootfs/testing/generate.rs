//! Random changes to a directory tree through its file system, as the programs of a container would make them.
//!
//! A change that the file system refuses (a directory of the image cannot be renamed without `redirect_dir`, a chosen
//! name exists) is skipped: every case still makes dozens.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::Random;
use crate::rootfs::sys;

/// A tree to change.
pub struct Tree {
    root: PathBuf,
    names: u64,
}

impl Tree {
    /// The tree below `root`, whose new names are drawn from `rng`.
    pub fn new(root: &Path, rng: &mut Random) -> Self {
        Tree { root: root.to_owned(), names: rng.next() }
    }

    /// Makes `count` random changes and gives some of the result random attributes.
    pub fn change(&mut self, rng: &mut Random, count: u64) -> Result<()> {
        let mut done = 0;
        for _ in 0..count {
            done += u64::from(self.step(rng).is_ok());
        }
        ensure!(
            done * 3 + 12 > count,
            "only {done} of {count} random changes in {} worked",
            self.root.display()
        );
        for path in self.all()? {
            let depth_first = rng.once_in(3);
            if depth_first {
                attributes(&path, rng).with_context(|| format!("attributes of {}", path.display()))?;
            }
        }
        if rng.once_in(2) {
            attributes(&self.root, rng)?;
        }
        Ok(())
    }

    /// Sets inode flags on some files and directories. Nothing can be changed after that.
    pub fn protect(&self, rng: &mut Random) -> Result<()> {
        for path in self.all()? {
            let meta = fs::symlink_metadata(&path)?;
            if !(meta.is_dir() || meta.is_file()) || !rng.once_in(6) {
                continue;
            }
            let fd = File::open(&path)?;
            // immutable, append-only, nodump, noatime, sync
            let add = rng.pick(&[0x10, 0x20, 0x40, 0x80, 0x8, 0x30, 0x50]);
            // tmpfs and overlayfs do not know all of them.
            let _ = sys::flags(fd.as_fd()).and_then(|now| sys::set_flags(fd.as_fd(), now | add));
        }
        Ok(())
    }

    /// Everything below the root, parents first, in byte order.
    fn all(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut open = vec![self.root.clone()];
        while let Some(dir) = open.pop() {
            let names = fs::read_dir(&dir)?.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
            for path in names {
                if fs::symlink_metadata(&path)?.is_dir() {
                    open.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    fn some(&self, rng: &mut Random, want: impl Fn(&fs::Metadata) -> bool) -> Result<PathBuf> {
        let mut all = self.all()?;
        all.retain(|p| fs::symlink_metadata(p).is_ok_and(|m| want(&m)));
        ensure!(!all.is_empty(), "nothing of this kind");
        Ok(rng.pick(&all).clone())
    }

    fn some_dir(&self, rng: &mut Random) -> PathBuf {
        if rng.once_in(4) {
            return self.root.clone();
        }
        self.some(rng, |m| m.is_dir()).unwrap_or_else(|_| self.root.clone())
    }

    /// A new name in a random directory; now and then not UTF-8, 255 bytes long, or one that overlayfs or a shell could
    /// stumble over.
    fn new_path(&mut self, rng: &mut Random) -> PathBuf {
        self.names = self.names.wrapping_add(1);
        let mut name = format!("{:x}", self.names % 0xffff).into_bytes();
        match rng.below(12) {
            0 => name.extend(b"\xff\xfe\x80"),
            1 => name.resize(255, b'n'),
            2 => name.extend(b" \n\t\\\"'"),
            3 => name.splice(0..0, *b".wh.").for_each(drop),
            4 => name.splice(0..0, *b"-").for_each(drop),
            5 => name.push(*rng.pick(b"!.~")),
            _ => {}
        }
        self.some_dir(rng).join(std::ffi::OsStr::from_bytes(&name))
    }

    fn step(&mut self, rng: &mut Random) -> Result<()> {
        match rng.below(27) {
            0..=4 => write(&self.new_path(rng), rng)?,
            5 | 6 => write(&self.some(rng, fs::Metadata::is_file)?, rng)?,
            7..=9 => fs::create_dir(self.new_path(rng))?,
            10 => sparse(&self.new_path(rng), rng)?,
            11 => sparse(&self.some(rng, fs::Metadata::is_file)?, rng)?,
            12 => {
                let file = OpenOptions::new().write(true).open(self.some(rng, fs::Metadata::is_file)?)?;
                file.set_len(rng.below(20_000))?;
            }
            13 | 14 => fs::remove_file(self.some(rng, |m| !m.is_dir())?)?,
            15 => {
                // Deleted and made again: opaque if the image has one.
                let dir = self.some(rng, fs::Metadata::is_dir)?;
                fs::remove_dir_all(&dir)?;
                if rng.below(3) > 0 {
                    fs::create_dir(&dir)?;
                    if rng.once_in(2) {
                        write(&dir.join("again"), rng)?;
                    }
                }
            }
            16 | 17 => fs::rename(self.some(rng, |_| true)?, self.new_path(rng))?,
            18 => fs::rename(self.some(rng, fs::Metadata::is_file)?, self.some(rng, fs::Metadata::is_file)?)?,
            // With `redirect_dir` those of the image too.
            22..=24 => fs::rename(self.some(rng, fs::Metadata::is_dir)?, self.new_path(rng))?,
            19 => {
                let target = match rng.below(4) {
                    0 => PathBuf::from("/etc/passwd"),
                    1 => PathBuf::from("../".repeat(1 + rng.below(600) as usize)),
                    2 => PathBuf::from(std::ffi::OsStr::from_bytes(b"\xff\xfe missing")),
                    _ => self.some(rng, |_| true)?,
                };
                std::os::unix::fs::symlink(target, self.new_path(rng))?;
            }
            20 | 21 => {
                let target = self.some(rng, |m| !m.is_dir())?;
                nix::unistd::linkat(
                    nix::fcntl::AT_FDCWD,
                    &target,
                    nix::fcntl::AT_FDCWD,
                    &self.new_path(rng),
                    nix::fcntl::AtFlags::empty(),
                )?;
            }
            _ => {
                let (kind, device) = match rng.below(5) {
                    0 => (SFlag::S_IFIFO, 0),
                    1 => (SFlag::S_IFSOCK, 0),
                    2 => (SFlag::S_IFCHR, makedev(1, 3)),
                    3 => (SFlag::S_IFCHR, makedev(rng.below(4096), rng.below(1 << 20).max(1))),
                    _ => (SFlag::S_IFBLK, makedev(7, rng.below(1 << 20))),
                };
                mknod(&self.new_path(rng), kind, Mode::from_bits_truncate(0o640), device)?;
            }
        }
        Ok(())
    }
}

fn write(path: &Path, rng: &mut Random) -> Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(rng.once_in(2)).open(path)?;
    let size = *rng.pick(&[0, 1, 100, 4095, 4096, 4097, 70_000, 1_500_000]);
    let salt = rng.next();
    let bytes: Vec<u8> =
        if rng.once_in(5) { vec![0; size] } else { (0..size).map(|i| (i as u64 ^ salt) as u8).collect() };
    file.write_all_at(&bytes, if rng.once_in(3) { rng.below(9000) } else { 0 })?;
    Ok(())
}

fn sparse(path: &Path, rng: &mut Random) -> Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    file.set_len(*rng.pick(&[4096, 10_000, 1 << 20, 3 << 30, (1 << 40) + 5]))?;
    for _ in 0..rng.below(4) {
        let bytes = vec![rng.next() as u8; *rng.pick(&[1, 4096, 9000])];
        file.write_all_at(&bytes, rng.below(8 << 20))?;
    }
    Ok(())
}

fn attributes(path: &Path, rng: &mut Random) -> Result<()> {
    let meta = fs::symlink_metadata(path)?;
    let link = meta.is_symlink();
    for _ in 0..1 + rng.below(3) {
        match rng.below(5) {
            0 => {
                let id = |rng: &mut Random| *rng.pick(&[0, 1, 1000, 65_534, 3_000_000_000]);
                std::os::unix::fs::lchown(path, Some(id(rng)), Some(id(rng)))?;
            }
            1 if !link => fs::set_permissions(path, fs::Permissions::from_mode(rng.below(0o10000) as u32))?,
            2 | 3 => xattr(path, &meta, rng)?,
            _ => {
                // Before 1970, after 2038, to the nanosecond; within what tmpfs and ext4 with 128-byte inodes keep apart.
                let time = |rng: &mut Random| {
                    let secs = *rng.pick(&[-1_000_000_000, -1, 0, 1, 1_700_000_000, 4_000_000_000]);
                    TimeSpec::new(secs, rng.below(1_000_000_000) as i64)
                };
                utimensat(
                    nix::fcntl::AT_FDCWD,
                    path,
                    &time(rng),
                    &time(rng),
                    UtimensatFlags::NoFollowSymlink,
                )?;
            }
        }
    }
    Ok(())
}

fn xattr(path: &Path, meta: &fs::Metadata, rng: &mut Random) -> Result<()> {
    let plain = meta.is_file() || meta.is_dir();
    let (name, value): (&str, Vec<u8>) = match rng.below(8) {
        0 | 1 if plain => ("user.note", rng.bytes(600)),
        2 if plain => ("user.\u{e4}", vec![]),
        // Two pages do not fit ext4's inode: skipped there, moved on tmpfs.
        3 if plain => ("user.large", vec![b'l'; *rng.pick(&[1500, 3000, 9000])]),
        // VFS_CAP_REVISION_2, effective, cap_net_bind_service; and revision 3 with a root id (linux/capability.h).
        4 if meta.is_file() && rng.once_in(2) => {
            ("security.capability", [1, 0, 0, 2, 0, 4, 0, 0].iter().copied().chain([0; 12]).collect())
        }
        4 if meta.is_file() => (
            "security.capability",
            [1, 0, 0, 3, 0, 4, 0, 0].iter().copied().chain([0; 12]).chain(100_000u32.to_le_bytes()).collect(),
        ),
        5 if plain => ("system.posix_acl_access", acl(rng)),
        6 if meta.is_dir() => ("system.posix_acl_default", acl(rng)),
        _ => ("trusted.note", rng.bytes(50)),
    };
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    let c_name = CString::new(name)?;
    // SAFETY: both strings end with a NUL; the value is valid for its length.
    let n =
        unsafe { libc::lsetxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    match Errno::result(n) {
        Ok(_) => Ok(()),
        // Too large for this filesystem; a namespace that it (tmpfs before Linux 6.6, an overlay) does not have.
        Err(Errno::ENOSPC | Errno::ERANGE | Errno::EOPNOTSUPP | Errno::EPERM) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("{name} of {} bytes", value.len())),
    }
}

/// A POSIX ACL with one named user (acl(5); version 2 as in linux/posix_acl_xattr.h).
fn acl(rng: &mut Random) -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let user = 1000 + rng.below(3) as u32;
    for (tag, id) in [(0x01u16, NO_ID), (0x02, user), (0x04, NO_ID), (0x10, NO_ID), (0x20, NO_ID)] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend((rng.below(8) as u16).to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
