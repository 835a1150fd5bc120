//! `cgroup.img` without paths.
//!
//! A dump that ignores cgroups still records the paths of the source's, but not the directories that a restore's `cgroup_root` would rewrite.
//! A restore that ignores cgroups as well does not look; the default one, which is all that runc 1.1 offers, moves the restored tasks into the
//! *source's* paths (containerd #9691; where that is a frozen cgroup on the same machine, the restore hangs in it).
//! Without members in the sets nothing moves: the tasks stay in the cgroups of the CRIU that restores them, which runc has put into the container's.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

use super::images::IMG_COMMON_MAGIC;

/// The image's name.
const FILE: &str = "cgroup.img";
const CGROUP_MAGIC: u32 = 0x5938_3330;

/// `cg_set_entry`, of which only the number is kept: tasks refer to it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct CgSet {
    #[prost(uint32, required, tag = "1")]
    id: u32,
}

/// `cgroup_entry`, without controllers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Cgroup {
    #[prost(message, repeated, tag = "1")]
    sets: Vec<CgSet>,
}

/// Takes all paths out of a `cgroup.img`.
pub(super) fn without_paths(image: &[u8]) -> Result<Vec<u8>> {
    let head = [IMG_COMMON_MAGIC.to_le_bytes(), CGROUP_MAGIC.to_le_bytes()].concat();
    let rest = image.strip_prefix(&head[..]).context("not an image of cgroups")?;
    let (len, rest) = rest.split_first_chunk::<4>().context("an image of cgroups without content")?;
    ensure!(rest.len() == u32::from_le_bytes(*len) as usize, "an image of cgroups of the wrong length");
    let kept = Cgroup::decode(rest).context("decoding the image of cgroups")?.encode_to_vec();
    Ok([head, u32::try_from(kept.len())?.to_le_bytes().to_vec(), kept].concat())
}

/// Rewrites the image in a directory. Fine when there is none (CRIU shared all cgroups with the tasks).
pub(super) fn strip(images_dir: &Path) -> Result<()> {
    let path = images_dir.join(FILE);
    let image = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("reading {}", path.display()))?,
    };
    let kept = without_paths(&image).with_context(|| format!("rewriting {}", path.display()))?;
    std::fs::write(&path, kept).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_stay_and_paths_go() {
        // Two sets, the second with a member { name "freezer", path "/x" }, and a controller { cname "freezer" }.
        let member = [&[0x0a, 7][..], b"freezer", &[0x12, 2], b"/x"].concat();
        let set2 = [&[0x08, 2, 0x12, member.len() as u8][..], &member].concat();
        let body = [&[0x0a, 2, 0x08, 1, 0x0a, set2.len() as u8][..], &set2, &[0x12, 9, 0x0a, 7], b"freezer"]
            .concat();
        let head = [0x19, 0x43, 0x56, 0x54, 0x30, 0x33, 0x38, 0x59];
        let image = [&head[..], &(body.len() as u32).to_le_bytes(), &body].concat();
        let kept = [&head[..], &8u32.to_le_bytes(), &[0x0a, 2, 0x08, 1, 0x0a, 2, 0x08, 2]].concat();
        assert_eq!(without_paths(&image).unwrap(), kept);
        assert_eq!(without_paths(&kept).unwrap(), kept);
        assert!(without_paths(&image[..20]).is_err());
        assert!(without_paths(b"").is_err());
    }
}
