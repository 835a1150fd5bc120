//! `files.img` with timers that are due.
//!
//! A timerfd that expires and is not read is not armed again by the kernel until it is: its fdinfo then says `ticks: 1` and an
//! `it_value` of zero. CRIU's restore sets exactly that, which disarms the timer and clears the ticks (timerfd_settime(2)): a
//! process that polls it waits for ever. As tasks are frozen for a while before a dump, that is what happens to every periodic
//! timerfd with a short interval. Due in a nanosecond in place of zero: it expires as soon as it is set, and goes on periodically.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

use super::images::IMG_COMMON_MAGIC;

/// The image's name.
const FILE: &str = "files.img";
/// `FILES_MAGIC` (criu/include/magic.h).
const FILES_MAGIC: u32 = 0x5630_3138;

/// `file_entry` of a timerfd, which has these fields only (images/fdinfo.proto).
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct File {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "12")]
    timerfd: Option<Timerfd>,
}

/// `timerfd_entry` (images/timerfd.proto).
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Timerfd {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    /// A `fown_entry`, as it is.
    #[prost(bytes = "vec", required, tag = "3")]
    owner: Vec<u8>,
    #[prost(uint32, required, tag = "4")]
    clock: u32,
    #[prost(uint64, required, tag = "5")]
    ticks: u64,
    #[prost(uint32, required, tag = "6")]
    settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    value_s: u64,
    #[prost(uint64, required, tag = "8")]
    value_ns: u64,
    #[prost(uint64, required, tag = "9")]
    interval_s: u64,
    #[prost(uint64, required, tag = "10")]
    interval_ns: u64,
}

/// The image with every expired timer due; `None` when there is none.
pub(super) fn rearmed(image: &[u8]) -> Result<Option<Vec<u8>>> {
    let head = [IMG_COMMON_MAGIC.to_le_bytes(), FILES_MAGIC.to_le_bytes()].concat();
    let mut rest = image.strip_prefix(&head[..]).context("not an image of files")?;
    let (mut out, mut changed) = (head, false);
    while !rest.is_empty() {
        let (len, tail) = rest.split_first_chunk::<4>().context("half a length")?;
        let len = u32::from_le_bytes(*len) as usize;
        ensure!(len <= tail.len(), "half an entry");
        let (entry, tail) = tail.split_at(len);
        rest = tail;
        let mut file = File::decode(entry).context("decoding a file")?;
        let due = match &mut file.timerfd {
            Some(t) if t.ticks > 0 && t.value_s == 0 && t.value_ns == 0 => {
                t.value_ns = 1;
                true
            }
            _ => false,
        };
        // all others stay as they are, with fields that are not known here
        let entry = if due { file.encode_to_vec() } else { entry.to_vec() };
        changed |= due;
        out.extend(u32::try_from(entry.len())?.to_le_bytes());
        out.extend(entry);
    }
    Ok(changed.then_some(out))
}

/// Rewrites the image in a directory. Fine when there is none.
pub(super) fn rearm(images_dir: &Path) -> Result<()> {
    let path = images_dir.join(FILE);
    let image = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("reading {}", path.display()))?,
    };
    match rearmed(&image).with_context(|| format!("rewriting {}", path.display()))? {
        Some(image) => std::fs::write(&path, image).with_context(|| format!("writing {}", path.display())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut image = [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56].to_vec();
        for entry in entries {
            image.extend((entry.len() as u32).to_le_bytes());
            image.extend(entry);
        }
        image
    }

    fn timer(ticks: u64, value_ns: u64) -> Vec<u8> {
        let timerfd = Timerfd {
            id: 3,
            owner: vec![8, 0],
            clock: 1,
            ticks,
            value_ns,
            interval_ns: 20,
            ..Timerfd::default()
        };
        File { kind: 17, id: 3, timerfd: Some(timerfd) }.encode_to_vec()
    }

    #[test]
    fn only_expired_timers_change() {
        // a file of a kind that is not known here: type 1, id 2, field 3 with two bytes
        let other = vec![0x08, 1, 0x10, 2, 0x1a, 2, 7, 7];
        let running = timer(0, 5);
        let waiting = timer(2, 5);
        assert_eq!(rearmed(&image(&[other.clone(), running.clone(), waiting.clone()])).unwrap(), None);
        let found = rearmed(&image(&[other.clone(), timer(1, 0), running.clone()])).unwrap();
        assert_eq!(found, Some(image(&[other, timer(1, 1), running])));
        assert!(rearmed(b"no image").is_err());
        assert!(rearmed(&image(&[timer(1, 0)])[..14]).is_err());
    }
}
