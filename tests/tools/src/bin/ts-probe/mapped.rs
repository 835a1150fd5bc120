//! A file that is changed through a shared mapping: what was written through memory must be what is read from the file.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

const PAGE: usize = 4096;

pub fn run(args: &mut Args) -> Result<(), String> {
    let (path, size) = (args.position("FILE")?, (args.number("MB")? as usize) << 20);
    let fail = |e: std::io::Error| format!("{path}: {e}");
    let file =
        OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path).map_err(fail)?;
    file.set_len(size as u64).map_err(fail)?;
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that is as long and that only we change.
    let memory = unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        if at == libc::MAP_FAILED {
            return Err(fail(std::io::Error::last_os_error()));
        }
        std::slice::from_raw_parts_mut(at.cast::<u8>(), size)
    };
    // the seed of each page's content; 0: never written
    let mut seeds = vec![0u64; size / PAGE];
    let mut page = vec![0; PAGE];
    say::rounds("mapped", args, |n| {
        let mut wrong = 0;
        for (i, seed) in seeds.iter().enumerate() {
            let of_page = i * PAGE..(i + 1) * PAGE;
            file.read_exact_at(&mut page, of_page.start as u64).map_err(fail)?;
            for side in [&memory[of_page], &page[..]] {
                wrong += match seed {
                    0 => side.iter().filter(|b| **b != 0).count() as u64,
                    seed => Pattern::new(*seed).wrong(side),
                };
            }
        }
        // a third of the pages anew each round; the last third is never written and stays a hole
        for i in (0..seeds.len() * 2 / 3).skip(n as usize % 2).step_by(2) {
            seeds[i] = n << 32 | i as u64 | 1;
            Pattern::new(seeds[i]).fill(&mut memory[i * PAGE..(i + 1) * PAGE]);
        }
        if n % 4 == 0 {
            // SAFETY: the mapping's own range.
            unsafe { libc::msync(memory.as_mut_ptr().cast(), size, libc::MS_SYNC) };
        }
        Ok(format!("wrong={wrong} bytes={size}"))
    })
}
