//! A watched directory: every file that is made in it must be told.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

use transship_testtools::args::Args;

use crate::say;

pub fn run(args: &mut Args) -> Result<(), String> {
    let dir = args.position("DIR")?;
    let c_dir = std::ffi::CString::new(dir.as_str()).map_err(|e| e.to_string())?;
    // SAFETY: makes a descriptor that nobody else owns.
    let mut events = unsafe { fs::File::from_raw_fd(libc::inotify_init1(libc::IN_NONBLOCK)) };
    // SAFETY: the path ends with a NUL.
    let watch = unsafe { libc::inotify_add_watch(events.as_raw_fd(), c_dir.as_ptr(), libc::IN_CREATE) };
    if watch < 0 {
        return Err(format!("watching {dir}: {}", std::io::Error::last_os_error()));
    }
    say::rounds("inotify", args, |n| {
        let name = format!("file-{n}");
        fs::write(format!("{dir}/{name}"), "").map_err(|e| format!("{dir}/{name}: {e}"))?;
        let mut buffer = [0; 4096];
        let got = events.read(&mut buffer).unwrap_or(0);
        let told = buffer[..got].windows(name.len()).any(|w| w == name.as_bytes());
        Ok(format!("wrong={}", u8::from(!told)))
    })
}
