//! The list of pages that CRIU has written into image files, as the page server would have given it.
//!
//! `pagemap-ID.img` and `pages-N.img` of [`super::images`], the other way round. They are taken out of the images directory: what the
//! destination restores from is made there.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use prost::Message;

use super::images::{IMG_COMMON_MAGIC, PAGEMAP_MAGIC, PagemapEntry, PagemapHead};
use super::page_server::{BUFFER, ImageKind, PE_PRESENT, PageEvent, PageSink, page_size};

/// Gives every memory image in the directory to the sink, and removes it.
#[cfg(any(test, fuzzing))]
pub(super) fn replay(images: &Path, on_pages: &mut PageSink<'_>) -> Result<()> {
    Lists::unwatched(images).rest(on_pages)
}

/// The lists of one dump. Each is taken when CRIU has closed it, which is long before it is done with everything else.
pub(super) struct Lists<'a> {
    images: &'a Path,
    /// Tells which files were closed. Without it all of them are taken in the end.
    closed: Option<Inotify>,
    taken: HashSet<PathBuf>,
}

impl<'a> Lists<'a> {
    /// Of a dump into this directory that has not begun.
    pub fn new(images: &'a Path) -> Self {
        let watch = || -> nix::Result<Inotify> {
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            inotify.add_watch(images, AddWatchFlags::IN_CLOSE_WRITE)?;
            Ok(inotify)
        };
        // a user may have only so many of these
        let closed = watch().inspect_err(|e| log::info!("lists of pages are read late: inotify: {e}")).ok();
        Self { closed, ..Self::unwatched(images) }
    }

    fn unwatched(images: &'a Path) -> Self {
        Self { images, closed: None, taken: HashSet::new() }
    }

    /// Readable when there is one.
    pub fn ready(&self) -> Option<BorrowedFd<'_>> {
        self.closed.as_ref().map(AsFd::as_fd)
    }

    /// Gives to the sink what there is by now.
    pub fn take(&mut self, on_pages: &mut PageSink<'_>) -> Result<()> {
        let Some(closed) = &self.closed else { return Ok(()) };
        let events = match closed.read_events() {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            other => other.context("asking which lists of pages are complete")?,
        };
        // what is not told because of too much at once is found in the end
        for path in events.into_iter().filter_map(|e| Some(self.images.join(e.name?))) {
            if let Some((kind, id)) = subject(&path) {
                self.one(kind, id, path, on_pages)?;
            }
        }
        Ok(())
    }

    /// CRIU has closed everything: gives what is left to the sink, and removes all of it.
    pub fn rest(mut self, on_pages: &mut PageSink<'_>) -> Result<()> {
        if let Some(closed) = self.closed.take() {
            // the kernel waits up to 20 ms before it lets one go (fs/notify/mark.c: synchronize_srcu)
            std::thread::spawn(move || drop(closed));
        }
        let images = self.images;
        let mut all: Vec<(ImageKind, u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(images).with_context(|| format!("reading {}", images.display()))? {
            let path = entry?.path();
            if let Some((kind, id)) = subject(&path) {
                all.push((kind, id, path));
            }
        }
        all.sort();
        for (kind, id, path) in all {
            self.one(kind, id, path, on_pages)?;
        }
        for path in self.taken {
            std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    fn one(&mut self, kind: ImageKind, id: u64, path: PathBuf, on_pages: &mut PageSink<'_>) -> Result<()> {
        if self.taken.contains(&path) {
            return Ok(());
        }
        on_pages(PageEvent::Open { kind, id })?;
        let pages =
            one(&path, self.images, on_pages).with_context(|| format!("reading {}", path.display()))?;
        on_pages(PageEvent::Close)?;
        self.taken.extend([path, pages]);
        Ok(())
    }
}

/// Whose memory an image file lists.
fn subject(path: &Path) -> Option<(ImageKind, u64)> {
    let rest = path.file_name()?.to_str()?.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    match rest.strip_prefix("shmem-") {
        Some(id) => Some((ImageKind::Shmem, id.parse().ok()?)),
        None => Some((ImageKind::Pid, rest.parse().ok()?)),
    }
}

/// Returns the file with the pages' bytes.
fn one(path: &Path, images: &Path, on_pages: &mut PageSink<'_>) -> Result<PathBuf> {
    let bytes = std::fs::read(path)?;
    let magic = [IMG_COMMON_MAGIC.to_le_bytes(), PAGEMAP_MAGIC.to_le_bytes()].concat();
    let mut rest = bytes.strip_prefix(&magic[..]).context("not a list of pages")?;
    let head: PagemapHead = message(&mut rest)?;
    let pages = images.join(format!("pages-{}.img", head.pages_id));
    let mut content = File::open(&pages).with_context(|| format!("opening {}", pages.display()))?;
    let mut buffer = Vec::new();
    while !rest.is_empty() {
        let entry: PagemapEntry = message(&mut rest)?;
        let count = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let flags = entry.flags.context("an entry without flags")?;
        if flags & PE_PRESENT == 0 {
            on_pages(PageEvent::Hole { vaddr: entry.vaddr, pages: count, flags })?;
            continue;
        }
        let len = count.checked_mul(page_size() as u64).context("an impossible run of pages")?;
        let mut done = 0;
        while done < len {
            buffer.resize((len - done).min(BUFFER as u64) as usize, 0);
            content.read_exact(&mut buffer).with_context(|| format!("reading {}", pages.display()))?;
            on_pages(PageEvent::Pages { vaddr: entry.vaddr + done, flags, bytes: &buffer })?;
            done += buffer.len() as u64;
        }
    }
    ensure!(content.read(&mut [0])? == 0, "{} has more than is listed", pages.display());
    Ok(pages)
}

fn message<M: Message + Default>(rest: &mut &[u8]) -> Result<M> {
    let (len, tail) = rest.split_first_chunk::<4>().context("half a length")?;
    let (message, tail) =
        tail.split_at_checked(u32::from_le_bytes(*len) as usize).context("half an entry")?;
    *rest = tail;
    M::decode(message).context("decoding an entry")
}

#[cfg(test)]
mod tests {
    use super::super::images::PageStore;
    use super::super::page_server::{PE_LAZY, PE_PARENT};
    use super::*;

    fn heard(dir: &Path) -> (Result<()>, Vec<String>) {
        let mut all = Vec::new();
        let result = replay(dir, &mut |event| {
            all.push(match event {
                PageEvent::Pages { vaddr, flags, bytes } => {
                    format!("{vaddr:#x} {flags} {} of {}", bytes.len(), bytes[0])
                }
                other => format!("{other:?}"),
            });
            Ok(())
        });
        (result, all)
    }

    fn image(dir: &Path) {
        let mut store = PageStore::new(dir, u64::MAX);
        let page = page_size() as u64;
        let flags = PE_PRESENT | PE_LAZY;
        for event in [
            PageEvent::Open { kind: ImageKind::Pid, id: 7 },
            PageEvent::Hole { vaddr: page, pages: 3, flags: PE_PARENT },
            PageEvent::Pages { vaddr: 9 * page, flags, bytes: &vec![5; page as usize] },
            PageEvent::Hole { vaddr: 11 * page, pages: 1, flags: PE_PARENT },
            PageEvent::Close,
            PageEvent::Open { kind: ImageKind::Shmem, id: 1 },
            PageEvent::Pages { vaddr: 0, flags: PE_PRESENT, bytes: &vec![6; BUFFER + page as usize] },
            PageEvent::Close,
        ] {
            store.event(event).unwrap();
        }
        store.finish().unwrap();
    }

    #[test]
    fn what_was_written_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        std::fs::write(dir.path().join("mm-7.img"), "stays").unwrap();
        let (result, all) = heard(dir.path());
        result.unwrap();
        let page = page_size() as u64;
        let hole = |vaddr, pages| format!("{:?}", PageEvent::Hole { vaddr, pages, flags: PE_PARENT });
        assert_eq!(
            all,
            [
                format!("{:?}", PageEvent::Open { kind: ImageKind::Pid, id: 7 }),
                hole(page, 3),
                format!("{:#x} 6 {page} of 5", 9 * page),
                hole(11 * page, 1),
                "Close".into(),
                format!("{:?}", PageEvent::Open { kind: ImageKind::Shmem, id: 1 }),
                format!("0x0 4 {BUFFER} of 6"),
                format!("{BUFFER:#x} 4 {page} of 6"),
                "Close".into(),
            ]
        );
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["mm-7.img"]);
    }

    #[test]
    fn a_list_is_taken_as_soon_as_it_is_closed() {
        let (made, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        image(made.path());
        let want = heard(made.path()).1;
        image(made.path());
        let mut lists = Lists::new(dir.path());
        let mut all = Vec::new();
        let mut sink = |event: PageEvent<'_>| {
            all.push(matches!(event, PageEvent::Hole { .. }));
            Ok(())
        };
        lists.take(&mut sink).unwrap();
        for name in ["pages-1.img", "mm-7.img", "pagemap-7.img"] {
            let content = std::fs::read(made.path().join(name)).unwrap_or_default();
            let mut file = File::create(dir.path().join(name)).unwrap();
            std::io::Write::write_all(&mut file, &content).unwrap();
            lists.take(&mut sink).unwrap();
        }
        lists.take(&mut sink).unwrap();
        let early = 5;
        for name in ["pages-2.img", "pagemap-shmem-1.img"] {
            std::fs::copy(made.path().join(name), dir.path().join(name)).unwrap();
        }
        lists.rest(&mut sink).unwrap();
        assert_eq!(all.len(), want.len());
        assert_eq!(all[..early], [false, true, false, true, false]);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["mm-7.img"]);
    }

    #[test]
    fn half_an_image_is_an_error() {
        let page = page_size();
        for (name, cut) in [("pagemap-7.img", 3), ("pages-1.img", 1), ("pages-2.img", page)] {
            let dir = tempfile::tempdir().unwrap();
            image(dir.path());
            let file = File::options().write(true).open(dir.path().join(name)).unwrap();
            file.set_len(file.metadata().unwrap().len() - cut as u64).unwrap();
            let e = heard(dir.path()).0.unwrap_err();
            assert!(format!("{e:#}").contains(".img"), "{e:#}");
        }
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let file = File::options().write(true).open(dir.path().join("pages-1.img")).unwrap();
        file.set_len(2 * page as u64).unwrap();
        assert!(format!("{:#}", heard(dir.path()).0.unwrap_err()).contains("more than is listed"));
    }
}
