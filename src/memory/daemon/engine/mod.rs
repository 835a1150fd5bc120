//! The daemon's loop: who is looked at when. Orders and faults first ([`faults`]), then what the source sends ([`source`]), then
//! one batch of the fill ([`fill`]). Here too: how the tasks come, and how it ends.

mod faults;
mod fill;
mod source;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::consumer::Consumer;
use super::ctl::{Histogram, Order};
use super::handshake::{Connection, Listener, Said};
use super::pieces::{Pieces, Spent};
use super::{DaemonConfig, DaemonCtl, DaemonEvent, DaemonStats, LazySets, Remote};
use crate::criu::ImageKind;
use crate::criu::page_server::page_size;
use crate::memory::buffer::Buffer;
use crate::memory::store::Store;
use crate::memory::{RangeSet, Space};

/// How often children are asked whether they still live, and progress is told.
const TICK: Duration = Duration::from_millis(100);
/// How long tasks of a failed restore, which CRIU kills, are waited for.
const DYING: Duration = Duration::from_secs(5);
type Events<'e> = &'e mut dyn FnMut(DaemonEvent);

pub(super) struct Engine {
    cfg: DaemonConfig,
    page: u64,
    store: Store,
    /// What tasks that have not come yet will get: from the store, from the source.
    planned: BTreeMap<Space, (Pieces, Pieces)>,
    consumers: Vec<Consumer>,
    listener: Option<Listener>,
    connection: Option<Connection>,
    remote: Option<Box<dyn Remote>>,
    asked: BTreeMap<Space, RangeSet>,
    /// Found out while the source was being listened to.
    to_ask: Vec<(Space, Range<u64>)>,
    to_free: Spent,
    /// The source has sent more than was taken yet.
    more: bool,
    ctl: DaemonCtl,
    stats: DaemonStats,
    local_times: Histogram,
    remote_times: Histogram,
    buf: Buffer,
    restored: Option<Instant>,
    running: Option<Instant>,
    /// When a message of the descriptors was read last.
    heard: Option<Instant>,
    lost: bool,
    aborted: bool,
    fill_began: Option<Instant>,
    looked_at_faults: Instant,
    ticked: Instant,
    turn: usize,
}

impl Engine {
    pub fn new(
        cfg: DaemonConfig,
        listener: Listener,
        store: Store,
        sets: &LazySets,
        remote: Option<Box<dyn Remote>>,
        ctl: DaemonCtl,
    ) -> Result<Self> {
        let page = page_size() as u64;
        ensure!(
            cfg.window.is_power_of_two()
                && cfg.window >= page
                && cfg.batch >= page
                && cfg.batch.is_multiple_of(page),
            "windows of {} and batches of {} bytes",
            cfg.window,
            cfg.batch
        );
        let mut planned = BTreeMap::new();
        for (space, set) in &sets.remote {
            planned.entry(*space).or_insert_with(|| (RangeSet::new(), RangeSet::new())).1 = set.clone();
        }
        for (space, set) in &sets.lazy {
            let entry = planned.entry(*space).or_insert_with(|| (RangeSet::new(), RangeSet::new()));
            let found = store.find(*space, set);
            let unknown = found.unknown.difference(&entry.1);
            if let Some(first) = unknown.iter().next() {
                bail!("{} bytes of {space:?} are nowhere, the first at {:#x}", unknown.bytes(), first.start);
            }
            // A page that is known to be zero waits for nothing. What is on the source is newer than what is here.
            entry.0 = found.data.difference(&entry.1);
        }
        if let Some(space) = planned.keys().find(|s| s.kind != ImageKind::Pid) {
            bail!("{space:?} cannot be restored lazily");
        }
        ensure!(
            remote.is_some() || sets.remote.iter().all(|(_, s)| s.is_empty()),
            "pages on a source that is not there"
        );
        let planned = planned.into_iter().map(|(s, (l, r))| (s, (Pieces::new(l), Pieces::new(r)))).collect();
        let buf = Buffer::new(cfg.window.max(cfg.batch) as usize)?;
        let now = Instant::now();
        Ok(Self {
            cfg,
            page,
            store,
            planned,
            consumers: Vec::new(),
            listener: Some(listener),
            connection: None,
            remote,
            asked: BTreeMap::new(),
            to_ask: Vec::new(),
            to_free: Spent::default(),
            more: false,
            ctl,
            stats: DaemonStats::default(),
            local_times: Histogram::default(),
            remote_times: Histogram::default(),
            buf,
            restored: None,
            running: None,
            heard: None,
            lost: false,
            aborted: false,
            fill_began: None,
            looked_at_faults: now,
            ticked: now,
            turn: 0,
        })
    }

    pub fn run(mut self, events: Events<'_>) -> Result<DaemonStats> {
        match self.serve(events) {
            Ok(()) => {}
            Err(e) => {
                // CRIU, if it still works, fails at its next word to us.
                (self.connection, self.listener) = (None, None);
                if !self.consumers.is_empty() {
                    if self.restored.is_some() {
                        events(DaemonEvent::Failed { why: format!("{e:#}") });
                        self.wait_for_abort();
                    }
                    self.wait_gone();
                }
                self.let_go()?;
                return Err(e);
            }
        }
        self.stats.complete = !self.aborted && !self.lost;
        if self.aborted {
            (self.connection, self.listener) = (None, None);
            self.wait_gone();
            ensure!(
                self.consumers.is_empty(),
                "the restored tasks are still alive; their memory stays as it is"
            );
        }
        self.let_go()?;
        let (local, remote) = (&self.local_times, &self.remote_times);
        (self.stats.fault_median_us, self.stats.fault_p99_us) = (local.at(500), local.at(990));
        (self.stats.remote_median_us, self.stats.remote_p99_us) = (remote.at(500), remote.at(990));
        self.stats.fill_ms = self.fill_began.map_or(0, |t| t.elapsed().as_millis() as u64);
        Ok(self.stats)
    }

    fn serve(&mut self, events: Events<'_>) -> Result<()> {
        loop {
            let timeout = self.timeout();
            self.wait(timeout)?;
            self.orders(events);
            if self.aborted {
                return Ok(());
            }
            self.handshake(events)?;
            self.faults()?;
            self.listen_to_source(events)?;
            self.tick(events);
            if self.may_fill() {
                self.fill()?;
            }
            if self.restored.is_some() {
                self.part_with_the_complete()?;
                if self.consumers.is_empty() {
                    return Ok(());
                }
            }
        }
    }

    /// How long nothing has to be done if nothing happens.
    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        if self.more {
            return Some(Duration::ZERO);
        }
        let mut until: Option<Instant> = None;
        let mut at = |t: Instant| until = Some(until.map_or(t, |u| u.min(t)));
        for c in &self.consumers {
            match c.again {
                Some(t) if !c.retry.is_empty() || (self.may_fill() && !c.local.is_empty()) => at(t),
                _ if !c.retry.is_empty() || (self.may_fill() && !c.local.is_empty()) => at(now),
                _ => {}
            }
        }
        if self.restored.is_some() {
            at(self.ticked + TICK);
            if let Some(begins) = self.begins().filter(|at| *at > now) {
                at(begins);
            }
        }
        until.map(|t| t.saturating_duration_since(now))
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        let mut fds = vec![PollFd::new(self.ctl.fd(), PollFlags::POLLIN)];
        let mut add = |fd: BorrowedFd<'_>| {
            // SAFETY: everything that is added stays open until the poll below has returned; only the compiler cannot see it.
            fds.push(PollFd::new(
                unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&fd)) },
                PollFlags::POLLIN,
            ));
        };
        self.listener.iter().for_each(|l| add(std::os::fd::AsFd::as_fd(l)));
        self.connection.iter().for_each(|c| add(std::os::fd::AsFd::as_fd(c)));
        self.consumers.iter().for_each(|c| add(c.fd()));
        if let Some(remote) = &self.remote {
            let fd = remote.fd();
            ensure!(fd >= 0, "the rest of the memory comes from nowhere");
            // SAFETY: a descriptor's number; the trait's is open as long as the object lives.
            add(unsafe { BorrowedFd::borrow_raw(fd) });
        }
        match ppoll(&mut fds, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("waiting for faults"),
        }
    }

    fn orders(&mut self, events: Events<'_>) {
        for order in self.ctl.take() {
            match order {
                Order::Running => self.running = Some(Instant::now()),
                Order::Abort => self.aborted = true,
                Order::Remote(remote) => {
                    self.remote = Some(remote);
                    self.lost = false;
                    let again = self.asked.iter().flat_map(|(space, set)| set.iter().map(|r| (*space, r)));
                    self.to_ask = again.collect();
                    self.ask(events);
                }
            }
        }
    }

    fn handshake(&mut self, events: Events<'_>) -> Result<()> {
        if let Some(listener) = &self.listener
            && let Some(connection) = listener.accept()?
        {
            self.connection = Some(connection);
            self.listener = None;
            events(DaemonEvent::Connected);
        }
        while let Some(connection) = &mut self.connection {
            match connection.read()? {
                None => break,
                Some(Said::Task { pid, uffd, pidfd }) => {
                    ensure!(self.restored.is_none(), "a task comes after CRIU's last word");
                    let space = Space { kind: ImageKind::Pid, id: pid };
                    ensure!(self.consumers.iter().all(|c| c.space != space), "task {pid} comes twice");
                    let (local, remote) = self.planned.remove(&space).unwrap_or_default();
                    let mut consumer = Consumer::new(uffd, space, local, remote);
                    use std::os::fd::AsFd;
                    keep(&mut self.cfg, &mut consumer, pidfd.as_ref().map(|p| p.as_fd()));
                    self.consumers.push(consumer);
                }
                Some(Said::Finished) => {
                    if let Some((space, _)) =
                        self.planned.iter().find(|(_, p)| !p.0.is_empty() || !p.1.is_empty())
                    {
                        bail!("{space:?} has lazy pages but no task came for them");
                    }
                    self.restored = Some(Instant::now());
                    self.stats.store_peak_bytes = self.store.bytes();
                    events(DaemonEvent::Restored);
                }
                Some(Said::End) => {
                    self.connection = None;
                    ensure!(self.restored.is_some(), "the restore ended before all tasks were there");
                }
            }
        }
        Ok(())
    }

    /// Now and then: which tasks have gone without a word, and how far we are.
    fn tick(&mut self, events: Events<'_>) {
        if self.restored.is_none() || self.ticked.elapsed() < TICK {
            return;
        }
        self.ticked = Instant::now();
        for c in &mut self.consumers {
            c.gone |= c.uffd().exited(self.page);
        }
        let local = self.consumers.iter().map(|c| c.local.bytes()).sum();
        let remote = self.consumers.iter().map(|c| c.remote.bytes()).sum();
        events(DaemonEvent::Progress { local, remote });
    }

    fn wait_for_abort(&mut self) {
        while !self.aborted {
            // A failing poll must not make this spin or end.
            let mut fds = [PollFd::new(self.ctl.fd(), PollFlags::POLLIN)];
            if ppoll(&mut fds, None, None).is_err() {
                std::thread::sleep(TICK);
            }
            self.aborted = self.ctl.take().iter().any(|o| matches!(o, Order::Abort));
        }
    }

    /// Closes what is gone, and waits a while for the rest to go. What then remains stays open: [`Consumer`] sees to that.
    fn wait_gone(&mut self) {
        let begun = Instant::now();
        loop {
            for c in std::mem::take(&mut self.consumers) {
                if c.uffd().exited(self.page) { c.close() } else { self.consumers.push(c) }
            }
            if self.consumers.is_empty() || begun.elapsed() > DYING {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The keeper has nothing to watch over any more, unless tasks are left that must not be let go of.
    fn let_go(&mut self) -> Result<()> {
        match self.cfg.keeper.take() {
            Some(keeper) if self.consumers.is_empty() => keeper.release(),
            _ => Ok(()),
        }
    }
}

fn keep(cfg: &mut DaemonConfig, consumer: &mut Consumer, pidfd: Option<BorrowedFd<'_>>) {
    let Some(keeper) = &mut cfg.keeper else { return };
    match keeper.hold(consumer.fd(), pidfd) {
        Ok(id) => consumer.kept = Some(id),
        // The keeper has died: the migration goes on without that safety.
        Err(e) => log::warn!("{e:#}"),
    }
}
