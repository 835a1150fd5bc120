//! Anything but a directory: unchanged, changed, new, or another name of an inode that was passed. What is in a file is
//! [`content`](crate::rootfs::staged::content)'s business.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Result;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use super::{Walk, join};
use crate::rootfs::entry::{self, Entry};
use crate::rootfs::read;
use crate::rootfs::staged::Known;
use crate::rootfs::stamp::{self, Seen, Stamp};
use crate::rootfs::sys::{self, Inode};

/// Paths and entries by inode of the source.
pub(super) type Index<'a> = HashMap<(u64, u64), Vec<(Vec<u8>, &'a Known)>>;

pub(super) struct Group {
    path: Vec<u8>,
    id: u64,
    stamp: Stamp,
}

impl<'a> Walk<'a> {
    /// An unchanged entry; none if the destination has it as another inode than the other names of this one.
    pub(super) fn still(&mut self, name: &[u8], old: &Known, stat: &FileStat) -> Result<Option<Known>> {
        let now = Stamp::of(stat);
        self.regular += u64::from(now.kind() == libc::S_IFREG);
        if now.nlink > 1 && !now.is_whiteout() {
            let path = self.path(name);
            let group = self.groups.entry(now.key).or_insert_with(|| Group { path, id: old.id, stamp: now });
            if group.id != old.id {
                return Ok(None);
            }
        }
        Ok(Some(Known { names: Vec::new(), ..*old }))
    }

    /// Anything but a directory, changed or new.
    pub(super) fn leaf(
        &mut self,
        node: BorrowedFd<'_>,
        stat: FileStat,
        name: &[u8],
        old: Option<&'a Known>,
    ) -> Result<Option<Known>> {
        let now = Stamp::of(&stat);
        let path = self.path(name);
        let same_kind = |o: &&Known| o.seen.stamp.key == now.key && o.seen.stamp.kind() == now.kind();
        let kept = old.filter(same_kind);
        let mut replaces_dir = old.is_some_and(Known::is_dir) && self.delta;
        let many = now.nlink > 1 && !(self.delta && now.is_whiteout());
        if many && let Some(group) = self.groups.get(&now.key) {
            let (id, target, same) = (group.id, group.path.clone(), group.stamp == now);
            if kept.is_none_or(|k| k.id != id) {
                self.replace(&path, &mut replaces_dir)?;
                self.need()?;
                self.send(Entry::Link { path, target })?;
            }
            // Another stamp: the inode changed since its first name was read, or is another one by now.
            let seen = Seen { settled: same && self.settled(&now), stamp: now };
            let (atime, meta) = (read::time(stat.st_atime, stat.st_atime_nsec), kept.map_or(0, |k| k.meta));
            return Ok(Some(Known { seen, atime, id, meta, marks: 0, names: Vec::new() }));
        }
        if now.kind() == libc::S_IFREG {
            let mut base = kept;
            if kept.is_none()
                && many
                && let Some((target, known)) = self.elsewhere(now.key, &path)
            {
                self.replace(&path, &mut replaces_dir)?;
                self.need()?;
                self.send(Entry::Link { path: path.clone(), target })?;
                base = Some(known);
            }
            if base.is_none() {
                self.replace(&path, &mut replaces_dir)?;
            }
            let Some(known) = self.file(node, &path, base)? else { return self.vanished(name, old) };
            if known.seen.stamp.nlink > 1 {
                let (id, stamp) = (known.id, known.seen.stamp);
                self.groups.insert(stamp.key, Group { path, id, stamp });
            }
            return Ok(Some(known));
        }
        let kind = read::special(node, &stat)?;
        let meta = read::meta(&stat, &Inode::of_path_fd(node), self.overlay, &mut self.stats)?;
        let hash = self.hash(&kind, &meta);
        let mut id = 0;
        match kept.filter(|k| k.meta == hash) {
            Some(kept) => id = kept.id,
            None => {
                self.replace(&path, &mut replaces_dir)?;
                self.need()?;
                self.send(Entry::Node { path: path.clone(), kind, meta })?;
            }
        }
        if id == 0 {
            id = self.new_id();
        }
        if many {
            self.groups.insert(now.key, Group { path, id, stamp: now });
        }
        let seen = Seen { stamp: now, settled: self.settled(&now) };
        let atime = read::time(stat.st_atime, stat.st_atime_nsec);
        Ok(Some(Known { seen, atime, id, meta: hash, marks: 0, names: Vec::new() }))
    }

    /// Tells the destination to remove the directory that a path was before.
    fn replace(&mut self, path: &[u8], was_dir: &mut bool) -> Result<()> {
        if std::mem::take(was_dir) {
            self.need()?;
            self.send(Entry::Remove { path: path.to_vec() })?;
        }
        Ok(())
    }

    /// Another name, still to come, that the destination holds this inode under.
    fn elsewhere(&mut self, key: (u64, u64), path: &[u8]) -> Option<(Vec<u8>, &'a Known)> {
        let old = self.old?;
        let index = self.index.get_or_insert_with(|| {
            let mut index = Index::new();
            let mut open = vec![(Vec::new(), old)];
            while let Some((path, known)) = open.pop() {
                for (name, child) in &known.names {
                    let path = join(&path, name);
                    if child.is_dir() {
                        open.push((path, child));
                    } else if child.seen.stamp.kind() == libc::S_IFREG {
                        index.entry(child.seen.stamp.key).or_default().push((path, child));
                    }
                }
            }
            index
        });
        let root = self.levels.first()?.fd.as_fd();
        let found = index.get(&key)?.iter().find(|(other, _)| {
            entry::order(other, path) == Ordering::Greater
                && sys::open_beneath(root, other, OFlag::O_PATH | OFlag::O_NOFOLLOW)
                    .is_ok_and(|fd| fstat(&fd).is_ok_and(|s| Stamp::of(&s).key == key))
        });
        found.map(|(path, known)| (path.clone(), *known))
    }
}

/// Whiteouts share one inode, whose change time and link count move with each of them.
pub(super) fn unchanged(old: &Known, stat: &FileStat) -> bool {
    let (was, now) = (&old.seen.stamp, Stamp::of(stat));
    if was.is_whiteout() && now.is_whiteout() {
        return (was.mode, was.owner, was.mtime) == (now.mode, now.owner, now.mtime);
    }
    let atime = read::time(stat.st_atime, stat.st_atime_nsec);
    !stamp::changed(&old.seen, &now) && (old.atime == atime || now.kind() != libc::S_IFREG)
}
