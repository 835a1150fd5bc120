//! What an inode looked like at a walk, and whether a later look tells that it may have changed. Pure.
//!
//! Every change of an inode moves its change time, which no program can set. Three things hide a change from it:
//! - **the clock's grain**: kernels before 6.13 stamp with the time of the last tick (1 to 10 ms), old filesystems with
//!   whole seconds, so that a change after the look can carry the time from before it;
//! - **writes in flight**: the kernel takes the time at the *start* of a write, which may still be copying;
//! - **shared mappings**: only the first write to a clean page of a mapping moves the time.
//!
//! What was stamped shortly before the walk began, or later, or may be written through a mapping, is therefore not
//! [`settled`]: the next walk compares its content, whatever its times say.

use nix::sys::stat::FileStat;

use super::entry::Time;

/// An inode's attributes as stat(2) tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Filesystem and inode number.
    pub key: (u64, u64),
    /// Type and permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Names.
    pub nlink: u64,
    /// Device number.
    pub rdev: u64,
    /// Bytes.
    pub size: u64,
    /// Last write.
    pub mtime: Time,
    /// Last change of any kind.
    pub ctime: Time,
}

impl Stamp {
    /// From stat(2).
    pub fn of(stat: &FileStat) -> Stamp {
        Stamp {
            key: (stat.st_dev, stat.st_ino),
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
            nlink: stat.st_nlink as _,
            rdev: stat.st_rdev,
            size: stat.st_size as u64,
            mtime: Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
            ctime: Time { secs: stat.st_ctime, nanos: stat.st_ctime_nsec as u32 },
        }
    }

    /// The type's bits of the mode.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// overlayfs' mark of a deleted name.
    pub fn is_whiteout(&self) -> bool {
        self.kind() == libc::S_IFCHR && self.rdev == 0
    }
}

/// How long before the walk a change time must lie to be trusted: two ticks of the slowest clock (100 Hz).
const GRAIN: i64 = 20_000_000;
/// The same for a file that somebody has open for writing: a write that began then has ended (the largest single one,
/// 2 GiB, waits for the inode's lock, which reading takes as well on ext4, XFS, btrfs and tmpfs; direct writes do not).
const OPEN: i64 = 1_000_000_000;
/// The same where the time has no nanoseconds: filesystems that store whole or even seconds.
const COARSE: i64 = 2_000_000_000;

/// May a time be trusted that was read after `walk_started` (of the clock that files are stamped with)? `open`: the file
/// is open for writing.
pub fn settled(ctime: Time, walk_started: Time, open: bool) -> bool {
    let margin = match (ctime.nanos, open) {
        (0, _) => COARSE,
        (_, true) => OPEN,
        (_, false) => GRAIN,
    };
    let nanos = |t: Time| i128::from(t.secs) * 1_000_000_000 + i128::from(t.nanos);
    nanos(ctime) + i128::from(margin) < nanos(walk_started)
}

/// A stamp and whether it can be trusted.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// What was seen.
    pub stamp: Stamp,
    /// No change since can have left the stamp as it is.
    pub settled: bool,
}

/// Must the inode be read again?
pub fn changed(before: &Seen, now: &Stamp) -> bool {
    before.stamp != *now || !before.settled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64, nanos: u32) -> Time {
        Time { secs, nanos }
    }

    fn stamp() -> Stamp {
        Stamp { key: (1, 2), mode: 0o100_644, nlink: 1, size: 7, ctime: at(100, 5), ..Stamp::default() }
    }

    #[test]
    fn any_attribute_counts() {
        let before = stamp();
        let seen = Seen { stamp: before, settled: true };
        assert!(!changed(&seen, &before));
        assert!(changed(&Seen { settled: false, ..seen }, &before));
        let different = [
            Stamp { key: (1, 3), ..before },
            Stamp { mode: 0o100_600, ..before },
            Stamp { owner: (1, 0), ..before },
            Stamp { nlink: 2, ..before },
            Stamp { rdev: 1, ..before },
            Stamp { size: 8, ..before },
            Stamp { mtime: at(1, 0), ..before },
            // backwards too: somebody set the clock
            Stamp { ctime: at(99, 5), ..before },
        ];
        for now in different {
            assert!(changed(&seen, &now), "{now:?}");
        }
    }

    #[test]
    fn what_was_fresh_at_the_walk_is_read_again() {
        let same = |walk, open| settled(stamp().ctime, walk, open);
        assert!(!same(at(100, 5), false), "the same tick");
        assert!(!same(at(99, 0), false), "after the walk began");
        assert!(!same(at(100, 20_000_005), false));
        assert!(same(at(100, 20_000_006), false));
        assert!(!same(at(101, 5), true), "a write may have been in flight");
        assert!(same(at(101, 6), true));
        assert!(!settled(at(100, 0), at(102, 0), false), "a clock of two seconds");
        assert!(settled(at(100, 0), at(102, 1), false));
    }
}
