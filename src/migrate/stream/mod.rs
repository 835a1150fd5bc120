//! The container's state as frames: memory, image files, writable layer, queued stdio. The same for a peer and for a
//! checkpoint file.
//!
//! ```text
//! PagesOpen  kind u8 (1 process, 2 shared memory), id u64         LayerEntry  rootfs::Entry
//! Pages      vaddr u64, flags u32, bytes                          LayerData   offset u64, bytes
//! PagesHole  (vaddr u64, pages u64, flags u32)*                   File        JSON FileHeader, then FileData frames
//! ```
//!
//! All integers are little-endian. Nothing here is ever stored as a whole: what CRIU hands over goes out at once.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::codec::Kind;
use super::link::Link;
use super::protocol::{FileHeader, Final};
use super::tmpfs::{Piece, Stage};
use crate::control::Limits;
use crate::criu::page_server::page_size;
use crate::criu::plan::{EagerPolicy, Plan, Planner};
use crate::criu::{ImageKind, PageEvent, PageStore};
use crate::memory::read::Chunk;
use crate::memory::sets::decode_ranges;
use crate::memory::store::{Store, ranges_cap};
use crate::memory::{RangeSet, Space, batch};
use crate::rootfs::{self, Apply, CaptureOptions, Entry, Sink, WritableLayer};

/// Content bytes in one frame.
const PIECE: usize = 1 << 20;
/// Bytes of one run in a PagesHole frame.
const HOLE: usize = 20;
/// Runs in one PagesHole frame at most.
const HOLES: usize = Kind::PagesHole.cap() / HOLE;

/// Counts what goes through, on either side and when a file is verified.
#[derive(Debug, Default)]
pub struct Counter {
    totals: Final,
    file_left: u64,
}

impl Counter {
    /// Takes note of one frame.
    ///
    /// # Errors
    /// The frame does not fit what came before it.
    pub fn count(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let t = &mut self.totals;
        if kind != Kind::FileData {
            ensure!(self.file_left == 0, "{} bytes of an image file are missing", self.file_left);
        }
        match kind {
            Kind::File => {
                t.files += 1;
                self.file_left = serde_json::from_slice::<FileHeader>(payload)?.size;
            }
            Kind::FileData => {
                let len = payload.len() as u64;
                ensure!(len <= self.file_left, "an image file is longer than announced");
                self.file_left -= len;
                t.file_bytes += len;
            }
            Kind::Pages => {
                let (_, _, bytes) = decode_pages(payload)?;
                t.pages += (bytes.len() / page_size()) as u64;
                t.page_bytes += bytes.len() as u64;
            }
            Kind::LayerEntry => t.layer_entries += 1,
            // what is said about a file is counted by its content alone
            Kind::Staged => {
                if let Piece::Data { bytes, .. } = Piece::decode(payload)? {
                    t.tmpfs_bytes += bytes.len() as u64;
                }
            }
            Kind::LayerData => t.layer_bytes += payload.len().saturating_sub(8) as u64,
            Kind::Frozen | Kind::PagesOpen | Kind::PagesHole | Kind::PagesClose => {}
            // memory that travels while the container runs is checked by the page: see `Planner`
            Kind::Memory | Kind::RemotePages | Kind::HotPages => {}
            Kind::LayerEnd | Kind::Stdio => {}
            other => bail!("a {other:?} frame inside the container's state"),
        }
        Ok(())
    }

    /// What was counted.
    pub fn totals(&self) -> Final {
        self.totals.clone()
    }
}

/// Sends the state; counts what it sends. Borrowed by closures of the dump, therefore one object for all parts.
pub struct Sender<'a> {
    link: &'a Link,
    counter: Counter,
    entry: Vec<u8>,
    /// Runs of pages without bytes that wait to be sent together: there may be very many.
    holes: Vec<u8>,
}

impl<'a> Sender<'a> {
    /// Sends through `link`.
    pub(super) fn new(link: &'a Link) -> Self {
        Sender { link, counter: Counter::default(), entry: Vec::new(), holes: Vec::new() }
    }

    fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<()> {
        self.link.frame(kind, parts)
    }

    /// One event of CRIU's dump.
    pub fn pages(&mut self, event: PageEvent<'_>) -> Result<()> {
        if let PageEvent::Hole { vaddr, pages, flags } = event {
            self.holes.extend_from_slice(&hole_bytes(vaddr, pages, flags));
            return if self.holes.len() < HOLES * HOLE { Ok(()) } else { self.send_holes() };
        }
        self.send_holes()?;
        match event {
            PageEvent::Open { kind, id } => {
                self.frame(Kind::PagesOpen, &[&[kind_number(kind)], &id.to_le_bytes()])
            }
            PageEvent::Pages { vaddr, flags, bytes } => {
                for (n, piece) in bytes.chunks(PIECE).enumerate() {
                    let vaddr = vaddr + (n * PIECE) as u64;
                    self.frame(Kind::Pages, &[&vaddr.to_le_bytes(), &flags.to_le_bytes(), piece])?;
                }
                self.counter.totals.pages += (bytes.len() / page_size()) as u64;
                self.counter.totals.page_bytes += bytes.len() as u64;
                Ok(())
            }
            PageEvent::Close => self.frame(Kind::PagesClose, &[]),
            PageEvent::Hole { .. } => Ok(()),
            PageEvent::Idle => self.link.wire().alive(),
        }
    }

    fn send_holes(&mut self) -> Result<()> {
        if !self.holes.is_empty() {
            self.link.frame(Kind::PagesHole, &[&self.holes])?;
            self.holes.clear();
        }
        Ok(())
    }

    /// Every plain file of CRIU's images directory, by name, but for those that were sent before; it holds metadata only.
    pub fn files(&mut self, dir: &Path, sent: &HashSet<OsString>) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .with_context(|| format!("reading {}", dir.display()))?
            .map(|e| Ok(e?.file_name()))
            .collect::<Result<_>>()?;
        names.sort();
        let mut buf = vec![0; PIECE];
        for name in names.into_iter().filter(|name| !sent.contains(name)) {
            let path = dir.join(&name);
            let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                continue;
            }
            let header = FileHeader { name: name.to_string_lossy().into_owned(), size: meta.len() };
            ensure!(header.is_safe(), "CRIU wrote an image with an odd name: {}", path.display());
            self.link.json(Kind::File, &header)?;
            let mut left = header.size as usize;
            while left > 0 {
                let n = left.min(PIECE);
                file.read_exact(&mut buf[..n]).with_context(|| format!("reading {}", path.display()))?;
                self.frame(Kind::FileData, &[&buf[..n]])?;
                left -= n;
            }
            self.counter.totals.files += 1;
            self.counter.totals.file_bytes += header.size;
        }
        Ok(())
    }

    /// The writable layer.
    pub fn layer(&mut self, layer: &WritableLayer) -> Result<()> {
        rootfs::capture(&layer.dir, &CaptureOptions::for_layer(layer), self)
            .context("reading the writable layer")?;
        self.layer_end()
    }

    /// A round of the writable layer is complete.
    pub(super) fn layer_end(&mut self) -> Result<()> {
        self.frame(Kind::LayerEnd, &[b"{}"])
    }

    /// Stdio that was queued at the freeze.
    pub fn stdio(&mut self, carry: &Value) -> Result<()> {
        self.link.json(Kind::Stdio, carry)
    }

    /// So many bytes of tmpfs files have been sent beside this.
    pub(super) fn tmpfs_sent(&mut self, bytes: u64) {
        self.counter.totals.tmpfs_bytes += bytes;
    }

    /// Bytes sent so far, see [`Wire::bytes`].
    pub fn sent(&self) -> u64 {
        self.link.wire().bytes().0
    }

    /// Says that this was everything.
    pub fn finish(&mut self) -> Result<Final> {
        let totals = self.counter.totals();
        self.link.json(Kind::Final, &totals)?;
        self.link.flush()?;
        Ok(totals)
    }
}

impl Sink for Sender<'_> {
    fn entry(&mut self, e: &Entry) -> Result<()> {
        self.counter.totals.layer_entries += 1;
        self.entry.clear();
        e.encode(&mut self.entry);
        self.link.frame(Kind::LayerEntry, &[&self.entry])
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            self.frame(Kind::LayerData, &[&(offset + (n * PIECE) as u64).to_le_bytes(), piece])?;
        }
        self.counter.totals.layer_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// What CRIU restores itself. Less than this is there sooner than the page daemon could serve it; of more, what was written
/// last will be touched first.
const EAGER: EagerPolicy = EagerPolicy { eager_max: 24 << 20, hot_max: 8 << 20 };

/// Where memory goes.
enum Memory {
    /// CRIU's own pages, in its own order, straight into images.
    Whole(PageStore),
    /// Pages in any order and again and again; images are made at the end.
    Live(Box<LiveMemory>),
}

struct LiveMemory {
    store: Store,
    planner: Planner,
    remote: BTreeMap<Space, RangeSet>,
    hot: BTreeMap<Space, RangeSet>,
    /// So many more ranges may come for both.
    ranges_left: usize,
    scratch: Vec<u8>,
    stage: Stage,
}

/// What a live migration has brought when everything has come.
pub(super) struct Whole {
    /// Stdio that was queued at the freeze.
    pub carry: Value,
    /// The pages.
    pub store: Store,
    /// Which of them the page daemon serves.
    pub plan: Plan,
}

/// Takes the state in: images into a directory on tmpfs, the layer into its place.
pub struct Receiver {
    images: PathBuf,
    pages: Memory,
    file: Option<File>,
    /// Bytes that image files may still take.
    room: u64,
    layer: Option<Apply>,
    layer_rounds: u32,
    /// Further rounds of the layer follow the one that comes.
    open_ended: bool,
    carry: Value,
    counter: Counter,
}

impl Receiver {
    /// Images go into the empty directory `images` (no more than the limits allow), the layer of the container with this
    /// spec into `layer`.
    pub fn new(images: &Path, layer: &WritableLayer, limits: &Limits, spec: &Value) -> Result<Receiver> {
        Self::with(images, layer, limits, spec, Memory::Whole(PageStore::new(images, limits.memory_cap)))
    }

    /// The same for a live migration.
    pub(super) fn live(
        images: &Path,
        layer: &WritableLayer,
        limits: &Limits,
        spec: &Value,
    ) -> Result<Receiver> {
        let memory_cap = limits.memory_cap;
        let memory = LiveMemory {
            store: Store::new(memory_cap)?,
            planner: Planner::new(images, EAGER).cap(memory_cap),
            remote: BTreeMap::new(),
            hot: BTreeMap::new(),
            ranges_left: 2 * ranges_cap(memory_cap),
            scratch: Vec::new(),
            stage: Stage::create(images, memory_cap)?,
        };
        Self::with(images, layer, limits, spec, Memory::Live(Box::new(memory)))
    }

    fn with(
        images: &Path,
        layer: &WritableLayer,
        limits: &Limits,
        spec: &Value,
        pages: Memory,
    ) -> Result<Receiver> {
        Ok(Receiver {
            images: images.to_owned(),
            file: None,
            room: limits.memory_cap,
            layer: Some(Apply::for_layer(layer)?.only_devices(limits.policy.nodes(spec))),
            layer_rounds: 0,
            open_ended: matches!(pages, Memory::Live(_)),
            pages,
            carry: Value::Null,
            counter: Counter::default(),
        })
    }

    /// Bytes of pages that the store of a live migration holds.
    pub(super) fn stored(&self) -> u64 {
        match &self.pages {
            Memory::Whole(pages) => pages.bytes(),
            Memory::Live(memory) => memory.store.bytes(),
        }
    }

    /// The root file system is mounted there: what comes now changes a mounted layer.
    ///
    /// # Errors
    /// [`NeedsUnmount`](crate::rootfs::NeedsUnmount) if it cannot; it can without the mount.
    pub(super) fn layer_mounted(&mut self, merged: &Path) -> Result<()> {
        ensure!(self.layer_rounds > 0, "the source prepares before it has sent any of the writable layer");
        self.layer.as_mut().context("the writable layer was complete already")?.through(merged, None)
    }

    /// The root file system is not mounted any more.
    pub(super) fn layer_unmounted(&mut self) -> Result<()> {
        self.layer.as_mut().context("the writable layer was complete already")?.unmounted()
    }

    fn page_event(&mut self, event: PageEvent<'_>) -> Result<()> {
        match &mut self.pages {
            Memory::Whole(pages) => pages.event(event),
            Memory::Live(memory) => memory.planner.event(event),
        }
    }

    fn live_memory(&mut self) -> Result<&mut LiveMemory> {
        match &mut self.pages {
            Memory::Live(memory) => Ok(memory),
            Memory::Whole(_) => bail!("memory of a live migration in one that is not live"),
        }
    }

    /// Takes a frame once more that [`Receiver::take`] has refused without having done anything but count it.
    pub(super) fn take_again(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let counted = self.counter.totals();
        self.take(kind, payload)?;
        self.counter.totals = counted;
        Ok(())
    }

    /// Takes one frame of the state.
    ///
    /// # Errors
    /// It does not fit what came before, or could not be written.
    pub fn take(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        self.counter.count(kind, payload)?;
        match kind {
            Kind::PagesOpen => {
                ensure!(payload.len() == 9, "a PagesOpen frame of {} bytes", payload.len());
                self.page_event(PageEvent::Open { kind: kind_of(payload[0])?, id: u64_at(payload, 1) })
            }
            Kind::Pages => {
                let (vaddr, flags, bytes) = decode_pages(payload)?;
                self.page_event(PageEvent::Pages { vaddr, flags, bytes })
            }
            Kind::PagesHole => holes(payload)?.try_for_each(|(vaddr, pages, flags)| {
                self.page_event(PageEvent::Hole { vaddr, pages, flags })
            }),
            Kind::PagesClose => self.page_event(PageEvent::Close),
            Kind::Memory => {
                let LiveMemory { store, scratch, .. } = self.live_memory()?;
                let batch = batch::decode(payload, scratch)?;
                let space = batch.space();
                for chunk in batch.chunks() {
                    match chunk {
                        Chunk::Data { vaddr, bytes } => store.put(space, vaddr, bytes)?,
                        Chunk::Zero { vaddr, len } => store.zero(space, vaddr, len)?,
                        Chunk::Gone { .. } => {}
                    }
                }
                Ok(())
            }
            Kind::RemotePages | Kind::HotPages => {
                let memory = self.live_memory()?;
                let set = if kind == Kind::HotPages { &mut memory.hot } else { &mut memory.remote };
                let (space, ranges) = decode_ranges(payload)?;
                let left = memory.ranges_left.checked_sub(ranges.len());
                memory.ranges_left =
                    left.context("the source names more ranges of pages than it may have pages")?;
                let all = set.entry(space).or_default();
                // frames follow in ascending order: this only appends
                ranges.iter().for_each(|range| all.insert(range));
                Ok(())
            }
            Kind::Staged => self.live_memory()?.stage.take(payload),
            Kind::Frozen => {
                // what came before was brought up to date again and again; from here on everything is counted
                self.counter = Counter::default();
                self.open_ended = false;
                Ok(())
            }
            Kind::File => {
                let header: FileHeader = serde_json::from_slice(payload).context("an image file's header")?;
                ensure!(header.is_safe(), "an image file with the name {:?}", header.name);
                // an empty one takes some too
                let room = self.room.checked_sub(header.size.saturating_add(page_size() as u64));
                self.room = room.context("the images need more memory than this node allows")?;
                let path = self.images.join(&header.name);
                // O_EXCL: one image never overwrites another
                let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
                self.file = Some(open.with_context(|| format!("creating {}", path.display()))?);
                Ok(())
            }
            Kind::FileData => {
                let file = self.file.as_mut().context("image bytes without a file")?;
                file.write_all(payload).context("writing an image file (is the tmpfs full?)")
            }
            Kind::LayerEntry => {
                let entry = Entry::decode(payload)?;
                self.layer.as_mut().context("a layer entry after the layer's end")?.entry(&entry)
            }
            Kind::LayerData => {
                ensure!(payload.len() >= 8, "a LayerData frame of {} bytes", payload.len());
                let layer = self.layer.as_mut().context("layer content after the layer's end")?;
                layer.data(u64_at(payload, 0), &payload[8..])
            }
            Kind::LayerEnd => {
                let layer = self.layer.as_mut().context("the layer ends twice")?;
                layer.round().context("finishing a round of the writable layer")?;
                self.layer_rounds += 1;
                if !self.open_ended {
                    let layer = self.layer.take().context("the layer ends twice")?;
                    layer.finish_rounds().context("finishing the writable layer")?;
                }
                Ok(())
            }
            Kind::Stdio => {
                self.carry = serde_json::from_slice(payload).context("queued stdio")?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The stream said that it is complete.
    ///
    /// # Errors
    /// Something is missing.
    pub fn finish(self, announced: &Final) -> Result<Value> {
        self.complete(announced)?;
        match self.pages {
            Memory::Whole(pages) => pages.finish().context("writing the memory images")?,
            Memory::Live(_) => bail!("a live migration ends as one that is not live"),
        };
        Ok(self.carry)
    }

    /// The same for a live migration: memory images are made of what has come.
    ///
    /// # Errors
    /// Something is missing, also a single page.
    pub(super) fn finish_live(self, announced: &Final) -> Result<Whole> {
        self.complete(announced)?;
        let Memory::Live(memory) = self.pages else { bail!("no live migration") };
        let LiveMemory { store, planner, remote, hot, .. } = *memory;
        let (remote, hot): (Vec<_>, Vec<_>) = (remote.into_iter().collect(), hot.into_iter().collect());
        let plan = planner.finish(&store, &remote, &hot).context("making CRIU's memory images")?;
        Ok(Whole { carry: self.carry, store, plan })
    }

    fn complete(&self, announced: &Final) -> Result<()> {
        ensure!(self.layer.is_none(), "the writable layer did not arrive whole");
        let got = self.counter.totals();
        ensure!(got == *announced, "not everything arrived: {got:?} of {announced:?}");
        Ok(())
    }
}

fn kind_number(kind: ImageKind) -> u8 {
    match kind {
        ImageKind::Pid => 1,
        ImageKind::Shmem => 2,
    }
}

fn kind_of(number: u8) -> Result<ImageKind> {
    match number {
        1 => Ok(ImageKind::Pid),
        2 => Ok(ImageKind::Shmem),
        n => bail!("memory of unknown kind {n}"),
    }
}

pub(super) fn decode_pages(payload: &[u8]) -> Result<(u64, u32, &[u8])> {
    ensure!(payload.len() >= 12, "a Pages frame of {} bytes", payload.len());
    let flags = u32::from_le_bytes(payload[8..12].try_into()?);
    ensure!(
        payload[12..].len().is_multiple_of(page_size()),
        "a Pages frame that is no whole number of pages"
    );
    Ok((u64_at(payload, 0), flags, &payload[12..]))
}

/// One run of a PagesHole frame.
fn hole_bytes(vaddr: u64, pages: u64, flags: u32) -> [u8; HOLE] {
    let mut hole = [0; HOLE];
    hole[..8].copy_from_slice(&vaddr.to_le_bytes());
    hole[8..16].copy_from_slice(&pages.to_le_bytes());
    hole[16..].copy_from_slice(&flags.to_le_bytes());
    hole
}

/// The runs of a PagesHole frame: addresses, numbers of pages, flags.
fn holes(payload: &[u8]) -> Result<impl Iterator<Item = (u64, u64, u32)> + '_> {
    let (holes, rest) = payload.as_chunks::<HOLE>();
    ensure!(rest.is_empty() && !holes.is_empty(), "a PagesHole frame of {} bytes", payload.len());
    Ok(holes.iter().map(|hole| {
        let flags = u32::from_le_bytes([hole[16], hole[17], hole[18], hole[19]]);
        (u64_at(hole, 0), u64_at(hole, 8), flags)
    }))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes, length checked by the caller"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_without_bytes_come_back() {
        let all: Vec<(u64, u64, u32)> = (0..HOLES as u64).map(|n| (n << 20, n + 1, n as u32 % 3)).collect();
        let payload: Vec<u8> = all.iter().flat_map(|(a, n, f)| hole_bytes(*a, *n, *f)).collect();
        assert!(payload.len() <= Kind::PagesHole.cap(), "a full frame may be sent");
        assert_eq!(holes(&payload).unwrap().collect::<Vec<_>>(), all);
        for wrong in [&payload[..0], &payload[..HOLE - 1], &payload[..HOLE + 1]] {
            assert!(holes(wrong).is_err());
        }
    }
}
