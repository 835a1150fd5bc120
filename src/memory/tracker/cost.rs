//! What tracking costs the tasks on this machine: the time that a write to a protected page takes, tried on memory of our own.
//! Mitigations, nested page tables and emulation make it another one on each machine. What to do about it is [`crate::migrate`]'s
//! business.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

use super::scan::PAGE;
use super::uffd::Uffd;
use crate::memory::buffer::Buffer;

/// Written in one trial: 2 MB, so that the trial itself costs a node next to nothing.
const PAGES: usize = 512;
/// The middle one counts.
const TRIALS: usize = 5;

/// What a write to a page costs its thread that has been protected since the last one. A few milliseconds' work.
///
/// # Errors
/// If this kernel or this process has no asynchronous write protection (Linux 6.7).
pub fn write_fault() -> Result<Duration> {
    let mut memory = Buffer::new(PAGES * PAGE as usize)?;
    let range = memory.as_ptr() as u64..memory.as_ptr() as u64 + memory.len() as u64;
    // SAFETY: the buffer's own mapping; the advice changes no content. Refused where there are no huge pages: then none are in the way.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_NOHUGEPAGE) };
    memory.fill(1);
    let uffd = Uffd::own().context("userfaultfd")?;
    uffd.register(range.clone()).context("UFFDIO_REGISTER")?;
    let mut trials = [Duration::ZERO; TRIALS];
    for took in &mut trials {
        uffd.protect(range.clone()).context("UFFDIO_WRITEPROTECT")?;
        *took = write(&mut memory)? / PAGES as u32;
    }
    trials.sort_unstable();
    Ok(trials[TRIALS / 2])
}

/// One byte of each page; and how long that took.
fn write(memory: &mut [u8]) -> Result<Duration> {
    let begun = processor_time()?;
    for page in memory.chunks_mut(PAGE as usize) {
        // SAFETY: a byte of what is borrowed here. Volatile: the write is all that matters.
        unsafe { (&raw mut page[0]).write_volatile(2) };
    }
    Ok(processor_time()?.saturating_sub(begun))
}

/// Of this thread: who shares the processor with it does not count.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("the thread's clock")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protected_page_costs_more_than_a_free_one() {
        let fault = match write_fault() {
            Ok(fault) => fault,
            Err(e) => return eprintln!("skipped: no write protection here: {e:#}"),
        };
        let mut memory = vec![1; PAGES * PAGE as usize];
        let free = write(&mut memory).unwrap() / PAGES as u32;
        assert!(fault > free * 4, "{fault:?} {free:?}");
    }
}
