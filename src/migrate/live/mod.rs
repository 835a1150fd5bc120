//! The freeze of a live migration on the source. CRIU dumps metadata and names the pages that exist; what was written last is
//! read from the frozen tasks by us at the same time; pages that nobody has sent yet follow, or stay here for the post-copy.

mod beside;
mod listed;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, Result};

use self::beside::{Beside, Items, Known};
use self::listed::Listener;
use super::capture::{Context, reason};
use super::code_pages::CodePages;
use super::codec::Kind;
use super::copier::Copier;
use super::fault;
use super::layers::Layers;
use super::precopy::{Ahead, Next, merge};
use super::prepared::Prepared;
use super::protocol::Frozen;
use super::report::{Clock, Report};
use super::source::SourceTask;
use super::still::Still;
use super::stream::Sender;
use super::tmpfs::Tmpfs;
use super::turn::Turn;
use crate::criu::tar::staged::Table;
use crate::criu::{DumpRequest, ImageKind, Listing, PageEvent, stdio};
use crate::memory::maps::{Mapping, mappings};
use crate::memory::sets::encode_ranges;
use crate::memory::tracker::{Found, Task, TrackerKind, tasks};
use crate::memory::{RangeSet, Space};
use crate::rootfs::KeptTimes;

/// Pages that are still on the source, by space.
pub(super) type Left = BTreeMap<Space, RangeSet>;

/// What the freeze gave.
pub(super) struct Stopped {
    pub still: Still,
    /// To be held until they run elsewhere, or here again.
    pub turn: Turn,
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
    /// The destination takes sets of pages as bits.
    pub bits: bool,
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
    let Ahead { next, found: unsent, turn, rounds, mut worker, tools } = ahead;
    let Moving { copier, layers, tmpfs, bits } = moving;
    let bits = *bits;
    let post_copy = next == Next::FreezePostCopy;
    // nothing was ever sent: there is nothing to compare with
    let first = post_copy && rounds.is_empty();
    let (images, work) = (prepared.images(), prepared.work());
    let Prepared { freezer, netns, dir, rootfs, opts, descriptors, .. } = prepared;
    cx.go_on()?;
    // a tracker by soft-dirty bits cleared them at its last look, and will ask what they say since
    let mut uncleared = BTreeSet::new();
    if first || copier.tracker() != TrackerKind::SoftDirty {
        uncleared = freezer.pids().context("listing the tasks")?;
    }
    worker.forget_writes(uncleared)?;
    cx.begin(clock, "freeze");
    let (still, carry, entering) = Still::enter(task, freezer, netns)?;
    fault::point("frozen", Some(cx.link));
    let pids: Vec<i32> = still.freezer().pids().context("listing the frozen tasks")?.into_iter().collect();
    let tasks = tasks(&pids);
    cx.link.json(Kind::Frozen, &Frozen { processes: tasks.len() })?;
    let since = still.since();
    let mut items = Items::new(since);
    items.add("freeze", 0.0, entering.freeze_ms);
    items.add("fence", entering.freeze_ms, entering.fence_ms);
    items.add("quiesce", entering.freeze_ms + entering.fence_ms, entering.quiesce_ms);

    copier.hurry(true);
    let known = match copier.tracker() {
        _ if first => Known::NeverSent,
        // CRIU clears soft-dirty bits while it dumps; no other tracker minds
        TrackerKind::SoftDirty => Known::All(merge(unsent, copier.look(&tasks, true)?)),
        _ => Known::Unsent(unsent),
    };
    let shared = copier.take_shared();

    cx.begin(clock, "dump");
    let at = items.now();
    let times = KeptTimes::of(&rootfs);
    let (objects, concealed) = mpsc::channel();
    let (list, existing) = mpsc::channel();
    let unseen = tasks.iter().filter(|task| worker.unseen().contains(&task.pid));
    let unseen: Vec<(Task, Vec<Mapping>)> =
        unseen.map(|task| Ok((*task, mappings(task.pid)?))).collect::<Result<_>>()?;
    let spaces = unseen.iter().map(|(task, _)| Space { kind: ImageKind::Pid, id: task.vpid }).collect();
    let criu = worker.version();
    let sender = Sender::new(cx.link).bits(bits);
    let listener = Listener::new(sender, objects, spaces, existing);
    let mut layer = Items::new(since);
    let mut on_post_dump = || {
        // while CRIU's extra links to unlinked files exist
        let from = layer.now();
        fault::point("dump", Some(cx.link));
        times.put_back();
        layers.last(&pids, &mut listener.sender.borrow_mut())?;
        layer.until_now("layer", from);
        Ok(())
    };
    let mut on_shared = |file| listener.object(file);
    let ids: Vec<u64> = tasks.iter().map(|t| t.vpid).collect();
    let listed_in_files = !first && !copier.knows_shared();
    let code = CodePages::of(&tasks);
    // before CRIU's tar can ask for it
    let table = tmpfs.is_some().then(|| Table::create(&tools)).transpose()?;
    let beside = Beside { abort: cx.abort, link: cx.link, since };
    let mut rest = Items::new(since);
    let mut gone = None;
    let dumped = thread::scope(|scope| {
        let copier = &mut **copier;
        let (tasks, pids, shared) = (&tasks, &pids, &shared);
        let staged = tmpfs
            .as_mut()
            .zip(table)
            .map(|(tmpfs, table)| scope.spawn(move || beside.tmpfs(tmpfs, table, pids)));
        let last = scope.spawn(move || beside.written_last(copier, tasks, known, !post_copy));
        let compared = scope.spawn(move || beside.shared(shared, concealed));
        let unseen = &unseen;
        let listed = scope.spawn(move || beside.existing(unseen, list));
        let mut threads = Some((last, staged, compared, listed));
        // everything is known: what is missing goes over while CRIU leaves the tasks
        let mut on_images = || {
            listener.end();
            let (last, staged, compared, listed) = threads.take().context("CRIU dumps twice")?;
            let (found, copier) = rest.join("copying the last pages", last)?;
            let staged = staged.map_or(Ok(0), |staged| rest.join("copying tmpfs files", staged))?;
            rest.join("comparing shared memory", compared)?;
            rest.join("listing pages", listed)?;
            listener.add_guards(&images, criu)?;
            cx.begin(clock, "late pages");
            let at = rest.now();
            let left = Late { cx, images: &images, tasks, copier, post_copy }.send(listener.listed())?;
            rest.until_now("late pages", at);
            fault::point("final", Some(cx.link));
            cx.begin(clock, "files");
            let at = rest.now();
            let mut sender = listener.sender.borrow_mut();
            sender.tmpfs_sent(staged);
            sender.files(&images, &HashSet::from([stdio::FILE.into()]))?;
            name_pages(cx, Kind::RemotePages, left.iter().map(|(space, pages)| (*space, pages)))?;
            name_pages(cx, Kind::HotPages, found.iter().map(|f: &Found| (f.space, &f.written)))?;
            sender.stdio(&carry)?;
            gone = Some((left, sender.finish()?));
            rest.until_now("files", at);
            Ok(())
        };
        let mut request = DumpRequest {
            opts,
            images_dir: &images,
            work_dir: &work,
            descriptors: &descriptors,
            on_post_dump: Some(&mut on_post_dump),
            on_images: Some(&mut on_images),
            // where pages are listed in files nothing tells whose an object is; only what nobody knew of is concerned
            on_shared: if listed_in_files { None } else { Some(&mut on_shared) },
            listing: if listed_in_files { Listing::Written(&ids) } else { Listing::Sent },
        };
        let dumped = worker.dump(&mut request, &mut |event| {
            let many = matches!(event, PageEvent::Hole { .. });
            listener.event(event, &code, shared)?;
            if many { Ok(()) } else { cx.go_on() }
        });
        // where CRIU failed before
        listener.end();
        dumped
    });
    drop(times);
    items.until_now("CRIU dump", at);
    items.all.append(&mut layer.all);
    items.all.append(&mut rest.all);
    let gone = dumped.and_then(|_| gone.context("CRIU ended without saying that it had dumped everything"));
    let (left, sent) = gone.map_err(|e| reason(e, cx, &work))?;
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
    Ok(Stopped { still, turn, tasks, report, left })
}

/// Pages that CRIU says exist and that nobody has sent.
struct Late<'a> {
    cx: &'a Context<'a>,
    images: &'a Path,
    tasks: &'a [Task],
    copier: &'a mut Copier,
    post_copy: bool,
}

impl Late<'_> {
    /// Sends them, but for what can follow in a post-copy.
    fn send(&mut self, listed: BTreeMap<Space, RangeSet>) -> Result<Left> {
        let mut left = Left::new();
        for (space, pages) in listed {
            let mut late = self.copier.unsent(space, &pages);
            if self.post_copy {
                let stays;
                (late, stays) = listed::split(self.images, space, late)?;
                left.insert(space, stays);
            }
            if !late.is_empty() {
                self.copier.send_late(space, self.tasks, &late, self.cx.link, &|_| self.cx.go_on())?;
            }
        }
        left.retain(|_, pages| !pages.is_empty());
        Ok(left)
    }
}

/// Tells the destination which pages something is true of.
fn name_pages<'a>(
    cx: &Context<'_>,
    kind: Kind,
    pages: impl Iterator<Item = (Space, &'a RangeSet)>,
) -> Result<()> {
    for (space, pages) in pages {
        for payload in encode_ranges(space, pages) {
            cx.link.frame(kind, &[&payload])?;
        }
    }
    Ok(())
}
