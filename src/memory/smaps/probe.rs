//! Whether flags can be asked for on this kernel, and mean what is believed here: tried once, on mappings of our own.

use std::fs;
use std::ops::Range;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use super::btf::{self, Layout};
use super::program::Program;
use super::{read, text};

/// The program, or why there is none.
pub(super) fn tried() -> &'static Result<Program, String> {
    static TRIED: OnceLock<Result<Program, String>> = OnceLock::new();
    TRIED.get_or_init(|| {
        let tried = program();
        tried
            .map_err(|e| format!("{e:#}"))
            .inspect_err(|e| log::info!("mappings' flags come with counters: {e}"))
    })
}

fn program() -> Result<Program> {
    let btf = fs::read(btf::PATH).with_context(|| format!("reading {}", btf::PATH))?;
    let program = Program::load(&Layout::of(&btf).with_context(|| btf::PATH)?)?;
    let samples = Samples::new()?;
    let me = std::process::id().cast_signed();
    // other threads of ours map and unmap meanwhile: only the samples are compared
    let iter = program.of(me)?;
    let maps = String::from_utf8_lossy(&read(me, "maps")?).into_owned();
    let maps: String = maps.split_inclusive('\n').filter(|line| samples.has(line)).collect();
    let mut areas = iter.read()?;
    areas.retain(|a| samples.all().any(|s| s.contains(&a.start)));
    ensure!(areas.len() >= SAMPLES.len() + FLAGS.len(), "mappings are missing");
    let ours = text(maps.as_bytes(), &areas).context("a flag that is not known")?;
    let theirs = brief(&String::from_utf8_lossy(&read(me, "smaps")?), |line| samples.has(line));
    let ours = String::from_utf8_lossy(&ours);
    ensure!(ours == theirs, "flags have other names: {ours:?} is {theirs:?}");
    Ok(program)
}

/// What smaps says of some mappings but for their counters.
fn brief(smaps: &str, of: impl Fn(&str) -> bool) -> String {
    let mut wanted = false;
    let mut text = String::new();
    for line in smaps.lines() {
        let begins = line.split_once(' ').is_some_and(|(word, _)| word.contains('-') && !word.ends_with(':'));
        if begins {
            wanted = of(line);
        }
        if wanted && (begins || line.starts_with("VmFlags:")) {
            text.extend([line, "\n"]);
        }
    }
    text
}

/// How a piece of one mapping is made another than its neighbours.
#[derive(Clone, Copy)]
enum Sample {
    /// madvise(2). Not every kernel knows all of them: what it refuses is like the others.
    Advise(i32),
    Protect(i32),
    Lock,
}

/// Each between two pieces of no kind, so that no two become one mapping.
const SAMPLES: [Sample; 11] = [
    Sample::Advise(libc::MADV_SEQUENTIAL),
    Sample::Advise(libc::MADV_RANDOM),
    Sample::Advise(libc::MADV_DONTFORK),
    Sample::Advise(libc::MADV_DONTDUMP),
    Sample::Advise(libc::MADV_MERGEABLE),
    Sample::Advise(libc::MADV_HUGEPAGE),
    Sample::Advise(libc::MADV_NOHUGEPAGE),
    Sample::Advise(libc::MADV_WIPEONFORK),
    Sample::Protect(libc::PROT_READ | libc::PROT_EXEC),
    Sample::Protect(libc::PROT_NONE),
    Sample::Lock,
];
/// Mappings of their own.
const FLAGS: [i32; 4] = [
    libc::MAP_PRIVATE,
    libc::MAP_PRIVATE | libc::MAP_GROWSDOWN,
    libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    libc::MAP_SHARED,
];

/// A page, or some, of any machine.
const PIECE: u64 = 64 << 10;

/// Mappings of ours.
struct Samples(Vec<Range<u64>>);

impl Samples {
    fn new() -> Result<Samples> {
        let mut made = Samples(Vec::new());
        for flags in FLAGS {
            made.map(PIECE, flags)?;
        }
        let all = made.map((2 * SAMPLES.len() as u64 + 1) * PIECE, libc::MAP_PRIVATE)?;
        for (sample, n) in SAMPLES.iter().zip(0..) {
            let at = (all.start + (2 * n + 1) * PIECE) as *mut libc::c_void;
            let len = PIECE as usize;
            // SAFETY: a piece of the mapping made above, which nobody reads or writes.
            unsafe {
                match *sample {
                    Sample::Advise(advice) => libc::madvise(at, len, advice),
                    Sample::Protect(protection) => libc::mprotect(at, len, protection),
                    Sample::Lock => libc::mlock(at, len),
                };
            }
        }
        Ok(made)
    }

    fn map(&mut self, len: u64, flags: i32) -> Result<Range<u64>> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len as usize, protection, flags | libc::MAP_ANONYMOUS, -1, 0)
        };
        ensure!(at != libc::MAP_FAILED, "mapping samples: {}", std::io::Error::last_os_error());
        self.0.push(at as u64..at as u64 + len);
        Ok(at as u64..at as u64 + len)
    }

    fn all(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter()
    }

    /// Does this line of maps or smaps begin a mapping of ours?
    fn has(&self, line: &str) -> bool {
        let start = line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        start.is_some_and(|start| self.all().any(|s| s.contains(&start)))
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        for range in &self.0 {
            // SAFETY: exactly what was mapped, and nobody has a pointer into it.
            unsafe { libc::munmap(range.start as *mut libc::c_void, (range.end - range.start) as usize) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Smaps;
    use super::*;

    /// Ended when dropped.
    struct Sleeper(std::process::Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_task_is_described_as_by_the_kernel() {
        if let Err(e) = tried() {
            return println!("SKIPPED: {e}");
        }
        let sleeper = Sleeper(std::process::Command::new("sleep").arg("60").spawn().unwrap());
        let pid = sleeper.0.id().cast_signed();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let smaps = Smaps::of(pid);
        assert!(smaps.iter.is_some());
        let ours = String::from_utf8(smaps.read().unwrap()).unwrap();
        let theirs = String::from_utf8(read(pid, "smaps").unwrap()).unwrap();
        assert_eq!(ours, brief(&theirs, |_| true));
        assert!(ours.lines().count() >= 20, "{ours}");
        // as it would be without the iterator
        let without = Smaps { pid, iter: None }.read().unwrap();
        assert_eq!(brief(&String::from_utf8(without).unwrap(), |_| true), ours);
    }

    #[test]
    fn counters_are_left_out() {
        let smaps = "\
1000-2000 rw-p 00000000 00:00 0 
Size:                  4 kB
THPeligible:           0
VmFlags: rd wr 
3000-4000 r--p 00000000 00:00 0                          [a-b c]
Rss:                   4 kB
VmFlags: rd 
";
        let all = "1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n\
                   3000-4000 r--p 00000000 00:00 0                          [a-b c]\nVmFlags: rd \n";
        assert_eq!(brief(smaps, |_| true), all);
        assert_eq!(brief(smaps, |line| line.starts_with('1')), all[..all.find("3000").unwrap()]);
    }
}
