//! The freeze of a live migration on the source. CRIU dumps metadata and names the pages that exist; what was written last is
//! read from the frozen tasks by us at the same time; pages that nobody has sent yet follow, or stay here for the post-copy.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};

use super::capture::{Context, reason};
use super::code_pages::CodePages;
use super::codec::Kind;
use super::copier::Copier;
use super::fault;
use super::layers::Layers;
use super::precopy::{Ahead, Next, merge};
use super::prepared::Prepared;
use super::protocol::Frozen;
use super::report::{Clock, Item, Report, Side, millis};
use super::shared::Object;
use super::source::SourceTask;
use super::still::Still;
use super::stream::Sender;
use super::tmpfs::Tmpfs;
use crate::criu::mm_image::Mappings;
use crate::criu::page_server::{PE_PARENT, page_size};
use crate::criu::tar::staged::Table;
use crate::criu::{DumpRequest, ImageKind, Listing, PageEvent, stdio};
use crate::memory::sets::encode_ranges;
use crate::memory::tracker::{Found, Source, Task, TrackerKind, tasks};
use crate::memory::{RangeSet, Space, maps};
use crate::rootfs::KeptTimes;

/// Pages that are still on the source, by space.
pub(super) type Left = BTreeMap<Space, RangeSet>;

/// What the freeze gave.
pub(super) struct Stopped {
    pub still: Still,
    /// The tasks that stand still.
    pub tasks: Vec<Task>,
    pub report: Report,
    /// Empty without post-copy.
    pub left: Left,
}

/// What has gone ahead, and goes on.
pub(super) struct Moving<'a> {
    pub copier: &'a mut Copier,
    pub layers: &'a mut Layers,
    /// None where tmpfs files go with CRIU's images.
    pub tmpfs: Option<&'a mut Tmpfs>,
}

/// Freezes and sends what is missing; with `post_copy` only what the restore itself needs.
///
/// # Errors
/// With the tasks running as before.
pub(super) fn freeze(
    cx: &Context<'_>,
    task: Box<dyn SourceTask>,
    prepared: Prepared,
    ahead: Ahead,
    moving: &mut Moving<'_>,
    clock: &mut Clock,
) -> Result<Stopped> {
    let Ahead { next, found: unsent, rounds, mut worker, tools } = ahead;
    let Moving { copier, layers, tmpfs } = moving;
    let post_copy = next == Next::FreezePostCopy;
    // nothing was ever sent: there is nothing to compare with
    let first = post_copy && rounds.is_empty();
    let (images, work) = (prepared.images(), prepared.work());
    let Prepared { freezer, netns, dir, rootfs, opts, descriptors, .. } = prepared;
    let clock = RefCell::new(clock);
    let phase = |name: &str| cx.phase(&clock, name);
    cx.go_on()?;
    // a tracker by soft-dirty bits cleared them at its last look, and will ask what they say since
    let mut uncleared = BTreeSet::new();
    if first || copier.tracker() != TrackerKind::SoftDirty {
        uncleared = freezer.pids().context("listing the tasks")?;
    }
    worker.forget_writes(uncleared)?;
    phase("freeze");
    let (still, carry, entering) = Still::enter(task, freezer, netns)?;
    let since = still.since();
    fault::point("frozen");
    let pids: Vec<i32> = still.freezer().pids().context("listing the frozen tasks")?.into_iter().collect();
    let tasks = tasks(&pids);
    cx.link.json(Kind::Frozen, &Frozen { processes: tasks.len() })?;
    let mut items = Items::new(since);
    items.add("freeze", 0.0, entering.freeze_ms);
    items.add("fence", entering.freeze_ms, entering.fence_ms);
    items.add("quiesce", entering.freeze_ms + entering.fence_ms, entering.quiesce_ms);

    copier.hurry(true);
    // CRIU clears soft-dirty bits while it dumps; no other tracker minds
    let mut unsent = Some(unsent).filter(|_| !first);
    let mut looked = None;
    if copier.tracker() == TrackerKind::SoftDirty
        && let Some(unsent) = unsent.take()
    {
        looked = Some(merge(unsent, copier.look(&tasks, true)?));
    }
    let shared = copier.take_shared();
    let listed_in_files = !first && !copier.knows_shared();

    phase("dump");
    let at = items.now();
    let times = KeptTimes::of(&rootfs);
    let sender = RefCell::new(Sender::new(cx.link));
    let listed = RefCell::new(Listed::default());
    let (objects, concealed) = mpsc::channel();
    let objects = Cell::new(Some(objects));
    let mut on_shared = |file: File| {
        let space = listed.borrow().open.context("shared memory outside of an image")?;
        let object = Object::new(space, file)?;
        for run in object.pages.iter() {
            let (vaddr, pages) = (run.start, (run.end - run.start) / page_size() as u64);
            sender.borrow_mut().pages(PageEvent::Hole { vaddr, pages, flags: PE_PARENT })?;
        }
        let to = objects.take().context("shared memory after the dump")?;
        // whoever takes them has failed if they cannot be sent, and says why
        to.send(object).ok();
        objects.set(Some(to));
        Ok(())
    };
    let layer_at = Cell::new((0.0, 0.0));
    let mut on_post_dump = || {
        // while CRIU's extra links to unlinked files exist
        let from = millis(since.elapsed());
        times.put_back();
        layers.last(&pids, &mut sender.borrow_mut())?;
        layer_at.set((from, millis(since.elapsed()) - from));
        Ok(())
    };
    let ids: Vec<u64> = tasks.iter().map(|t| t.vpid).collect();
    let mut request = DumpRequest {
        opts,
        images_dir: &images,
        work_dir: &work,
        descriptors: &descriptors,
        on_post_dump: Some(&mut on_post_dump),
        // where pages are listed in files nothing tells whose an object is; only what nobody knew of is concerned
        on_shared: if listed_in_files { None } else { Some(&mut on_shared) },
        listing: if listed_in_files { Listing::Written(&ids) } else { Listing::Sent },
    };
    let code = CodePages::of(&tasks);
    // before CRIU's tar can ask for it
    let table = tmpfs.is_some().then(|| Table::create(&tools)).transpose()?;
    let (dumped, last, staged, compared) = thread::scope(|scope| {
        let copier = &mut **copier;
        let (abort, link, tasks) = (cx.abort, cx.link, &tasks);
        let staged = tmpfs.as_mut().zip(table).map(|(tmpfs, table)| {
            let pids = &pids;
            scope.spawn(move || {
                let begun = Instant::now();
                let sent = tmpfs.last(pids, link, &|_| abort.go_on()).and_then(|(sent, all)| {
                    table.finish(&all)?;
                    Ok(sent.bytes)
                });
                (sent, millis(begun - since), millis(begun.elapsed()))
            })
        });
        // Beside CRIU, which takes as long to look at the same tasks. What it maps into them for a while counts as written, and goes
        // nowhere: no image names it.
        let last = scope.spawn(move || -> Result<_> {
            let scanned = millis(since.elapsed());
            let mut found = match (looked, unsent) {
                (Some(found), _) => found,
                (None, Some(unsent)) => merge(unsent, copier.look(tasks, true)?),
                (None, None) => Vec::new(),
            };
            keep_from_code(&mut found);
            // CRIU brings it, and its content says what is missing
            found.retain(|f| f.space.kind == ImageKind::Pid);
            let copied = millis(since.elapsed());
            if !post_copy {
                copier.send(&found, link, &|_| abort.go_on())?;
            }
            Ok((found, scanned, copied, millis(since.elapsed())))
        });
        let compared = {
            let shared = &shared;
            scope.spawn(move || {
                let (mut from, mut ms) = (None, 0.0);
                for object in concealed {
                    let begun = Instant::now();
                    from = from.or(Some(millis(begun - since)));
                    if let Err(e) = shared.compare(&object, link, &|| abort.go_on()) {
                        return (Err(e), from, ms);
                    }
                    ms += millis(begun.elapsed());
                }
                (Ok(()), from, ms)
            })
        };
        let dumped = worker.dump(&mut request, &mut |event| {
            listed.borrow_mut().note(&event);
            let open = listed.borrow().open;
            let mut send = |event: PageEvent<'_>| sender.borrow_mut().pages(event);
            code.mend(open, event, &mut |event| shared.filter(open, event, &mut send))?;
            cx.go_on()
        });
        // no more will come
        objects.take();
        (dumped, last.join(), staged.map(|staged| staged.join()), compared.join())
    });
    drop(times);
    items.until_now("CRIU dump", at);
    let last = last.map_err(|_| anyhow!("the thread that copies pages panicked"))?;
    if let Ok((_, scanned, copied, end)) = &last {
        items.add("final scan", *scanned, copied - scanned);
        items.add("final pages", *copied, end - copied);
    }
    let (compared, from, took) =
        compared.map_err(|_| anyhow!("the thread that compares shared memory panicked"))?;
    if let Some(from) = from {
        items.add("shared memory", from, took);
    }
    let mut tmpfs_sent = Ok(0);
    if let Some(staged) = staged {
        let (sent, from, took) = staged.map_err(|_| anyhow!("the thread that copies files panicked"))?;
        items.add("tmpfs", from, took);
        tmpfs_sent = sent;
    }
    let (layer_from, layer_took) = layer_at.get();
    items.add("layer", layer_from, layer_took);

    let mut sender = sender.into_inner();
    let mut left = Left::new();
    let streamed = dumped.and_then(|_| {
        let (found, ..) = last?;
        sender.tmpfs_sent(tmpfs_sent.context("copying tmpfs files")?);
        compared?;
        phase("late pages");
        let at = items.now();
        for (space, pages) in listed.into_inner().spaces {
            let mut late = copier.unsent(space, &pages);
            if post_copy && space.kind == ImageKind::Pid {
                let needed = needed_at_restore(&images, space.id)?;
                let remote = late.difference(&needed);
                late = late.intersection(&needed);
                left.insert(space, remote);
            }
            if !late.is_empty() {
                copier.send_late(space, &tasks, &late, cx.link, &|_| cx.go_on())?;
            }
        }
        left.retain(|_, pages| !pages.is_empty());
        items.until_now("late pages", at);
        phase("files");
        let at = items.now();
        sender.files(&images, &HashSet::from([stdio::FILE.into()]))?;
        for (space, pages) in &left {
            for payload in encode_ranges(*space, pages) {
                cx.link.frame(Kind::RemotePages, &[&payload])?;
            }
        }
        for f in &found {
            for payload in encode_ranges(f.space, &f.written) {
                cx.link.frame(Kind::HotPages, &[&payload])?;
            }
        }
        sender.stdio(&carry)?;
        items.until_now("files", at);
        Ok(())
    });
    if let Err(e) = streamed {
        return Err(reason(e, cx, &work));
    }
    let sent = sender.finish()?;
    items.all.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
    drop(dir);
    let report = Report {
        migration_id: cx.options.migration_id.clone(),
        sent,
        processes: tasks.len(),
        freeze: items.all,
        rounds,
        ..Report::default()
    };
    Ok(Stopped { still, tasks, report, left })
}

/// Addresses of a task whose pages cannot follow later: its stack is used at once, and the rest CRIU restores itself.
fn needed_at_restore(images: &Path, id: u64) -> Result<RangeSet> {
    let mappings = Mappings::read(images, id)?;
    let all = RangeSet::from(0..u64::MAX);
    Ok(all.difference(&mappings.lazy()).union(&mappings.stacks()))
}

/// CRIU puts a system call into one of a task's executable pages for a moment and takes it out again: such pages are not read
/// while it works, but after it, as everything that was not sent.
fn keep_from_code(found: &mut [Found]) {
    for f in found {
        let Source::Task(pid) = f.source else { continue };
        // a task that has ended has no code that could be wrong
        let Ok(mappings) = maps::mappings(pid) else { continue };
        let code: RangeSet = mappings.into_iter().filter(|m| m.exec).map(|m| m.range).collect();
        f.written = f.written.difference(&code);
    }
}

/// The pages that CRIU says exist and has not sent itself.
#[derive(Default)]
struct Listed {
    open: Option<Space>,
    spaces: BTreeMap<Space, RangeSet>,
}

impl Listed {
    fn note(&mut self, event: &PageEvent<'_>) {
        match event {
            PageEvent::Open { kind, id } => self.open = Some(Space { kind: *kind, id: *id }),
            PageEvent::Hole { vaddr, pages, .. } => {
                if let Some(space) = self.open {
                    let end = vaddr + pages * crate::criu::page_server::page_size() as u64;
                    self.spaces.entry(space).or_default().insert(*vaddr..end);
                }
            }
            PageEvent::Close => self.open = None,
            PageEvent::Pages { .. } | PageEvent::Idle => {}
        }
    }
}

/// What the freeze is spent on, on this side.
struct Items {
    since: Instant,
    all: Vec<Item>,
}

impl Items {
    fn new(since: Instant) -> Items {
        Items { since, all: Vec::new() }
    }

    fn now(&self) -> f64 {
        millis(self.since.elapsed())
    }

    fn add(&mut self, name: &str, start_ms: f64, ms: f64) {
        self.all.push(Item { name: name.to_owned(), start_ms, ms, side: Side::Source });
    }

    fn until_now(&mut self, name: &str, from: f64) {
        let ms = self.now() - from;
        self.add(name, from, ms);
    }
}
