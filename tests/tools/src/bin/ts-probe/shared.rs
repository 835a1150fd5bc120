//! Memory that two processes share, in the three ways there are: an anonymous mapping inherited by fork, a file in /dev/shm, and
//! a System V segment. A number written by one has to be seen by the other.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use transship_testtools::args::Args;

use crate::{say, tree};

const SIZE: usize = 1 << 20;

/// Where the question, and where the answer is: on different pages.
const PLACES: [usize; 2] = [0, SIZE / 2];

/// # Safety
/// `at` must point to `SIZE` mapped bytes that stay mapped.
unsafe fn words(at: *mut libc::c_void) -> [&'static AtomicU64; 2] {
    // SAFETY: in bounds and aligned, as PLACES are multiples of a page; only used as atomics.
    PLACES.map(|p| unsafe { &*at.cast::<u8>().add(p).cast::<AtomicU64>() })
}

fn map(flags: i32, fd: i32) -> Result<[&'static AtomicU64; 2], String> {
    // SAFETY: a new mapping at a place of the kernel's choice, never unmapped.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: it is SIZE bytes and stays.
    Ok(unsafe { words(at) })
}

fn file() -> Result<[&'static AtomicU64; 2], String> {
    use std::os::fd::AsRawFd;
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open("/dev/shm/probe");
    let file = file.map_err(|e| format!("/dev/shm/probe: {e}"))?;
    file.set_len(SIZE as u64).map_err(|e| e.to_string())?;
    map(libc::MAP_SHARED, file.as_raw_fd())
}

fn system_v() -> Result<[&'static AtomicU64; 2], String> {
    // SAFETY: plain system calls; the segment is attached once and never detached.
    let at = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, SIZE, libc::IPC_CREAT | 0o600);
        libc::shmat(id, std::ptr::null(), 0)
    };
    if at as isize == -1 {
        return Err(format!("shmat: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: it is SIZE bytes and stays.
    Ok(unsafe { words(at) })
}

pub fn run(args: &Args) -> Result<(), String> {
    let areas = [map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)?, file()?, system_v()?];
    tree::fork(|| {
        loop {
            for [question, answer] in areas {
                answer.store(question.load(SeqCst) + 1, SeqCst);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    })?;
    let mut wrong = 0;
    say::rounds("shared", args, |n| {
        for [question, answer] in areas {
            question.store(n, SeqCst);
            // no clock: while frozen, time goes on
            let answered = (0..2000).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                answer.load(SeqCst) == n + 1
            });
            wrong += u64::from(!answered);
        }
        Ok(format!("wrong={wrong}"))
    })
}
