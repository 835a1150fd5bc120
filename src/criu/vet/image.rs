//! An image as its entries: two words of magic, then messages behind their lengths.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use crate::criu::images::IMG_COMMON_MAGIC;

/// No image that is read here is longer than this: there is a core for each thread, and a mount table has some hundred lines.
const LONGEST: u64 = 64 << 20;

/// All entries of an image; none if it is not there.
pub fn read<M: Message + Default>(path: &Path, magic: u32) -> Result<Option<Vec<M>>> {
    let bytes = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        Ok(meta) => {
            ensure!(meta.len() <= LONGEST, "{} has {} bytes", path.display(), meta.len());
            std::fs::read(path).with_context(|| format!("reading {}", path.display()))?
        }
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    entries(&bytes, magic).map(Some).with_context(|| format!("the image {name}"))
}

pub(super) fn entries<M: Message + Default>(bytes: &[u8], magic: u32) -> Result<Vec<M>> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let mut rest = match (word(0), word(4)) {
        (Some(IMG_COMMON_MAGIC), Some(second)) if second == magic => &bytes[8..],
        // the inventory's, which says what the others begin with
        (Some(first), _) if first == magic => &bytes[4..],
        _ => bail!("it is of another kind"),
    };
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (len, tail) = rest.split_first_chunk::<4>().context("half a length")?;
        let (entry, tail) =
            tail.split_at_checked(u32::from_le_bytes(*len) as usize).context("half an entry")?;
        all.push(M::decode(entry).context("decoding an entry")?);
        rest = tail;
    }
    Ok(all)
}

/// The images whose names begin so, with the rest of the name before `.img`, in order.
pub fn all(images: &Path, start: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(images).with_context(|| format!("reading {}", images.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(rest) = name.strip_prefix(start).and_then(|r| r.strip_suffix(".img")) {
            found.push((rest.to_string(), path));
        }
    }
    found.sort();
    Ok(found)
}
