//! A file that is opened, mapped, read, changed and closed again each round: on a tmpfs such a change leaves the file's times as they
//! are, and between two visits nobody has it open.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

const PAGE: usize = 4096;

/// A shared mapping that ends with it.
struct Visit {
    at: *mut libc::c_void,
    size: usize,
}

impl Visit {
    fn new(file: &File, size: usize) -> std::io::Result<Visit> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that is as long and that only we change.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), size, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Visit { at, size }) }
    }

    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is as long and lives as long as this.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.size) }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        unsafe { libc::munmap(self.at, self.size) };
    }
}

pub fn run(args: &mut Args) -> Result<(), String> {
    let (path, size) = (args.position("FILE")?, (args.number("MB")? as usize) << 20);
    let fail = |e: std::io::Error| format!("{path}: {e}");
    let mut seeds: Vec<u64> = (1..=(size / PAGE) as u64).collect();
    let mut bytes = vec![0; size];
    for (page, seed) in bytes.chunks_mut(PAGE).zip(&seeds) {
        Pattern::new(*seed).fill(page);
    }
    std::fs::write(&path, &bytes).map_err(fail)?;
    drop(bytes);
    say::rounds("visits", args, |n| {
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(fail)?;
        let mut visit = Visit::new(&file, size).map_err(fail)?;
        drop(file);
        let pages = visit.memory().chunks(PAGE).zip(&seeds);
        let wrong: u64 = pages.map(|(page, seed)| Pattern::new(*seed).wrong(page)).sum();
        // some pages, each of which was just read
        for i in (0..seeds.len()).skip(n as usize % 64).step_by(64) {
            seeds[i] = n << 32 | i as u64;
            Pattern::new(seeds[i]).fill(&mut visit.memory()[i * PAGE..(i + 1) * PAGE]);
        }
        Ok(format!("wrong={wrong} bytes={size}"))
    })
}
