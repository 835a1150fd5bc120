//! Whether a file of a tmpfs may have been written without a trace in its times.
//!
//! A page of a tmpfs that is mapped shared and writable can be written without any fault if it was read before: the file's times stay. So
//! what counts is who could write: the kernel says when an open file that could be written to is closed for good (inotify's IN_CLOSE_WRITE,
//! which a mapping holds back as well), and whether any is open now (a read lease is refused then). What is neither was not written to
//! in between but by calls that move the times.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

/// Watches files for the end of whatever could write to them.
pub struct Watcher {
    inotify: Inotify,
    closed: HashSet<WatchDescriptor>,
    /// Events were lost: everything counts as closed.
    lost: bool,
}

/// One watched file.
#[derive(Debug)]
pub struct Watch(Option<WatchDescriptor>);

impl Watcher {
    pub fn new() -> Result<Watcher> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        Ok(Watcher { inotify, closed: HashSet::new(), lost: false })
    }

    /// Watches a file from now on. Where that is not possible (there is a limit), it is never trusted.
    pub fn watch(&self, file: &File) -> Watch {
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        Watch(self.inotify.add_watch(path.as_str(), AddWatchFlags::IN_CLOSE_WRITE).ok())
    }

    /// Takes note of what has happened so far.
    pub fn look(&mut self) {
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        self.lost |= event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                        self.closed.insert(event.wd);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(e) => {
                    log::warn!("watching the container's tmpfs files: {e}");
                    self.lost = true;
                    return;
                }
            }
        }
    }

    /// From here on only what comes later counts for this file.
    pub fn forget(&mut self, watch: &Watch) {
        self.look();
        watch.0.map(|wd| self.closed.remove(&wd));
    }

    /// May it have been written to since [`Watcher::forget`]? As of the last [`Watcher::look`].
    pub fn suspect(&self, watch: &Watch) -> bool {
        self.lost || watch.0.is_none_or(|wd| self.closed.contains(&wd))
    }

    /// It is watched no longer.
    pub fn drop_watch(&mut self, watch: &Watch) {
        if let Some(wd) = watch.0 {
            // a file that is gone has taken its watch with it
            self.inotify.rm_watch(wd).ok();
            self.closed.remove(&wd);
        }
    }
}

/// Is anything open that could write to this file, which is open for reading here? To be asked when nobody can open it: while the tasks
/// stand still.
pub fn open_for_writing(file: &File) -> bool {
    let lease = |kind: i32| {
        // SAFETY: F_SETLEASE takes a number; the descriptor is open.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }
    };
    if lease(libc::F_RDLCK) != 0 {
        return true;
    }
    lease(libc::F_UNLCK);
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn whoever_could_write_is_known() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"before").unwrap();
        let file = File::open(&path).unwrap();
        let mut watcher = Watcher::new().unwrap();
        let watch = watcher.watch(&file);
        let mut suspect = || {
            watcher.look();
            let s = watcher.suspect(&watch);
            watcher.forget(&watch);
            s
        };
        assert!(!suspect() && !open_for_writing(&file));
        // reading is nothing
        std::fs::read(&path).unwrap();
        assert!(!suspect());
        let writer = File::options().read(true).write(true).open(&path).unwrap();
        assert!(!suspect() && open_for_writing(&file), "open");
        // SAFETY: a new mapping of one page, unmapped below.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                writer.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        drop(writer);
        assert!(!suspect() && open_for_writing(&file), "mapped");
        // SAFETY: the mapping from above.
        unsafe { libc::munmap(at, 4096) };
        assert!(suspect() && !open_for_writing(&file), "closed for good");
        assert!(!suspect(), "only once");
        File::options().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        assert!(suspect());
    }

    #[test]
    fn what_cannot_be_watched_is_not_trusted() {
        assert!(Watcher::new().unwrap().suspect(&Watch(None)));
    }
}
