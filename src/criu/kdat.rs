//! What CRIU knows of the kernel ("kerndat"), which it keeps in `/run/criu.kdat`, and a copy of it that says one thing more.
//!
//! CRIU leaves clean pages out of a dump only where the kernel has soft-dirty bits, and it takes the word of its cache for that
//! (`kerndat_try_load_cache`, criu/kerndat.c). Nothing else of that path needs the kernel's help: without soft-dirty every page
//! reads as clean, so every page is "in the parent images", which is what we want (see [`super::dump`]). So one worker, in a mount
//! namespace of its own, gets a copy of the cache in which `has_dirty_track` is set; no other CRIU on the machine sees it.
//!
//! The cache is a C structure, dumped as it is. Its beginning has not changed since CRIU 3.13:
//!
//! ```text
//! 0 magic1 u32 | 4 magic2 u32 (the build) | 8 shmem_dev u64 | 16 last_cap i32 | 20 - | 24 zero_page_pfn u64 | 32 has_dirty_track u8
//! 33 has_memfd u8 | 34 has_memfd_hugetlb u8 | 35 has_fdinfo_lock u8 | 36 - | 40 task_size u64
//! ```
//!
//! CRIU is asked about the kernel first (FEATURE_CHECK) and has to say the same as the byte; whether it then really leaves the pages
//! alone is tried by a dump ([`super::probe`]).

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::rpc::{CriuReq, Features, ReqType};
use super::swrk::{Run, Spawn, Swrk};

/// Where CRIU keeps it (`KDAT_RUNDIR`; Debian, Fedora and CRIU's own Makefile agree).
pub(super) const PATH: &str = "/run/criu.kdat";
const MAGIC: u32 = 0x5702_3458;
const LAST_CAP: usize = 16;
const HAS_DIRTY_TRACK: usize = 32;
const TASK_SIZE: usize = 40;
/// What is known of the structure's size: 4.x has about 700 bytes.
const SIZE: std::ops::Range<usize> = 64..64 << 10;

/// What a CRIU found out about the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kdat {
    bytes: Vec<u8>,
    /// The kernel has soft-dirty bits.
    pub soft_dirty: bool,
}

impl Kdat {
    /// Has this CRIU look at the kernel, into a cache of its own: that in `/run` may be another build's, and there is none where
    /// `/run` is no tmpfs. Takes about 30 ms.
    pub fn learn(criu: &Path) -> Result<Self> {
        let how = Spawn { run: Run::Empty, ..Spawn::default() };
        let worker = Swrk::spawn(criu, &how).context("starting CRIU in a mount namespace of its own")?;
        let request = CriuReq {
            features: Some(Features { mem_track: Some(true), ..Features::default() }),
            // so that its mounts are there to be read
            keep_open: Some(true),
            ..CriuReq::new(ReqType::FeatureCheck)
        };
        let answer = worker.call(&request, &mut |_| true);
        let cache = PathBuf::from(format!("/proc/{}/root{PATH}", worker.pid()));
        let bytes = std::fs::read(&cache);
        worker.finish();
        let answer = answer?;
        ensure!(answer.success, "CRIU cannot tell the kernel's features");
        let soft_dirty = answer.features.and_then(|f| f.mem_track).unwrap_or(false);
        let bytes = bytes.context("reading what CRIU remembers of the kernel")?;
        check(&bytes, soft_dirty)?;
        Ok(Self { bytes, soft_dirty })
    }

    /// The copy that says that there are soft-dirty bits.
    pub fn with_soft_dirty(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[HAS_DIRTY_TRACK] = 1;
        bytes
    }
}

/// Is this the structure that we know, and does it say what CRIU itself says?
pub(super) fn check(bytes: &[u8], soft_dirty: bool) -> Result<()> {
    ensure!(SIZE.contains(&bytes.len()), "CRIU's kerndat has {} bytes", bytes.len());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    ensure!(u32_at(0) == MAGIC, "CRIU's kerndat begins with {:#x}", u32_at(0));
    let flags = &bytes[HAS_DIRTY_TRACK..HAS_DIRTY_TRACK + 4];
    let plausible = (32..64).contains(&u32_at(LAST_CAP))
        && flags.iter().all(|f| *f <= 1)
        && u64_at(TASK_SIZE) % 4096 == 0
        && u64_at(TASK_SIZE) >= 1 << 30;
    ensure!(plausible, "CRIU's kerndat is laid out in a way that is not known here");
    ensure!(
        (flags[0] == 1) == soft_dirty,
        "CRIU's kerndat and CRIU itself do not agree on soft-dirty bits ({soft_dirty})"
    );
    Ok(())
}

/// Something at [`PATH`] that a copy can be mounted over. CRIU's own cache, or where there can be none an empty file that goes away with
/// its owner.
///
/// A mount goes with the file that it is on (`detach_mounts`, fs/namespace.c), and every CRIU removes a cache that it does not
/// understand: an empty file would last until the next CRIU of the node starts.
pub(super) struct MountPoint {
    ours: bool,
}

impl MountPoint {
    /// `kdat`: the cache, in case there is none yet.
    pub fn new(kdat: &Kdat) -> Result<Self> {
        let made = || -> std::io::Result<Self> {
            let dir = Path::new(PATH).parent().unwrap_or(Path::new("/"));
            // CRIU keeps none where it would outlive a reboot
            if nix::sys::statfs::statfs(dir)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
                let mut file = tempfile::NamedTempFile::new_in(dir)?;
                file.write_all(&kdat.bytes)?;
                match file.persist_noclobber(PATH) {
                    Err(e) if e.error.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.error),
                    _ => return Ok(Self { ours: false }),
                }
            }
            match std::fs::OpenOptions::new().write(true).create_new(true).open(PATH) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self { ours: false }),
                made => made.map(|_| Self { ours: true }),
            }
        };
        made().with_context(|| format!("making {PATH}"))
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        // another CRIU may have put its cache there
        if self.ours && std::fs::metadata(PATH).is_ok_and(|m| m.len() == 0) {
            let _ = std::fs::remove_file(PATH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dirty: u8) -> Vec<u8> {
        let mut bytes = vec![0; 700];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[LAST_CAP..LAST_CAP + 4].copy_from_slice(&40u32.to_le_bytes());
        bytes[HAS_DIRTY_TRACK..HAS_DIRTY_TRACK + 4].copy_from_slice(&[dirty, 1, 1, 1]);
        bytes[TASK_SIZE..TASK_SIZE + 8].copy_from_slice(&0x7fff_ffff_f000u64.to_le_bytes());
        bytes
    }

    #[test]
    fn the_copy_differs_in_one_byte() {
        let kdat = Kdat { bytes: cache(0), soft_dirty: false };
        check(&kdat.bytes, false).unwrap();
        assert_eq!(kdat.with_soft_dirty(), cache(1));
    }

    #[test]
    fn another_layout_is_refused() {
        for (at, value) in
            [(0, 1), (LAST_CAP, 7), (HAS_DIRTY_TRACK + 1, 2), (TASK_SIZE, 1), (TASK_SIZE + 5, 0)]
        {
            let mut bytes = cache(0);
            bytes[at] = value;
            if at == TASK_SIZE + 5 {
                bytes[TASK_SIZE..TASK_SIZE + 8].fill(0);
            }
            assert!(check(&bytes, false).is_err(), "byte {at} = {value}");
        }
        assert!(check(&cache(0), true).is_err(), "disagrees with CRIU");
        assert!(check(&cache(1), false).is_err(), "was changed already");
        assert!(check(&cache(0)[..40], false).is_err(), "short");
    }
}
