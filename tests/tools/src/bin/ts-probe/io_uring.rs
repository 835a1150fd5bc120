//! Holds an io_uring, which CRIU cannot dump: for the tests of that refusal.

use std::os::fd::{FromRawFd, OwnedFd};

use transship_testtools::args::Args;

use crate::say;

pub fn run(args: &Args) -> Result<(), String> {
    // struct io_uring_params (linux/io_uring.h) is 120 bytes; all zero asks for the defaults
    let mut params = [0u64; 15];
    // SAFETY: the kernel writes at most the 120 bytes that `params` has.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, params.as_mut_ptr()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(|| format!("io_uring_setup: {}", std::io::Error::last_os_error()))?;
    // SAFETY: the descriptor was just made and is ours alone.
    let _ring = unsafe { OwnedFd::from_raw_fd(fd) };
    say::rounds("io-uring", args, |_| Ok(format!("wrong=0 fd={fd}")))
}
