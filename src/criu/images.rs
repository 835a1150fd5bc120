//! The destination's images directory: memory images written from page events, and the checks on names that come from a peer.
//!
//! Memory images as CRIU 3.x and 4.x read them: `pagemap-ID.img` is the words IMG_COMMON_MAGIC and PAGEMAP_MAGIC, a
//! `pagemap_head` and one `pagemap_entry` per run of pages, each message behind its length in 32 bits (criu/image.c,
//! criu/protobuf.c, images/pagemap.proto); `pages-N.img` is the bytes of the present pages in the same order, without a header.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::page_server::{ImageKind, PE_PRESENT, PageEvent, page_size};

pub(super) const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
pub(super) const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// No dump has more tasks and shared segments than this.
pub(super) const IMAGES_CAP: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// The only count that CRIU before 4.2 knows.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// The count that CRIU from 4.2 on takes if it is there.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}

/// May a peer's image be stored under this name? One component of plain characters, as all of CRIU's own names are.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    ensure!(
        !name.is_empty() && name.len() <= 128 && name.chars().all(plain) && !name.starts_with('.'),
        "the peer names an image {name:?}"
    );
    Ok(())
}

/// Makes a new file of this name in the images directory; refuses names with a path in them and files that exist.
pub fn create(dir: &Path, name: &str) -> Result<File> {
    check_name(name)?;
    let path = dir.join(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    file.with_context(|| format!("making {}", path.display()))
}

/// Is this one of the files that [`PageStore`] writes itself (and that a sender must not send as a plain file)?
pub fn is_memory_image(name: &str) -> bool {
    name.ends_with(".img") && (name.starts_with("pagemap-") || name.starts_with("pages-"))
}

/// The two files of one memory image, written in the order of addresses.
pub(super) struct MemoryImage {
    pagemap: BufWriter<File>,
    /// The bytes of present pages are appended here, by whoever calls [`MemoryImage::run`] for them.
    pub pages: File,
    page_size: u64,
    /// The run that grows.
    run: Option<(u64, u64, u32)>,
}

/// Writes a dump's memory images, fed with the dump's page events in order.
pub struct PageStore {
    dir: PathBuf,
    page_size: u64,
    next_pages_id: u32,
    seen: HashSet<(ImageKind, u64)>,
    open: Option<MemoryImage>,
    bytes: u64,
    cap: u64,
}

impl PageStore {
    /// A store in this directory that takes no more than `cap` bytes of pages.
    pub fn new(dir: &Path, cap: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            page_size: page_size() as u64,
            next_pages_id: 1,
            seen: HashSet::new(),
            open: None,
            bytes: 0,
            cap,
        }
    }

    /// Takes one event. After an error the store is of no more use.
    pub fn event(&mut self, event: PageEvent<'_>) -> Result<()> {
        match event {
            PageEvent::Open { kind, id } => self.open(kind, id),
            PageEvent::Pages { vaddr, flags, bytes } => {
                let size = self.page_size;
                ensure!(
                    !bytes.is_empty() && (bytes.len() as u64).is_multiple_of(size),
                    "pages of {} bytes",
                    bytes.len()
                );
                ensure!(flags & PE_PRESENT != 0, "pages with bytes but flags {flags:#x}");
                self.bytes += bytes.len() as u64;
                ensure!(self.bytes <= self.cap, "the memory is larger than the {} bytes announced", self.cap);
                let open = self.current()?;
                open.run(vaddr, bytes.len() as u64 / size, flags)?;
                open.pages.write_all(bytes).context("writing pages")
            }
            PageEvent::Hole { vaddr, pages, flags } => {
                ensure!(flags & PE_PRESENT == 0, "a hole with flags {flags:#x}");
                self.current()?.run(vaddr, pages, flags)
            }
            PageEvent::Idle => Ok(()),
            PageEvent::Close => self.open.take().context("a memory image ends that was not begun")?.close(),
        }
    }

    /// Bytes of pages stored so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The dump is complete.
    pub fn finish(self) -> Result<u64> {
        if self.open.is_some() {
            bail!("the memory ends in the middle of an image");
        }
        Ok(self.bytes)
    }

    fn current(&mut self) -> Result<&mut MemoryImage> {
        self.open.as_mut().context("pages outside a memory image")
    }

    fn open(&mut self, kind: ImageKind, id: u64) -> Result<()> {
        ensure!(self.open.is_none(), "a memory image begins inside another");
        ensure!(self.seen.len() < IMAGES_CAP, "more than {IMAGES_CAP} memory images");
        ensure!(self.seen.insert((kind, id)), "the memory image {kind:?} {id} comes twice");
        self.open = Some(MemoryImage::create(&self.dir, kind, id, self.next_pages_id)?);
        self.next_pages_id += 1;
        Ok(())
    }
}

impl MemoryImage {
    /// Makes the files; `pages_id` must be another for each image in the directory.
    pub fn create(dir: &Path, kind: ImageKind, id: u64, pages_id: u32) -> Result<Self> {
        let name = match kind {
            ImageKind::Pid => {
                ensure!(id > 0 && id <= i32::MAX as u64, "a memory image for pid {id}");
                format!("pagemap-{id}.img")
            }
            ImageKind::Shmem => format!("pagemap-shmem-{id}.img"),
        };
        let mut pagemap = BufWriter::new(create(dir, &name)?);
        let pages = create(dir, &format!("pages-{pages_id}.img"))?;
        pagemap.write_all(&IMG_COMMON_MAGIC.to_le_bytes()).context("writing a pagemap")?;
        pagemap.write_all(&PAGEMAP_MAGIC.to_le_bytes()).context("writing a pagemap")?;
        write_message(&mut pagemap, &PagemapHead { pages_id })?;
        Ok(Self { pagemap, pages, page_size: page_size() as u64, run: None })
    }

    /// Notes a run; pieces of one run become one entry again.
    pub fn run(&mut self, vaddr: u64, pages: u64, flags: u32) -> Result<()> {
        let size = self.page_size;
        let end = pages.checked_mul(size).and_then(|n| vaddr.checked_add(n));
        ensure!(pages > 0 && vaddr.is_multiple_of(size) && end.is_some(), "{pages} pages at {vaddr:#x}");
        match &mut self.run {
            // Older CRIU counts in 32 bits.
            Some((at, n, f))
                if *at + *n * size == vaddr && *f == flags && *n + pages <= u64::from(u32::MAX) =>
            {
                *n += pages
            }
            Some((at, n, _)) => {
                ensure!(
                    *at + *n * size <= vaddr,
                    "pages at {vaddr:#x} after those up to {:#x}",
                    *at + *n * size
                );
                self.entry()?;
                self.run = Some((vaddr, pages, flags));
            }
            None => self.run = Some((vaddr, pages, flags)),
        }
        Ok(())
    }

    fn entry(&mut self) -> Result<()> {
        let Some((vaddr, pages, flags)) = self.run.take() else { return Ok(()) };
        let compat_nr_pages = u32::try_from(pages).unwrap_or(u32::MAX);
        write_message(
            &mut self.pagemap,
            &PagemapEntry { vaddr, compat_nr_pages, flags: Some(flags), nr_pages: Some(pages) },
        )
    }

    /// The image is complete.
    pub fn close(mut self) -> Result<()> {
        self.entry()?;
        self.pagemap.flush().context("writing a pagemap")
    }
}

fn write_message(out: &mut impl Write, message: &impl Message) -> Result<()> {
    let bytes = message.encode_to_vec();
    out.write_all(&u32::try_from(bytes.len()).context("an image's entry")?.to_le_bytes())
        .context("writing a pagemap")?;
    out.write_all(&bytes).context("writing a pagemap")
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::page_server::PE_LAZY;
    use super::*;

    pub fn decode(path: &Path) -> (u32, Vec<PagemapEntry>) {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(&bytes[..8], [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56]);
        let mut rest = &bytes[8..];
        let mut next = || {
            let (len, tail) = rest.split_first_chunk::<4>()?;
            let (message, tail) = tail.split_at(u32::from_le_bytes(*len) as usize);
            rest = tail;
            Some(message)
        };
        let head = PagemapHead::decode(next().unwrap()).unwrap();
        let entries = std::iter::from_fn(next).map(|m| PagemapEntry::decode(m).unwrap()).collect();
        (head.pages_id, entries)
    }

    pub fn entry(vaddr: u64, n: u32, flags: u32) -> PagemapEntry {
        PagemapEntry { vaddr, compat_nr_pages: n, flags: Some(flags), nr_pages: Some(u64::from(n)) }
    }

    #[test]
    fn what_was_written_decodes_to_what_was_sent() {
        let size = page_size() as u64;
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageStore::new(dir.path(), 1 << 30);
        let page = |b: u8, n: u64| vec![b; (n * size) as usize];
        store.event(PageEvent::Open { kind: ImageKind::Pid, id: 1 }).unwrap();
        store.event(PageEvent::Pages { vaddr: 16 * size, flags: PE_PRESENT, bytes: &page(1, 2) }).unwrap();
        store.event(PageEvent::Pages { vaddr: 18 * size, flags: PE_PRESENT, bytes: &page(2, 1) }).unwrap();
        store
            .event(PageEvent::Pages { vaddr: 19 * size, flags: PE_PRESENT | PE_LAZY, bytes: &page(3, 1) })
            .unwrap();
        store.event(PageEvent::Hole { vaddr: 20 * size, pages: 3, flags: PE_LAZY }).unwrap();
        store.event(PageEvent::Close).unwrap();
        store.event(PageEvent::Open { kind: ImageKind::Shmem, id: 4_000_000_000 }).unwrap();
        store.event(PageEvent::Pages { vaddr: 0, flags: PE_PRESENT, bytes: &page(4, 1) }).unwrap();
        store.event(PageEvent::Close).unwrap();
        assert_eq!(store.finish().unwrap(), 5 * size);

        let (id, entries) = decode(&dir.path().join("pagemap-1.img"));
        assert_eq!(entries, [entry(16 * size, 3, 4), entry(19 * size, 1, 6), entry(20 * size, 3, 2)]);
        let pages = std::fs::read(dir.path().join(format!("pages-{id}.img"))).unwrap();
        assert_eq!(pages, [page(1, 2), page(2, 1), page(3, 1)].concat());
        let (id2, entries) = decode(&dir.path().join("pagemap-shmem-4000000000.img"));
        assert_eq!(entries, [entry(0, 1, 4)]);
        assert_ne!(id, id2);
    }

    #[test]
    fn events_out_of_order_are_refused() {
        let size = page_size();
        let page = vec![0; size];
        let pages = |vaddr| PageEvent::Pages { vaddr, flags: PE_PRESENT, bytes: &page };
        let open = PageEvent::Open { kind: ImageKind::Pid, id: 1 };
        for bad in [
            vec![pages(0)],
            vec![PageEvent::Close],
            vec![open, open],
            vec![open, PageEvent::Close, open],
            vec![PageEvent::Open { kind: ImageKind::Pid, id: 0 }],
            vec![open, pages(size as u64 * 2), pages(size as u64)],
            vec![open, pages(1)],
            vec![open, PageEvent::Pages { vaddr: 0, flags: 0, bytes: &page }],
            vec![open, PageEvent::Hole { vaddr: 0, pages: u64::MAX, flags: 1 }],
            vec![open, pages(0), pages(size as u64), pages(2 * size as u64)],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut store = PageStore::new(dir.path(), 2 * size as u64);
            assert!(bad.iter().any(|e| store.event(*e).is_err()), "{bad:?}");
        }
    }

    #[test]
    fn names_with_a_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "..", "a/b", "/etc/passwd", ".hidden", "a\0b", "a b", &"x".repeat(129)] {
            assert!(create(dir.path(), bad).is_err(), "{bad:?}");
        }
        create(dir.path(), "core-1.img").unwrap();
        assert!(create(dir.path(), "core-1.img").is_err(), "an image must not be written twice");
        assert!(
            is_memory_image("pages-1.img")
                && is_memory_image("pagemap-shmem-3.img")
                && !is_memory_image("mm-1.img")
        );
    }
}
