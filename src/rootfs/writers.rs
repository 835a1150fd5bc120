//! Which files of the layer a container's tasks may be writing: open for writing, or mapped shared and writable.
//!
//! The kernel shows the paths as the container sees them; they are looked up again below the layer. A name too many
//! (something else is mounted over it) costs a file read once more, nothing else.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat, makedev};
use nix::time::{ClockId, clock_gettime};

use super::entry::Time;
use super::layer::WritableLayer;
use super::sys;
use crate::memory::maps;

/// The files, by filesystem and inode number of the layer's own directory.
#[derive(Clone, Debug, Default)]
pub struct Writers {
    /// When the look began, by the clock that files are stamped with.
    pub since: Time,
    /// Open for writing.
    pub open: HashSet<(u64, u64)>,
    /// Mapped shared and writable: their times tell nothing.
    pub mapped: HashSet<(u64, u64)>,
    /// Nobody was asked: any file may be open.
    unknown: bool,
}

impl Writers {
    /// Nobody is known; every file counts as open for writing, none as mapped.
    pub fn unknown() -> Writers {
        Writers { since: now(), unknown: true, ..Writers::default() }
    }

    /// Nobody writes: the tasks are frozen and none has a file of the layer mapped, or there are none.
    pub fn none() -> Writers {
        Writers { since: now(), ..Writers::default() }
    }

    /// Asks the kernel about these tasks (thread group leaders; threads share what they have open, or are listed
    /// themselves). A task that has ended meanwhile writes no more.
    ///
    /// # Errors
    /// The layer cannot be opened.
    pub fn of_tasks(pids: &[i32], layer: &WritableLayer) -> Result<Writers> {
        let mut writers = Writers::none();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(&layer.dir, flags, Mode::empty())
            .with_context(|| format!("opening {}", layer.dir.display()))?;
        for pid in pids {
            let proc = Path::new("/proc").join(pid.to_string());
            if let Ok(maps) = std::fs::read(proc.join("maps")) {
                for path in maps.split(|b| *b == b'\n').filter_map(shared_writable) {
                    writers.mapped.extend(look_up(root.as_fd(), &path));
                }
            }
            let Ok(fds) = std::fs::read_dir(proc.join("fd")) else { continue };
            for fd in fds.flatten() {
                let Ok(path) = std::fs::read_link(fd.path()) else { continue };
                // Sockets and pipes have no path. The link's own mode says how the file is open (proc_pid_fd(5)).
                let path = path.as_os_str().as_bytes();
                if path.starts_with(b"/") && fd.metadata().is_ok_and(|m| m.mode() & 0o200 != 0) {
                    writers.open.extend(look_up(root.as_fd(), path));
                }
            }
        }
        Ok(writers)
    }

    /// The same for whole file systems that the tasks see as they are, without an overlay: by the kernel's own numbers, so
    /// that deleted names and other mount namespaces count too.
    pub fn of_devices(pids: &[i32], devices: &HashSet<u64>) -> Writers {
        let mut writers = Writers::none();
        for pid in pids {
            for map in maps::mappings(*pid).unwrap_or_default() {
                let device = makedev(map.dev.0.into(), map.dev.1.into());
                if map.shared && map.write && devices.contains(&device) {
                    writers.mapped.insert((device, map.inode));
                }
            }
            let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
            for fd in fds.flatten().filter(|fd| fd.metadata().is_ok_and(|m| m.mode() & 0o200 != 0)) {
                let Ok(file) = std::fs::metadata(fd.path()) else { continue };
                if file.is_file() && devices.contains(&file.dev()) {
                    writers.open.insert((file.dev(), file.ino()));
                }
            }
        }
        writers
    }

    /// Whether an inode is open for writing, and whether it is mapped for it.
    pub fn of(&self, key: (u64, u64)) -> (bool, bool) {
        let mapped = self.mapped.contains(&key);
        (self.unknown || mapped || self.open.contains(&key), mapped)
    }
}

/// Time by the coarse clock, which is what files are stamped with.
fn now() -> Time {
    let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE);
    now.map_or(Time::default(), |t| Time { secs: t.tv_sec(), nanos: t.tv_nsec() as u32 })
}

/// The path of a line of /proc/pid/maps, if it is a shared mapping that can be written. One that mprotect(2) makes
/// writable later faults at its first write, which moves the file's times; one that no longer is was so at the walk before.
pub(crate) fn shared_writable(line: &[u8]) -> Option<Vec<u8>> {
    let mut fields = line.splitn(6, |b| *b == b' ');
    let mode = fields.nth(1)?;
    let path = fields.nth(3)?.trim_ascii_start();
    if mode.get(1) != Some(&b'w') || mode.get(3) != Some(&b's') || !path.starts_with(b"/") {
        return None;
    }
    Some(unescape(path))
}

/// The kernel writes a newline as `\012`.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            out.push(b'\n');
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

fn look_up(root: BorrowedFd<'_>, path: &[u8]) -> Option<(u64, u64)> {
    let below = path.strip_prefix(b"/")?;
    let fd = sys::open_beneath(root, below, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok()?;
    let stat = fstat(&fd).ok()?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFREG).then_some((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::LayerKind;

    #[test]
    fn lines_of_maps() {
        let path = |line: &str| shared_writable(line.as_bytes()).map(|p| String::from_utf8(p).unwrap());
        let line = |mode: &str, path: &str| {
            format!("7f0-7f1 {mode} 00000000 fe:00 123                        {path}")
        };
        assert_eq!(path(&line("rw-s", "/var/a b")).as_deref(), Some("/var/a b"));
        assert_eq!(path(&line("-w-s", "/a\\012b")).as_deref(), Some("/a\nb"));
        assert_eq!(path(&line("r--s", "/a")), None);
        assert_eq!(path(&line("rw-p", "/a")), None);
        assert_eq!(path("7f0-7f1 rw-s 00000000 00:00 0 "), None);
        assert_eq!(path(""), None);
    }

    #[test]
    fn what_a_task_holds_is_found() {
        // A layer whose paths are those of the task's root.
        let layer = WritableLayer { dir: "/".into(), kind: LayerKind::Full };
        let dir = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
        let path = |name: &str| dir.path().join(name);
        let key = |name: &str| std::fs::metadata(path(name)).map(|m| (m.dev(), m.ino())).unwrap();
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(path("w")).unwrap();
        file.set_len(4096).unwrap();
        std::fs::write(path("r"), "x").unwrap();
        let _reader = std::fs::File::open(path("r")).unwrap();
        let look = || Writers::of_tasks(&[std::process::id() as i32, i32::MAX], &layer).unwrap();
        assert_eq!(look().of(key("w")), (true, false));
        assert_eq!(look().of(key("r")), (false, false));
        // SAFETY: a fresh mapping of a file that is ours, unmapped below.
        let map = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(map, libc::MAP_FAILED);
        drop(file);
        assert_eq!(look().of(key("w")), (true, true));
        // SAFETY: mapped above, no reference into it.
        assert_eq!(unsafe { libc::munmap(map, 4096) }, 0);
        assert_eq!(look().of(key("w")), (false, false));
    }
}
