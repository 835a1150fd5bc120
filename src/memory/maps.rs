//! A task's mappings, from /proc/PID/maps. What a mapping means for a migration is decided elsewhere ([`super::tracker`]).

use std::fs;
use std::ops::Range;

use anyhow::{Context, Result};

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses.
    pub range: Range<u64>,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// PROT_EXEC.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Where in the file it begins, bytes.
    pub offset: u64,
    /// The file system's device, major and minor; zero without a file.
    pub dev: (u32, u32),
    /// The file's inode number; zero without a file.
    pub inode: u64,
    /// The path (with ` (deleted)` where the kernel says so), a word like `[heap]`, or nothing.
    pub name: String,
}

/// All mappings of a task, ascending.
pub fn mappings(pid: i32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/maps");
    let bytes = fs::read(&path).with_context(|| format!("reading {path}"))?;
    parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("a line of {path}"))
}

pub(super) fn parse(text: &str) -> Result<Vec<Mapping>> {
    text.lines().map(|l| line(l).with_context(|| format!("not a mapping: {l:?}"))).collect()
}

/// `start-end rwxp offset major:minor inode      name`; the name may hold spaces, and is empty for most anonymous memory.
fn line(text: &str) -> Option<Mapping> {
    let mut fields = text.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let modes = fields.next()?.as_bytes();
    let [read, write, exec, shared] = *<&[u8; 4]>::try_from(modes).ok()?;
    let offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    Some(Mapping {
        range: hex(start)?..hex(end)?,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        shared: shared == b's',
        offset: hex(offset)?,
        dev: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: fields.next()?.parse().ok()?,
        name: fields.next().unwrap_or_default().trim_start().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_the_kernel_writes_them() {
        let text = "\
55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 ---p 00000000 00:00 0 
7f1200000000-7f1200002000 r-xp 0001a000 fe:01 1835                       /usr/lib/a b.so
7f1300000000-7f1300001000 rw-s 00000000 00:01 4097                       /dev/zero (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let all = parse(text).unwrap();
        assert_eq!(all.len(), 5);
        assert_eq!(all[0].name, "[heap]");
        assert!(all[0].read && all[0].write && !all[0].exec && !all[0].shared);
        assert_eq!(all[1].range, 0x7f00_0000_0000..0x7f00_0002_1000);
        assert!(all[1].name.is_empty() && !all[1].read);
        assert_eq!((all[2].offset, all[2].dev, all[2].inode), (0x1a000, (0xfe, 1), 1835));
        assert_eq!(all[2].name, "/usr/lib/a b.so");
        assert!(all[3].shared);
        assert_eq!(all[3].name, "/dev/zero (deleted)");
        assert_eq!(all[4].range.end, 0xffff_ffff_ff60_1000);
        assert!(parse("nonsense").is_err());
    }

    #[test]
    fn our_own_are_there() {
        let here = mappings as fn(i32) -> _ as usize as u64;
        let all = mappings(std::process::id() as i32).unwrap();
        assert!(all.iter().any(|m| m.range.contains(&here)));
        assert!(all.windows(2).all(|w| w[0].range.end <= w[1].range.start));
    }
}
