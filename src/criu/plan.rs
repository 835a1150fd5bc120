//! The destination's memory images after a dump that left memory alone: which pages go into the images, and which the tasks get
//! while they run.
//!
//! What CRIU reported is the list of pages that must exist. Each of them is one of these:
//!
//! | page | becomes |
//! |---|---|
//! | sent with its bytes | present |
//! | stored, in a mapping that cannot be lazy | present |
//! | stored, wanted at once (hot), or memory is small | present |
//! | stored | lazy: served by the page daemon |
//! | zero, in anonymous memory | nothing: it is zero by itself |
//! | still on the source | lazy, remote |
//!
//! Anything else is an error, before the commit. A restore without `lazy-pages` takes the images only if [`Plan::is_eager`].
//! A lazy entry is no promise of content but an address range that the restore leaves alone. From the first lazy page of a mapping to the
//! last one, what is not present is therefore one entry: memory may be in very many pieces, and CRIU takes its time for each.
//! A present entry is never marked lazy: CRIU would skip it (`restore_priv_vma_content`, criu/mem.c). Shared memory is never lazy.
//!
//! With present and lazy pages in one mapping, a huge page that the restore faults in would cover lazy pages as well, which then never
//! fault: CRIU has to restore with transparent huge pages off (see [`super::gate_server::Opening`]).

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::images::{IMAGES_CAP, MemoryImage};
use super::mm_image::Mappings;
use super::page_server::{ImageKind, PE_LAZY, PE_PRESENT, PageEvent, page_size};
use crate::memory::store::{Found, Store};
use crate::memory::{RangeSet, Space};

/// Of each main stack, so much is wanted at once.
const STACK: u64 = 256 << 10;
/// No dump has more runs of pages than this.
const RUNS_CAP: usize = 1 << 26;

/// What is put into the images although it could be lazy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EagerPolicy {
    /// Everything, if it is at most so many bytes and nothing is on the source any more.
    pub eager_max: u64,
    /// Otherwise at most so many bytes of stacks and hot pages.
    pub hot_max: u64,
}

/// What the images leave to the page daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pages that are stored here and served when they are touched, or before.
    pub lazy: Vec<(Space, RangeSet)>,
    /// Pages that are still on the source.
    pub remote: Vec<(Space, RangeSet)>,
    /// Bytes in the images.
    pub eager_bytes: u64,
    /// Bytes in [`Plan::lazy`].
    pub lazy_bytes: u64,
}

impl Plan {
    /// The images are complete: no page daemon is needed.
    pub fn is_eager(&self) -> bool {
        self.lazy.is_empty() && self.remote.is_empty()
    }
}

/// Where the content of a run of pages is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// In the spill file, from here on.
    Spill(u64),
    Store,
    Zero,
    /// Not in the images.
    Lazy,
}

/// One memory image on its way.
struct Image {
    space: Space,
    files: MemoryImage,
    holes: RangeSet,
    /// Pages that came with bytes after the first hole; those before are in the image already.
    spilled: Vec<(Range<u64>, u64)>,
    spill: Option<(File, u64)>,
    /// Where the last run ended: CRIU sends them in order.
    end: u64,
}

/// Takes a live dump's page events, and then makes the images.
pub struct Planner {
    dir: PathBuf,
    policy: EagerPolicy,
    cap: u64,
    page: u64,
    bytes: u64,
    runs: usize,
    seen: HashSet<Space>,
    images: Vec<Image>,
    open: bool,
}

impl Planner {
    /// For images in this directory.
    pub fn new(images: &Path, policy: EagerPolicy) -> Self {
        Self {
            dir: images.to_owned(),
            policy,
            cap: u64::MAX,
            page: page_size() as u64,
            bytes: 0,
            runs: 0,
            seen: HashSet::new(),
            images: Vec::new(),
            open: false,
        }
    }

    /// Takes no more than so many bytes of pages in events.
    pub fn cap(self, cap: u64) -> Self {
        Self { cap, ..self }
    }

    /// Takes one event. After an error the planner is of no more use.
    pub fn event(&mut self, event: PageEvent<'_>) -> Result<()> {
        match event {
            PageEvent::Open { kind, id } => self.open(Space { kind, id }),
            PageEvent::Pages { vaddr, flags, bytes } => {
                let len = bytes.len() as u64;
                ensure!(len > 0 && len.is_multiple_of(self.page), "pages of {len} bytes");
                ensure!(flags & PE_PRESENT != 0, "pages with bytes but flags {flags:#x}");
                self.bytes += len;
                ensure!(self.bytes <= self.cap, "the memory is larger than the {} bytes announced", self.cap);
                let (page, dir) = (self.page, self.dir.clone());
                let image = self.current(vaddr, len)?;
                if image.holes.is_empty() {
                    image.files.run(vaddr, len / page, PE_PRESENT)?;
                    return image.files.pages.write_all(bytes).context("writing pages");
                }
                image.spill(&dir, vaddr, bytes)
            }
            PageEvent::Hole { vaddr, pages, flags } => {
                ensure!(flags & PE_PRESENT == 0, "a hole with flags {flags:#x}");
                let len = pages.checked_mul(self.page).filter(|n| *n > 0).context("an impossible hole")?;
                self.current(vaddr, len)?.holes.insert(vaddr..vaddr + len);
                Ok(())
            }
            PageEvent::Idle => Ok(()),
            PageEvent::Close => {
                ensure!(self.open, "a memory image ends that was not begun");
                self.open = false;
                Ok(())
            }
        }
    }

    /// Takes pages without bytes of the memory that is open, many at once.
    pub fn exist(&mut self, set: &RangeSet) -> Result<()> {
        let Some(span) = set.span(0..u64::MAX) else { return Ok(()) };
        self.runs += set.weight();
        let image = self.current(span.start, span.end - span.start)?;
        image.holes = image.holes.union(set);
        Ok(())
    }

    fn open(&mut self, space: Space) -> Result<()> {
        ensure!(!self.open, "a memory image begins inside another");
        ensure!(self.images.len() < IMAGES_CAP, "more than {IMAGES_CAP} memory images");
        ensure!(self.seen.insert(space), "the memory image {space:?} comes twice");
        let pages_id = u32::try_from(self.images.len() + 1).context("a memory image's number")?;
        let files = MemoryImage::create(&self.dir, space.kind, space.id, pages_id)?;
        self.images.push(Image {
            space,
            files,
            holes: RangeSet::new(),
            spilled: Vec::new(),
            spill: None,
            end: 0,
        });
        self.open = true;
        Ok(())
    }

    fn current(&mut self, vaddr: u64, len: u64) -> Result<&mut Image> {
        ensure!(self.open, "pages outside a memory image");
        self.runs += 1;
        ensure!(self.runs <= RUNS_CAP, "more than {RUNS_CAP} runs of pages");
        let image = self.images.last_mut().context("pages outside a memory image")?;
        let end = vaddr.checked_add(len).context("pages behind the end of memory")?;
        ensure!(
            vaddr.is_multiple_of(self.page) && vaddr >= image.end,
            "pages at {vaddr:#x} after those up to {:#x}",
            image.end
        );
        image.end = end;
        Ok(image)
    }

    /// Bytes of pages that came with the events.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The dump is complete and all other images are in the directory: makes the memory images. `remote` is what the source
    /// still has, which may be stored in an older form; `hot` is what is wanted first.
    ///
    /// # Errors
    /// Above all when a page of the container is neither stored nor on the source.
    pub fn finish(
        self,
        store: &Store,
        remote: &[(Space, RangeSet)],
        hot: &[(Space, RangeSet)],
    ) -> Result<Plan> {
        ensure!(!self.open, "the memory ends in the middle of an image");
        let Self { dir, policy, page, images, .. } = self;
        let remote: BTreeMap<Space, &RangeSet> = remote.iter().map(|(s, r)| (*s, r)).collect();
        let mut parts = Vec::with_capacity(images.len());
        for image in &images {
            let none = RangeSet::new();
            let there = remote.get(&image.space).copied().unwrap_or(&none);
            let mappings = match image.space.kind {
                ImageKind::Pid if !image.holes.is_empty() => Mappings::read(&dir, image.space.id)?,
                _ => Mappings::default(),
            };
            let part = Part::new(image.space, &image.holes, &mappings, there, store).with_context(|| {
                format!("planning the memory of {:?} {}", image.space.kind, image.space.id)
            })?;
            parts.push(part);
        }
        choose(&mut parts, &policy, hot);

        let mut plan = Plan { eager_bytes: self.bytes, ..Plan::default() };
        for (image, part) in images.into_iter().zip(parts) {
            let space = image.space;
            plan.eager_bytes += part.stored.bytes() + part.zero.bytes();
            plan.lazy_bytes += part.lazy.bytes();
            image
                .finish(&part, store, page)
                .with_context(|| format!("writing the memory of {:?} {}", space.kind, space.id))?;
            let Part { lazy, remote, .. } = part;
            for (set, list) in [(lazy, &mut plan.lazy), (remote, &mut plan.remote)] {
                if !set.is_empty() {
                    list.push((space, set));
                }
            }
        }
        Ok(plan)
    }
}

/// What the holes of one image become.
#[derive(Debug, Default, PartialEq, Eq)]
struct Part {
    space: Option<Space>,
    /// Into the images, from the store.
    stored: RangeSet,
    /// Into the images, as zeros.
    zero: RangeSet,
    lazy: RangeSet,
    remote: RangeSet,
    /// Of `lazy`: main stacks.
    stacks: RangeSet,
    /// Where pages may be lazy.
    may_wait: RangeSet,
}

impl Part {
    fn new(
        space: Space,
        holes: &RangeSet,
        mappings: &Mappings,
        remote: &RangeSet,
        store: &Store,
    ) -> Result<Self> {
        if holes.is_empty() {
            return Ok(Self { space: Some(space), ..Self::default() });
        }
        let (may_wait, zero_by_itself) = match space.kind {
            ImageKind::Pid => (mappings.lazy(), mappings.anonymous()),
            // what no image mentions of a piece of shared memory is zero, and all of it is restored before the tasks run
            ImageKind::Shmem => (RangeSet::new(), holes.clone()),
        };
        let remote = holes.intersection(remote);
        if let Some(first) = remote.difference(&may_wait).iter().next() {
            bail!("pages {:#x}..{:#x} are still on the source and cannot be lazy", first.start, first.end);
        }
        let here = holes.difference(&remote);
        let Found { data, unknown } = store.find(space, &here);
        if let Some(first) = unknown.iter().next() {
            bail!("pages {:#x}..{:#x} never came", first.start, first.end);
        }
        let zero = here.difference(&data).difference(&zero_by_itself);
        let stored = data.difference(&may_wait);
        let lazy = data.intersection(&may_wait);
        let stacks = lazy.intersection(&mappings.stacks());
        Ok(Self { space: Some(space), stored, zero, lazy, remote, stacks, may_wait })
    }

    /// In each mapping all from its first page that comes later to its last one.
    fn left_alone(&self) -> RangeSet {
        let later = self.lazy.union(&self.remote);
        self.may_wait.iter().filter_map(|within| later.span(within)).collect()
    }

    /// Takes these out of what is lazy, as far as `room` goes.
    fn make_eager(&mut self, wanted: &RangeSet, room: &mut u64) {
        let mut taken = RangeSet::new();
        for range in self.lazy.intersection(wanted).iter() {
            let end = range.end.min(range.start.saturating_add(*room));
            if end <= range.start {
                break;
            }
            *room -= end - range.start;
            taken.insert(range.start..end);
        }
        if taken.is_empty() {
            return;
        }
        self.lazy = self.lazy.difference(&taken);
        self.stored = self.stored.union(&taken);
    }
}

/// Decides what is eager although it could be lazy.
fn choose(parts: &mut [Part], policy: &EagerPolicy, hot: &[(Space, RangeSet)]) {
    let lazy: u64 = parts.iter().map(|p| p.lazy.bytes()).sum();
    if lazy <= policy.eager_max && parts.iter().all(|p| p.remote.is_empty()) {
        for part in parts {
            part.stored = part.stored.union(&std::mem::take(&mut part.lazy));
        }
        return;
    }
    // whole pages
    let mut room = policy.hot_max / page_size() as u64 * page_size() as u64;
    for part in &mut *parts {
        // a stack grows down: what is in use now is at its lower end
        let mut of_stack = STACK.min(room);
        let before = of_stack;
        part.make_eager(&part.stacks.clone(), &mut of_stack);
        room -= before - of_stack;
    }
    for (space, wanted) in hot {
        for part in parts.iter_mut().filter(|p| p.space == Some(*space)) {
            part.make_eager(wanted, &mut room);
        }
    }
}

impl Image {
    fn spill(&mut self, dir: &Path, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let (file, at) = match &mut self.spill {
            Some(spill) => spill,
            None => self.spill.insert((tempfile::tempfile_in(dir).context("making a file for pages")?, 0)),
        };
        file.write_all_at(bytes, *at).context("writing pages")?;
        self.spilled.push((vaddr..vaddr + bytes.len() as u64, *at));
        *at += bytes.len() as u64;
        Ok(())
    }

    fn finish(self, part: &Part, store: &Store, page: u64) -> Result<()> {
        let Self { space, mut files, spilled, spill, .. } = self;
        let mut runs: Vec<(Range<u64>, From)> =
            spilled.into_iter().map(|(range, at)| (range, From::Spill(at))).collect();
        let of = |set: &RangeSet, from| set.iter().map(|r| (r, from)).collect::<Vec<_>>();
        runs.extend(of(&part.stored, From::Store));
        runs.extend(of(&part.zero, From::Zero));
        let present: RangeSet = runs.iter().map(|(range, _)| range.clone()).collect();
        runs.extend(of(&part.left_alone().difference(&present), From::Lazy));
        runs.sort_unstable_by_key(|(range, _)| range.start);
        for (range, from) in runs {
            let pages = (range.end - range.start) / page;
            files.run(range.start, pages, if from == From::Lazy { PE_LAZY } else { PE_PRESENT })?;
            match from {
                From::Lazy => {}
                From::Store => store.copy_to(space, range, &files.pages)?,
                From::Zero => write_zeros(&files.pages, range.end - range.start)?,
                From::Spill(at) => {
                    let (spill, _) = spill.as_ref().context("spilled pages")?;
                    copy(spill, at, range.end - range.start, &files.pages)?;
                }
            }
        }
        files.close()
    }
}

fn write_zeros(mut out: &File, mut len: u64) -> Result<()> {
    let zeros = [0; 64 << 10];
    while len > 0 {
        let n = len.min(zeros.len() as u64) as usize;
        out.write_all(&zeros[..n]).context("writing pages")?;
        len -= n as u64;
    }
    Ok(())
}

fn copy(from: &File, mut at: u64, len: u64, mut out: &File) -> Result<()> {
    let mut buf = vec![0; len.min(1 << 20) as usize];
    let end = at + len;
    while at < end {
        let n = (end - at).min(buf.len() as u64) as usize;
        from.read_exact_at(&mut buf[..n], at).context("reading pages")?;
        out.write_all(&buf[..n]).context("writing pages")?;
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
