//! The freeze on the source: tasks stopped, CRIU's dump, writable layer, image files, queued stdio, as one stream. In the full
//! form memory comes from CRIU (a checkpoint file, a peer or a CRIU that cannot do better), in the live form CRIU only says
//! which pages there are, and memory that the destination does not have yet is read by us at the same time.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::path::Path;

use super::abort::Abort;
use super::code_pages::CodePages;
use super::codec::Kind;
use super::fault;
use super::link::Link;
use super::prepared::{Prepared, keep_log};
use super::protocol::{Failure, Frozen};
use super::report::{Clock, Report};
use super::source::{Options, SourceTask};
use super::still::Still;
use super::stream::Sender;
use crate::control::Event;
use crate::criu::{self, DumpRequest, Listing, PageEvent};
use crate::memory::Space;
use crate::memory::tracker::tasks;
use crate::rootfs::KeptTimes;
use anyhow::Result;

/// What a capture needs besides the container.
pub(super) struct Context<'a> {
    pub link: &'a Link,
    pub options: &'a Options,
    pub abort: &'a Abort,
    pub events: &'a dyn Fn(Event),
}

impl Context<'_> {
    /// Notes a phase and tells the agent.
    pub fn phase(&self, clock: &RefCell<&mut Clock>, name: &str) {
        clock.borrow_mut().phase(name);
        (self.events)(Event::Phase { phase: name.to_owned() });
    }

    /// The same, where nobody else holds the clock.
    pub fn begin(&self, clock: &mut Clock, name: &str) {
        clock.phase(name);
        (self.events)(Event::Phase { phase: name.to_owned() });
    }

    /// An error if somebody asked to give up.
    pub fn go_on(&self) -> Result<()> {
        self.abort.go_on()
    }
}

/// Freezes and sends everything.
///
/// # Errors
/// With the tasks running as before.
pub(super) fn full(
    cx: &Context<'_>,
    task: Box<dyn SourceTask>,
    prepared: Prepared,
    clock: &mut Clock,
) -> Result<(Still, Report)> {
    let (images, work) = (prepared.images(), prepared.work());
    let Prepared { criu, freezer, netns, dir, layer, rootfs, opts, descriptors, .. } = prepared;
    let clock = RefCell::new(clock);
    let phase = |name: &str| cx.phase(&clock, name);
    cx.go_on()?;
    phase("freeze");
    let (still, carry, _) = Still::enter(task, freezer, netns)?;
    fault::point("frozen", Some(cx.link));
    let processes = still.freezer().pids().map(|p| p.len()).unwrap_or(0);
    cx.link.json(Kind::Frozen, &Frozen { processes })?;
    cx.link.flush()?;

    phase("dump");
    let times = KeptTimes::of(&rootfs);
    let shown = Cell::new(0);
    let sender = RefCell::new(Sender::new(cx.link));
    let mut on_post_dump = || {
        // while CRIU's extra links to unlinked files exist
        phase("layer");
        fault::point("dump", Some(cx.link));
        times.put_back();
        sender.borrow_mut().layer(&layer)?;
        phase("dump end");
        Ok(())
    };
    let mut request = DumpRequest {
        opts,
        images_dir: &images,
        work_dir: &work,
        descriptors: &descriptors,
        on_post_dump: Some(&mut on_post_dump),
        on_images: None,
        listing: Listing::Sent,
        on_shared: None,
    };
    let pids: Vec<i32> = still.freezer().pids().unwrap_or_default().into_iter().collect();
    let code = CodePages::of(&tasks(&pids));
    let mut space = None;
    let dumped = criu.dump(&mut request, &mut |event| {
        let mut sender = sender.borrow_mut();
        if let PageEvent::Open { kind, id } = event {
            space = Some(Space { kind, id });
        }
        code.mend(space, event, &mut |event| sender.pages(event))?;
        if sender.sent() - shown.get() > 8 << 20 {
            shown.set(sender.sent());
            (cx.events)(Event::Progress { bytes: shown.get(), total: None });
        }
        cx.go_on()
    });
    drop(times);
    let mut sender = sender.into_inner();
    let streamed = dumped.and_then(|_| {
        phase("files");
        fault::point("final", Some(cx.link));
        sender.files(&images, &HashSet::new())?;
        sender.stdio(&carry)
    });
    if let Err(e) = streamed {
        return Err(reason(e, cx, &work));
    }
    let sent = sender.finish()?;
    drop(dir);
    (cx.events)(Event::Progress { bytes: cx.link.wire().bytes().0, total: None });
    let report =
        Report { migration_id: cx.options.migration_id.clone(), sent, processes, ..Report::default() };
    Ok((still, report))
}

/// The error to show: the destination's own reason if it was the destination that hung up, and where CRIU's log is.
pub(super) fn reason(e: anyhow::Error, cx: &Context<'_>, work: &Path) -> anyhow::Error {
    let own = e.is::<criu::dump::DumpFailed>() || e.is::<Failure>();
    let why = if own { None } else { cx.link.wire().reason() };
    why.map_or_else(|| keep_log(e, work, cx.options), Into::into)
}
