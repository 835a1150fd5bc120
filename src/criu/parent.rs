//! The parent images that CRIU is shown so that clean pages stay where they are.
//!
//! CRIU reads `inventory.img` (`get_parent_inventory`, criu/image.c), and compares its `dump_uptime` with the start of each task: a task
//! that has started later would be another one under a reused pid. Ours is far in the future.
//!
//! That there is a parent for a task's memory our page server says ([`super::page_server`]), or, when CRIU writes image files, a
//! pagemap here that has every address (`open_page_local_xfer`, criu/page-xfer.c). What is in it nobody reads.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;

use super::images::MemoryImage;
use super::page_server::{ImageKind, PE_PRESENT, page_size};
use super::version::Version;
use crate::private;

/// `INVENTORY_MAGIC` (criu/include/magic.h); this image alone has no second magic in front.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// `CRTOOLS_IMAGES_V1_1`.
const IMAGES_VERSION: u32 = 2;
/// The name of the link that CRIU makes in the images directory.
const LINK: &str = "parent";
/// Microseconds since boot that no machine reaches, small enough for CRIU's arithmetic.
const NEVER: u64 = 1 << 62;

/// `inventory_entry`, what CRIU reads of a parent's (images/inventory.proto).
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Inventory {
    #[prost(uint32, required, tag = "1")]
    version: u32,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
}

/// The first CRIU that counts an entry's pages in 64 bits.
const LONG_RUNS: Version = Version { major: 4, minor: 2, sublevel: 0 };

/// The directory, and the link to it: gone when dropped.
pub(super) struct Parent {
    dir: PathBuf,
    link: PathBuf,
}

impl Parent {
    /// Makes the directory in the work directory. The images directory is where CRIU will link to it.
    pub fn create(work: &Path, images: &Path) -> Result<Self> {
        let dir = std::path::absolute(work.join("parent-images")).context("the parent images' directory")?;
        let make = || -> std::io::Result<()> {
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            private::write(&dir.join("inventory.img"), &inventory())
        };
        make().with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { dir, link: images.join(LINK) })
    }

    /// Has all memory of these tasks, which CRIU knows by these pids.
    pub fn has_tasks(&self, tasks: &[u64], criu: Version) -> Result<()> {
        for (n, task) in tasks.iter().enumerate() {
            let pages_id = u32::try_from(n + 1).context("a parent image's number")?;
            let mut image = MemoryImage::create(&self.dir, ImageKind::Pid, *task, pages_id)?;
            for (vaddr, pages) in everywhere(criu) {
                image.run(vaddr, pages, PE_PRESENT)?;
            }
            image.close()?;
        }
        Ok(())
    }

    /// For `parent_img`.
    pub fn path(&self) -> Result<String> {
        self.dir.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", self.dir.display()))
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::remove_file(&self.link);
    }
}

/// All user addresses, as runs of pages that this CRIU can count.
fn everywhere(criu: Version) -> impl Iterator<Item = (u64, u64)> {
    // 57 bits are what any of our architectures has. CRIU before 4.2 gets the 48 that a program has without asking for more.
    let (bits, run) = if criu >= LONG_RUNS { (57, 1 << 57) } else { (48, (1 << 31) * page_size() as u64) };
    (0..1u64 << bits).step_by(run as usize).map(move |at| (at, run.min(1 << bits) / page_size() as u64))
}

fn inventory() -> Vec<u8> {
    let entry = Inventory { version: IMAGES_VERSION, dump_uptime: Some(NEVER) }.encode_to_vec();
    let len = u32::try_from(entry.len()).expect("a few bytes");
    [&INVENTORY_MAGIC.to_le_bytes()[..], &len.to_le_bytes(), &entry].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_in_a_run() {
        for (criu, bits) in [((3, 17, 1), 48), ((4, 1, 9), 48), ((4, 2, 0), 57), ((5, 0, 0), 57)] {
            let criu = Version { major: criu.0, minor: criu.1, sublevel: criu.2 };
            let mut end = 0;
            for (at, pages) in everywhere(criu) {
                assert_eq!(at, end);
                assert!(criu >= LONG_RUNS || pages <= u64::from(u32::MAX));
                end += pages * page_size() as u64;
            }
            assert_eq!(end, 1 << bits);
        }
    }

    #[test]
    fn nothing_is_left_of_it() {
        let (work, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let parent = Parent::create(work.path(), images.path()).unwrap();
        let bytes = std::fs::read(Path::new(&parent.path().unwrap()).join("inventory.img")).unwrap();
        assert_eq!(bytes[..8], [0x16, 0x31, 0x31, 0x58, 12, 0, 0, 0]);
        parent.has_tasks(&[1, 77], LONG_RUNS).unwrap();
        let (_, runs) =
            super::super::images::tests::decode(&work.path().join("parent-images/pagemap-77.img"));
        assert_eq!(runs.len(), 1);
        // what CRIU does
        std::os::unix::fs::symlink(parent.path().unwrap(), images.path().join("parent")).unwrap();
        drop(parent);
        for dir in [work, images] {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }
}
