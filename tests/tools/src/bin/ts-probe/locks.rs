//! File locks of every kind, held for good; a child finds out each round that they are.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use transship_testtools::args::Args;

use crate::say;

/// Which kind of lock; each on a file of its own.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// flock(2), exclusive.
    Flock,
    /// flock(2), shared: another reader gets one too, a writer does not.
    FlockShared,
    /// fcntl(2), a range, for writing.
    Posix,
    /// fcntl(2), owned by the open file description.
    Ofd,
}

const ALL: [Kind; 4] = [Kind::Flock, Kind::FlockShared, Kind::Posix, Kind::Ofd];

impl Kind {
    /// Takes the lock, or says who cannot: 0 or an errno.
    fn take(self, file: &File, shared: bool) -> i32 {
        let fd = file.as_raw_fd();
        let mut range = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 10,
            l_len: 20,
            l_pid: 0,
        };
        // SAFETY: the descriptor lives through the call, and so does the range that fcntl reads.
        let rc = unsafe {
            match self {
                Kind::Flock | Kind::FlockShared => {
                    libc::flock(fd, libc::LOCK_NB | if shared { libc::LOCK_SH } else { libc::LOCK_EX })
                }
                Kind::Posix => libc::fcntl(fd, libc::F_SETLK, &mut range),
                Kind::Ofd => libc::fcntl(fd, libc::F_OFD_SETLK, &mut range),
            }
        };
        if rc == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
    }
}

pub fn run(args: &mut Args) -> Result<(), String> {
    let dir = args.position("DIR")?;
    let path = |kind: Kind| format!("{dir}/{kind:?}");
    let open = |kind: Kind| {
        let options = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path(kind));
        options.map_err(|e| format!("{}: {e}", path(kind)))
    };
    let mut held = Vec::new();
    for kind in ALL {
        let file = open(kind)?;
        match kind.take(&file, matches!(kind, Kind::FlockShared)) {
            0 => held.push(file),
            e => return Err(format!("{kind:?}: {}", std::io::Error::from_raw_os_error(e))),
        }
    }
    say::rounds("locks", args, |_| {
        let mut missing = String::new();
        // our own POSIX locks never stand in our own way, and closing a file drops them: a child asks
        for kind in ALL {
            // SAFETY: the process has one thread; the child only makes system calls and ends.
            match unsafe { libc::fork() } {
                0 => {
                    let taken = open(kind).map(|f| kind.take(&f, false)).unwrap_or(0);
                    let refused = [libc::EAGAIN, libc::EACCES].contains(&taken);
                    // SAFETY: ends the child at once, without its parent's destructors.
                    unsafe { libc::_exit(i32::from(!refused)) }
                }
                pid => {
                    let mut status = 0;
                    // SAFETY: `status` is valid for the call.
                    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 {}
                    if status != 0 {
                        missing += &format!(",{kind:?}");
                    }
                }
            }
        }
        let wrong = missing.matches(',').count();
        Ok(format!("wrong={wrong} held={} missing={}", held.len(), missing.trim_start_matches(',')))
    })
}
