//! Which version of the Task API the containerd that started us speaks.
//!
//! Nothing it passes tells: containerd 1.7 and 2.0-2.2 call `start` with the same flags and the same environment (`MAX_SHIM_VERSION`
//! is 2 in both), yet 1.7 refuses an answer of version 3, and 2.x speaks v3 only to a shim that answers so. Go programs
//! carry the path of their main package in their file, so the caller's own executable is asked: containerd 2 is the module
//! `github.com/containerd/containerd/v2`. From 2.3 on the bootstrap message says it and this module is not needed.

use std::{
    env,
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

/// Overrules the detection: "2" or "3".
const OVERRIDE: &str = "TRANSSHIP_TASK_API";

/// What only containerd 2's build information contains. Also true for programs that embed it (k3s).
const V2_MODULE: &[u8] = b"github.com/containerd/containerd/v2";

/// The name of the ELF section with Go's build information, and how much of it is read at most.
const SECTION: &[u8] = b".go.buildinfo\0";
const SECTION_LIMIT: u64 = 1 << 20;

/// A version of `containerd.task.vN.Task`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskApi {
    /// containerd 1.x, and what every 2.x accepts as well.
    V2,
    /// containerd 2.x.
    V3,
}

/// The version to answer with. `publish_binary` is containerd's own path as it passed it; v2 when nothing can be found out.
pub fn task_api(publish_binary: &str) -> TaskApi {
    match env::var(OVERRIDE).as_deref() {
        Ok("2") => return TaskApi::V2,
        Ok("3") => return TaskApi::V3,
        _ => {}
    }
    let parent = PathBuf::from(format!("/proc/{}/exe", nix::unistd::getppid()));
    let candidates = [parent, PathBuf::from(publish_binary)];
    if candidates.iter().any(|p| is_containerd_2(p)) { TaskApi::V3 } else { TaskApi::V2 }
}

fn is_containerd_2(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    build_info(file.as_fd()).is_some_and(|info| contains(&info, V2_MODULE))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// The content of the section with the build information, of a 64-bit little-endian ELF file: four small reads.
fn build_info(file: impl AsFd) -> Option<Vec<u8>> {
    let file = File::from(file.as_fd().try_clone_to_owned().ok()?);
    let read = |at: u64, len: u64| {
        let mut bytes = vec![0; usize::try_from(len.min(SECTION_LIMIT)).ok()?];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    };
    let number = |bytes: &[u8], at: usize, len: usize| -> Option<u64> {
        let mut value = [0; 8];
        value[..len].copy_from_slice(bytes.get(at..at + len)?);
        Some(u64::from_le_bytes(value))
    };
    let header = read(0, 64)?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, entry) = (number(&header, 40, 8)?, number(&header, 58, 2)?);
    let (count, names) = (number(&header, 60, 2)?, number(&header, 62, 2)?);
    if entry < 64 {
        return None;
    }
    let sections = read(table, entry * count)?;
    let section = |i: u64| sections.get(usize::try_from(i * entry).ok()?..);
    let place = |s: &[u8]| Some((number(s, 24, 8)?, number(s, 32, 8)?));
    let (at, len) = place(section(names)?)?;
    let names = read(at, len)?;
    for i in 0..count {
        let s = section(i)?;
        let name = usize::try_from(number(s, 0, 4)?).ok()?;
        if names.get(name..).is_some_and(|n| n.starts_with(SECTION)) {
            let (at, len) = place(s)?;
            return read(at, len);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// An ELF file with two sections: the build information and the names.
    fn elf(info: &[u8]) -> tempfile::NamedTempFile {
        let names = b"\0.go.buildinfo\0.shstrtab\0";
        let (info_at, names_at) = (64u64, 64 + info.len() as u64);
        let table = names_at + names.len() as u64;
        let mut header = vec![0u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[40..48].copy_from_slice(&table.to_le_bytes());
        header[58..64].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        let section = |name: u32, at: u64, len: usize| {
            let mut s = vec![0u8; 64];
            s[..4].copy_from_slice(&name.to_le_bytes());
            s[24..32].copy_from_slice(&at.to_le_bytes());
            s[32..40].copy_from_slice(&(len as u64).to_le_bytes());
            s
        };
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let parts = [
            header,
            info.to_vec(),
            names.to_vec(),
            section(1, info_at, info.len()),
            section(15, names_at, names.len()),
        ];
        file.write_all(&parts.concat()).unwrap();
        file
    }

    #[test]
    fn the_main_package_decides() {
        let one = elf(b"\xff Go buildinf:path\tgithub.com/containerd/containerd/cmd/containerd\n");
        let two = elf(b"\xff Go buildinf:path\tgithub.com/containerd/containerd/v2/cmd/containerd\n");
        assert!(!is_containerd_2(one.path()));
        assert!(is_containerd_2(two.path()));
    }

    #[test]
    fn anything_else_is_not_containerd_2() {
        assert!(!is_containerd_2(Path::new("/nonexistent")));
        assert!(!is_containerd_2(Path::new("/proc/self/exe")));
        let mut text = tempfile::NamedTempFile::new().unwrap();
        text.write_all(b"#!/bin/sh\n").unwrap();
        assert!(!is_containerd_2(text.path()));
        // A table that points behind the end of the file.
        let mut cut = vec![0u8; 64];
        cut[..6].copy_from_slice(b"\x7fELF\x02\x01");
        cut[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        cut[58..64].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&cut).unwrap();
        assert!(!is_containerd_2(file.path()));
    }
}
