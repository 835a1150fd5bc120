//! One dump: CRIU's worker, its page transfer and its notifications, served together until it has ended.
//!
//! ```text
//!            RPC (SEQPACKET)                 pages (STREAM)
//!  caller -- DUMP ------------> criu swrk -- OPEN2, runs of pages --> PageServer -> on_pages
//!         <- NOTIFY post-dump -            <- status -------------------
//!         -- go on ----------->
//!         <- DUMP success ----
//! ```
//!
//! The tasks must be in a frozen cgroup before; they are in it, frozen, when this returns, whether it succeeded or not.
//! What the images mean is CRIU's business, where pages and files go the caller's.
//!
//! What a CRIU that is shown less than there is ([`super::prepared`]) reports is the list of pages that belong to the container; their
//! content is the caller's.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::conceal::Questions;
use super::listing::Lists;
use super::log;
use super::page_server::{PageServer, PageSink};
use super::parent::Parent;
use super::prepared::{Memory, PreparedDump, Worker, clear_soft_dirty, is_mounted};
use super::rpc::{CgMode, CriuOpts, CriuReq, PageServerInfo, ReqType};
use super::swrk::Swrk;
use super::version::Criu;
use crate::cgroup::Freezer;

/// Milliseconds without anything from CRIU after which the sink hears [`PageEvent::Idle`](super::PageEvent::Idle).
const IDLE_MS: u16 = 1000;
/// Name of the log in the work directory.
pub const LOG_FILE: &str = "dump.log";

/// What is to be dumped, and where to.
pub struct DumpRequest<'a> {
    /// From [`super::options::dump_options`]. Directories and page server are filled in here.
    pub opts: CriuOpts,
    /// Directory for all images but those of memory.
    pub images_dir: &'a Path,
    /// Directory for the log and CRIU's statistics.
    pub work_dir: &'a Path,
    /// Contents of `descriptors.json`, written into the images directory first (see [`super::stdio`]).
    pub descriptors: &'a [String; 3],
    /// Called once everything is dumped and before CRIU leaves the tasks (its `post-dump`). Only until this returns do the
    /// extra names exist that CRIU gives to unlinked files (`link_remap.N`): the writable layer has to be read here, or
    /// at least those names kept. An error makes the dump fail.
    pub on_post_dump: Option<&'a mut dyn FnMut() -> Result<()>>,
    /// Called when every image is complete and every page was told of, while CRIU leaves the tasks, which still stand still. Whoever
    /// needs the images need not wait for CRIU's end, but has nothing before [`PreparedDump::dump`] has returned. An error makes
    /// the dump fail.
    pub on_images: Option<&'a mut dyn FnMut() -> Result<()>>,
    /// With [`MemoryMode::Parent`], where CRIU lists pages.
    pub listing: Listing<'a>,
    /// Called with each object of shared memory whose pages CRIU does not see ([`Worker::conceal`]), after the
    /// [`PageEvent::Open`](super::PageEvent::Open) of its image: its pages are the caller's. An error makes the dump fail. Without it
    /// CRIU sees them, as it has to where it lists pages in files: there is no such event in time.
    pub on_shared: Option<&'a mut dyn FnMut(File) -> Result<()>>,
}

/// Where CRIU lists the pages of a dump that leaves memory alone.
#[derive(Clone, Copy, Debug, Default)]
pub enum Listing<'a> {
    /// Through the page server, with a message for each run of pages. Pages that come with their bytes come as they are read.
    #[default]
    Sent,
    /// In image files, from which they are taken as CRIU closes them: a fraction of the cost where memory is in many pieces. Pages with
    /// bytes are in these files as well, so this is for containers without much shared memory. These are the tasks, by the pids that
    /// they have in the container; of another one the bytes would come.
    Written(&'a [u64]),
}

/// What a dump took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DumpStats {
    /// From the call to CRIU's answer.
    pub total: Duration,
    /// Of that, until the request was with CRIU (fork and exec).
    pub spawn: Duration,
    /// Of that, the caller's `on_pages`.
    pub in_sink: Duration,
    /// Of that, the caller's `on_post_dump`.
    pub in_post_dump: Duration,
    /// Bytes of pages.
    pub page_bytes: u64,
}

/// Why a dump failed, in CRIU's words. Found in the error chain (`Error::downcast_ref`).
#[derive(Debug, thiserror::Error)]
#[error("CRIU {version} cannot dump the container: {finding}")]
pub struct DumpFailed {
    /// CRIU's first error line and what can be done about it.
    pub finding: log::Finding,
    /// CRIU's version, which may be the reason.
    pub version: super::version::Version,
    /// Path of the log.
    pub log: String,
}

impl Criu {
    /// Starts CRIU and dumps everything: see [`PreparedDump::dump`].
    pub fn dump(&self, request: &mut DumpRequest<'_>, on_pages: &mut PageSink<'_>) -> Result<DumpStats> {
        let begun = Instant::now();
        let prepared = self.prepare_dump(&Worker::default())?;
        let spawn = begun.elapsed();
        let stats = prepared.dump(request, on_pages)?;
        Ok(DumpStats { spawn, total: stats.total + spawn, ..stats })
    }
}

impl PreparedDump {
    /// Dumps a frozen process tree. CRIU is never stopped half-way: when `on_pages` or `on_post_dump` fails, the rest is drained, CRIU
    /// is told to fail, it takes its traces out of the tasks, and then the caller's error is returned.
    pub fn dump(self, request: &mut DumpRequest<'_>, on_pages: &mut PageSink<'_>) -> Result<DumpStats> {
        let begun = Instant::now();
        let Self { criu, worker, mut pages, pages_fd, memory, mut questions, unseen: _, stand_in } = self;
        super::stdio::write(request.images_dir, request.descriptors)?;
        let open = |dir: &Path| File::open(dir).with_context(|| format!("opening {}", dir.display()));
        let (images, work) = (open(request.images_dir)?, open(request.work_dir)?);

        let mut opts = request.opts.clone();
        opts.images_dir_fd = images.as_raw_fd();
        opts.work_dir_fd = Some(work.as_raw_fd());
        opts.log_file = Some(LOG_FILE.to_owned());
        opts.notify_scripts = Some(request.on_post_dump.is_some() || request.on_images.is_some());
        let tasks = match (request.listing, &memory) {
            (Listing::Sent, _) | (_, Memory::Full) => None,
            (Listing::Written(tasks), _) => Some(tasks),
        };
        if tasks.is_none() {
            opts.ps = Some(PageServerInfo { fd: Some(pages_fd), ..PageServerInfo::default() });
        }
        let parent = match memory {
            Memory::Full => None,
            _ => Some(Parent::create(request.work_dir, request.images_dir)?),
        };
        if let Some(parent) = &parent {
            parent.has_tasks(tasks.unwrap_or_default(), criu.version)?;
            opts.parent_img = Some(parent.path()?);
            opts.track_mem = Some(true);
        }
        match &memory {
            Memory::Full | Memory::SoftDirty { cleared: true } => {}
            Memory::SoftDirty { cleared: false } => clear_soft_dirty(to_dump(&opts)?)?,
            Memory::Kdat(copy, _) => ensure!(
                is_mounted(copy, worker.pid().as_raw()),
                "another CRIU has removed {} meanwhile",
                super::kdat::PATH
            ),
        }
        if let Some(stand_in) = &stand_in {
            stand_in.describe()?;
        }
        worker.send(&CriuReq::with_opts(ReqType::Dump, opts))?;
        let mut stats = DumpStats::default();

        let mut failure: Option<Error> = None;
        let mut timed_sink = |event: super::page_server::PageEvent<'_>| {
            // there may be very many of these
            if let super::page_server::PageEvent::Hole { .. } = event {
                return on_pages(event);
            }
            let at = Instant::now();
            let result = on_pages(event);
            stats.in_sink += at.elapsed();
            result
        };
        let mut in_post_dump = Duration::ZERO;
        let mut lists = tasks.map(|_| Lists::new(request.images_dir));
        let mut complete = false;
        let answer = loop {
            let Ready { rpc: rpc_ready, pages: pages_ready, lists: lists_ready, asks, silent } =
                wait(&worker, &pages, lists.as_ref(), questions.as_ref())?;
            if lists_ready {
                if let Err(e) = lists.as_mut().map_or(Ok(()), |lists| lists.take(&mut timed_sink)) {
                    failure.get_or_insert(e);
                    lists = None;
                }
                continue;
            }
            // its pages first: a question about an image comes after the image has begun
            if pages_ready {
                pages.serve(&mut timed_sink);
                continue;
            }
            if let Some(asked) = questions.as_ref().filter(|_| asks) {
                let object = asked.answer(request.on_shared.is_some());
                let taken = object.and_then(|object| match (object, request.on_shared.as_mut()) {
                    (Some(object), Some(hook)) => hook(object),
                    _ => Ok(()),
                });
                if let Err(e) = taken {
                    pages.fail(e);
                }
                continue;
            }
            if silent {
                questions = None;
            }
            if !rpc_ready {
                pages.idle(&mut timed_sink);
                continue;
            }
            let message = match worker.receive() {
                Ok(Some(message)) => message,
                Ok(None) => break Err(anyhow!("CRIU ended without an answer")),
                Err(e) => break Err(e),
            };
            if message.r#type != ReqType::Notify as i32 {
                break Ok(message);
            }
            let answered = worker.answer(&message, &mut |script| {
                let (true, Some(hook)) = (script == "post-dump", request.on_post_dump.as_mut()) else {
                    return true;
                };
                let at = Instant::now();
                let result = hook();
                in_post_dump = at.elapsed();
                result.map_err(|e| failure.get_or_insert(e)).is_ok()
            });
            if let Err(e) = answered {
                break Err(e);
            }
            // all images are complete (criu/cr-dump.c, cr_dump_finish), and CRIU takes its time to leave the tasks
            if message.notify.as_ref().is_some_and(|n| n.script.as_deref() == Some("post-dump")) {
                let lists = lists.take();
                complete = true;
                failure = failure.or_else(|| {
                    let completed = completed(request, lists, &mut timed_sink);
                    completed.and_then(|()| request.on_images.as_mut().map_or(Ok(()), |hook| hook())).err()
                });
            }
        };
        worker.finish();
        stats.in_post_dump = in_post_dump;
        // its link is no image
        drop(parent);
        if !complete && answer.as_ref().is_ok_and(|a| a.success) {
            failure = failure.or_else(|| completed(request, lists, &mut timed_sink).err());
        }

        stats.page_bytes = pages.bytes();
        stats.total = begun.elapsed();

        // The caller's own failure first: CRIU's is then only its consequence.
        if let Some(e) = pages.take_failure().or(failure) {
            return Err(e.context("dumping the container"));
        }
        match answer {
            Ok(answer) if answer.r#type == ReqType::Dump as i32 && answer.success => Ok(stats),
            other => {
                let log = request.work_dir.join(LOG_FILE);
                let found = log::first_error_in(&log);
                let said = other
                    .map(|a| a.cr_errmsg.unwrap_or_else(|| format!("errno {}", a.cr_errno.unwrap_or(0))));
                let finding =
                    found.unwrap_or_else(|| log::Finding::new(&said.unwrap_or_else(|e| e.to_string())));
                Err(DumpFailed { finding, version: criu.version, log: log.display().to_string() }.into())
            }
        }
    }
}

/// CRIU has written all images: what is left of the `lists` of pages is taken, and what a restore elsewhere could not use is mended.
fn completed(request: &DumpRequest<'_>, lists: Option<Lists<'_>>, sink: &mut PageSink<'_>) -> Result<()> {
    if let Some(lists) = lists {
        lists.rest(sink).context("taking the list of pages from CRIU's images")?;
    }
    if request.opts.manage_cgroups_mode == Some(CgMode::Ignore as i32) {
        super::cgroup_image::strip(request.images_dir)?;
    }
    super::timerfd_image::rearm(request.images_dir)
}

/// The processes that a dump will find.
fn to_dump(opts: &CriuOpts) -> Result<BTreeSet<i32>> {
    let pid = opts.pid.context("no init to dump")?;
    match opts.freeze_cgroup {
        Some(_) => Freezer::of_pid(pid)?.pids(),
        None => Ok([pid].into()),
    }
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    rpc: bool,
    pages: bool,
    /// A list of pages is complete.
    lists: bool,
    /// CRIU waits for an answer.
    asks: bool,
    /// Nobody is left to ask.
    silent: bool,
}

/// Waits for any of them; pages that CRIU will send no more are not waited for.
fn wait(
    worker: &Swrk,
    pages: &PageServer,
    lists: Option<&Lists<'_>>,
    questions: Option<&Questions>,
) -> Result<Ready> {
    let mut fds = vec![PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
    let pages = (!pages.ended()).then(|| {
        fds.push(PollFd::new(pages.as_fd(), PollFlags::POLLIN));
        fds.len() - 1
    });
    let lists = lists.and_then(Lists::ready).map(|lists| {
        fds.push(PollFd::new(lists, PollFlags::POLLIN));
        fds.len() - 1
    });
    let questions = questions.map(|questions| {
        fds.push(PollFd::new(questions.as_fd(), PollFlags::POLLIN));
        fds.len() - 1
    });
    match poll(&mut fds, PollTimeout::from(IDLE_MS)) {
        Err(Errno::EINTR) => return Ok(Ready::default()),
        other => other.context("waiting for CRIU")?,
    };
    let events = |i: usize| fds[i].revents().unwrap_or(PollFlags::empty());
    let asks = questions.is_some_and(|i| events(i).contains(PollFlags::POLLIN));
    Ok(Ready {
        rpc: !events(0).is_empty(),
        pages: pages.is_some_and(|i| !events(i).is_empty()),
        lists: lists.is_some_and(|i| !events(i).is_empty()),
        asks,
        silent: !asks && questions.is_some_and(|i| !events(i).is_empty()),
    })
}
