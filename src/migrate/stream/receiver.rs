//! The state taken in: memory, image files, the writable layer. What it lacks when everything has come is an error.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Counter, decode_pages, holes, kind_of, u64_at};
use crate::control::Limits;
use crate::criu::page_server::page_size;
use crate::criu::plan::{EagerPolicy, Plan, Planner};
use crate::criu::{PageEvent, PageStore};
use crate::memory::read::Chunk;
use crate::memory::sets::{decode_bits, decode_ranges};
use crate::memory::store::{Store, ranges_cap};
use crate::memory::{RangeSet, Space, batch};
use crate::migrate::codec::Kind;
use crate::migrate::protocol::{FileHeader, Final};
use crate::migrate::tmpfs::Stage;
use crate::rootfs::{Apply, Entry, Sink, WritableLayer};

/// What CRIU restores itself. Less than this is there sooner than the page daemon could serve it; of more, what was written
/// last will be touched first.
pub(crate) const EAGER: EagerPolicy = EagerPolicy { eager_max: 24 << 20, hot_max: 1 << 20 };

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
pub(in crate::migrate) struct Whole {
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
    pub(in crate::migrate) fn live(
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
    pub(in crate::migrate) fn stored(&self) -> u64 {
        match &self.pages {
            Memory::Whole(pages) => pages.bytes(),
            Memory::Live(memory) => memory.store.bytes(),
        }
    }

    /// The root file system is mounted there: what comes now changes a mounted layer.
    ///
    /// # Errors
    /// [`NeedsUnmount`](crate::rootfs::NeedsUnmount) if it cannot; it can without the mount.
    pub(in crate::migrate) fn layer_mounted(&mut self, merged: &Path) -> Result<()> {
        ensure!(self.layer_rounds > 0, "the source prepares before it has sent any of the writable layer");
        self.layer.as_mut().context("the writable layer was complete already")?.through(merged, None)
    }

    /// The root file system is not mounted any more.
    pub(in crate::migrate) fn layer_unmounted(&mut self) -> Result<()> {
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
    pub(in crate::migrate) fn take_again(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
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
            Kind::PagesExist => self.live_memory()?.planner.exist(&decode_bits(payload)?),
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
    pub(in crate::migrate) fn finish_live(self, announced: &Final) -> Result<Whole> {
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
