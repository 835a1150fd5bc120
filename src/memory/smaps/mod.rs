//! `/proc/PID/smaps` without its counters: where a task's mappings are, and with which flags.
//!
//! CRIU reads the flags of mappings (MADV_DONTFORK, mlock, ...) there, and nowhere else does a file say them. The counters beside
//! them make the kernel look at every page's struct: some 12 ms for each GiB, with the container frozen. The flags alone stand in the
//! kernel's list of mappings, which a BPF iterator reads in microseconds ([`program`], by the types that the kernel describes itself,
//! [`btf`]). From both and `/proc/PID/maps` comes a text that says to CRIU what the file says.
//!
//! What the kernel calls which flag is no ABI: it is tried once on mappings of our own ([`probe`]). Where that fails, where the kernel
//! has no such iterator (it has from Linux 6.1, with CONFIG_DEBUG_INFO_BTF), or where a mapping has a flag that is not known
//! here, the text is the kernel's own, counters and all.

mod btf;
mod probe;
mod program;

use std::fs;

use anyhow::{Context, Result};

use self::program::{Area, Iter};

/// Flags and their names: `enum` VM_* (include/linux/mm.h) and `show_smap_vma_flags` (fs/proc/task_mmu.c).
const NAMES: [(u64, &str); 31] = [
    (0x1, "rd"),
    (0x2, "wr"),
    (0x4, "ex"),
    (0x8, "sh"),
    (0x10, "mr"),
    (0x20, "mw"),
    (0x40, "me"),
    (0x80, "ms"),
    (0x100, "gd"),
    (0x200, "um"),
    (0x400, "pf"),
    (0x1000, "uw"),
    (0x2000, "lo"),
    (0x4000, "io"),
    (0x8000, "sr"),
    (0x1_0000, "rr"),
    (0x2_0000, "dc"),
    (0x4_0000, "de"),
    (0x8_0000, "lf"),
    (0x10_0000, "ac"),
    (0x20_0000, "nr"),
    (0x40_0000, "ht"),
    (0x80_0000, "sf"),
    (0x200_0000, "wf"),
    (0x400_0000, "dd"),
    (0x800_0000, "sd"),
    (0x1000_0000, "mm"),
    (0x2000_0000, "hg"),
    (0x4000_0000, "nh"),
    (0x8000_0000, "mg"),
    (1 << 42, "sl"),
];

/// Does this kernel tell flags apart from counters, under the names that are known here? Tried once.
///
/// # Errors
/// Why not.
pub fn brief() -> Result<(), &'static str> {
    probe::tried().as_ref().map(drop).map_err(String::as_str)
}

/// Whoever asks for one task's mappings, prepared ahead.
pub struct Smaps {
    pid: i32,
    iter: Option<Iter>,
}

impl Smaps {
    /// For this task.
    pub fn of(pid: i32) -> Smaps {
        let iter = probe::tried().as_ref().ok().and_then(|program| {
            program.of(pid).inspect_err(|e| log::info!("asking for mappings of {pid}: {e:#}")).ok()
        });
        Smaps { pid, iter }
    }

    /// The text, of a task that stands still.
    ///
    /// # Errors
    /// Files in /proc cannot be read.
    pub fn read(&self) -> Result<Vec<u8>> {
        if let Some(iter) = &self.iter {
            let maps = read(self.pid, "maps")?;
            match iter.read() {
                Ok(areas) => match text(&maps, &areas) {
                    Some(text) => return Ok(text),
                    None => log::info!("mappings of {} have flags that are not known here", self.pid),
                },
                Err(e) => log::info!("asking for mappings of {}: {e:#}", self.pid),
            }
        }
        read(self.pid, "smaps")
    }
}

fn read(pid: i32, file: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{file}");
    fs::read(&path).with_context(|| format!("reading {path}"))
}

/// The lines of `maps`, in which names are whatever bytes, each followed by its flags. None where the two do not fit, or a flag is unknown.
fn text(maps: &[u8], areas: &[Area]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(2 * maps.len());
    let mut areas = areas.iter();
    for line in maps.split_inclusive(|byte| *byte == b'\n') {
        text.extend_from_slice(line);
        text.extend_from_slice(b"VmFlags:");
        // in no task's list (`gate_vma`, arch/x86/entry/vsyscall/vsyscall_64.c)
        if line.ends_with(b"[vsyscall]\n") {
            text.extend_from_slice(b" ex");
        } else {
            let area = areas.next()?;
            line.starts_with(format!("{:08x}-{:08x} ", area.start, area.end).as_bytes()).then_some(())?;
            names(area.flags, &mut text)?;
        }
        text.extend_from_slice(b" \n");
    }
    areas.next().is_none().then_some(text)
}

fn names(mut flags: u64, to: &mut Vec<u8>) -> Option<()> {
    for (flag, name) in NAMES {
        if flags & flag != 0 {
            flags &= !flag;
            to.push(b' ');
            to.extend_from_slice(name.as_bytes());
        }
    }
    (flags == 0).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00001000-00003000 rw-p 00000000 00:00 0                  [heap]
00005000-00006000 r--p 00000000 fe:01 7                  /a b
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    fn area(start: u64, end: u64, flags: u64) -> Area {
        Area { start, end, flags }
    }

    #[test]
    fn each_mapping_is_followed_by_its_flags() {
        let areas = [area(0x1000, 0x3000, 0x10_0073), area(0x5000, 0x6000, 0x4000_2071)];
        let lines: Vec<&str> = MAPS.lines().collect();
        let text = String::from_utf8(text(MAPS.as_bytes(), &areas).unwrap()).unwrap();
        let said: Vec<&str> = text.lines().collect();
        assert_eq!(said.len(), 6);
        assert_eq!([said[0], said[2], said[4]], lines[..]);
        assert_eq!(said[1], "VmFlags: rd wr mr mw me ac ");
        assert_eq!(said[3], "VmFlags: rd mr mw me lo nh ");
        assert_eq!(said[5], "VmFlags: ex ");
    }

    #[test]
    fn what_does_not_fit_is_no_text() {
        let (one, two) = (area(0x1000, 0x3000, 1), area(0x5000, 0x6000, 1));
        let text = |areas: &[Area]| text(MAPS.as_bytes(), areas);
        assert!(text(&[one, two]).is_some());
        assert!(text(&[one]).is_none() && text(&[one, two, two]).is_none());
        assert!(text(&[two, one]).is_none());
        assert!(text(&[one, area(0x5000, 0x6000, 1 << 40)]).is_none(), "an unknown flag");
        assert!(super::text(b"nonsense\n", &[one]).is_none());
    }

    #[test]
    fn flags_have_one_name_each() {
        assert_eq!(NAMES.iter().fold(0, |all, (flag, _)| all ^ flag).count_ones() as usize, NAMES.len());
        assert!(NAMES.is_sorted());
    }
}
