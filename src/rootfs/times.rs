//! CRIU makes (and removes) directories of its own in the container's `/tmp`, or in `/` where there is none, to look below
//! mounts (`cr-tmpfs.*`, `get_clean_mnt` in its mount.c), at the dump and at the restore. The times of both are kept over
//! that, so that the container finds them as it left them.

use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{FileStat, UtimensatFlags, fstatat, utimensat};
use nix::sys::time::TimeSpec;

/// The times of a root's directories in which CRIU works. Dropping it puts them back as well.
pub struct KeptTimes(Vec<(PathBuf, FileStat)>);

impl KeptTimes {
    /// Remembers them. `rootfs` is mounted; the tasks do not run.
    pub fn of(rootfs: &Path) -> KeptTimes {
        let look = |path: PathBuf| {
            let stat = fstatat(AT_FDCWD, &path, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
            (stat.st_mode & libc::S_IFMT == libc::S_IFDIR).then_some((path, stat))
        };
        KeptTimes([rootfs.to_owned(), rootfs.join("tmp")].into_iter().filter_map(look).collect())
    }

    /// Puts back those that changed. A root that cannot be written was not changed either.
    pub fn put_back(&self) {
        for (path, was) in &self.0 {
            let times = |s: &FileStat| {
                (TimeSpec::new(s.st_atime, s.st_atime_nsec), TimeSpec::new(s.st_mtime, s.st_mtime_nsec))
            };
            let follow = UtimensatFlags::NoFollowSymlink;
            let (atime, mtime) = times(was);
            let result = fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW).and_then(|now| {
                if times(&now).1 == mtime {
                    Ok(())
                } else {
                    utimensat(AT_FDCWD, path, &atime, &mtime, follow)
                }
            });
            if let Err(e) = result {
                log::debug!("putting the times of {} back: {e}", path.display());
            }
        }
    }
}

impl Drop for KeptTimes {
    fn drop(&mut self) {
        self.put_back();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn work_in_tmp_leaves_no_trace() {
        let root = tempfile::tempdir().unwrap();
        let tmp = root.path().join("tmp");
        fs::create_dir(&tmp).unwrap();
        let times = || [root.path(), &tmp].map(|p| fs::metadata(p).unwrap().modified().unwrap());
        let before = times();
        let kept = KeptTimes::of(root.path());
        fs::create_dir(tmp.join("cr-tmpfs.1")).unwrap();
        fs::remove_dir(tmp.join("cr-tmpfs.1")).unwrap();
        fs::write(root.path().join("x"), "").unwrap();
        assert_ne!(times(), before);
        drop(kept);
        assert_eq!(times(), before);
    }
}
