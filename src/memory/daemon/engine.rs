//! The daemon's loop: who is looked at when. Orders and faults first, then what the source sends, then one batch of the fill.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::buffer::Buffer;
use super::consumer::{Consumer, Served, Stop, Tools};
use super::ctl::{Histogram, Order};
use super::handshake::{Connection, Listener, Said};
use super::pieces::{Pieces, Spent};
use super::uffd::Event;
use super::{Came, DaemonConfig, DaemonCtl, DaemonEvent, DaemonStats, LazySets, Remote};
use crate::criu::ImageKind;
use crate::criu::page_server::page_size;
use crate::memory::read::Chunk;
use crate::memory::store::Store;
use crate::memory::{RangeSet, Space};

/// How often children are asked whether they still live, and progress is told.
const TICK: Duration = Duration::from_millis(100);
/// How long tasks of a failed restore, which CRIU kills, are waited for.
const DYING: Duration = Duration::from_secs(5);
/// While pages come in from the source, faults are looked for this often.
const FAULTS_AT_LEAST: Duration = Duration::from_micros(200);
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
    running: bool,
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
        let planned =
            planned.into_iter().map(|(s, (l, r))| (s, (Pieces::new(&l), Pieces::new(&r)))).collect();
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
            running: false,
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
        if let Some(t) = self.restored {
            at(self.ticked + TICK);
            if !self.running {
                at(t + self.cfg.fill_delay);
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
                Order::Running => self.running = true,
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

    /// Reads every descriptor's messages and answers faults, those put off included.
    fn faults(&mut self) -> Result<()> {
        self.looked_at_faults = Instant::now();
        let mut i = 0;
        // Children of forks are added at the end, and looked at in the same round.
        while i < self.consumers.len() {
            self.faults_of(i)?;
            i += 1;
        }
        Ok(())
    }

    fn faults_of(&mut self, i: usize) -> Result<()> {
        let mut faults = Vec::new();
        loop {
            let messages = self.consumers[i].uffd().read()?;
            if messages.is_empty() {
                break;
            }
            for event in messages {
                let c = &mut self.consumers[i];
                // What was waited for is over once the event is read.
                let changed = !matches!(event, Event::Fault(_));
                match event {
                    Event::Fault(at) => faults.push(at),
                    Event::Gone(range) => c.forget(range),
                    Event::Remap { from, to, len } => c.remap(from, to, len),
                    Event::Fork(uffd) => {
                        let mut child = c.fork(uffd);
                        keep(&mut self.cfg, &mut child, None);
                        self.consumers.push(child);
                        self.stats.forks += 1;
                    }
                }
                if changed {
                    self.consumers[i].again = None;
                }
            }
        }
        let read = Instant::now();
        if !self.consumers[i].resting(read) {
            self.consumers[i].again = None;
            faults.append(&mut self.consumers[i].retry);
        } else {
            self.consumers[i].retry.append(&mut faults);
        }
        for at in faults {
            self.fault(i, at, read)?;
        }
        Ok(())
    }

    fn fault(&mut self, i: usize, at: u64, read: Instant) -> Result<()> {
        let c = &mut self.consumers[i];
        let mut tools =
            Tools { store: &self.store, buf: &mut self.buf, page: self.page, window: self.cfg.window };
        let space = c.space;
        match c.fault(at, &mut tools)? {
            Served::Local(bytes, images) => {
                self.stats.faults_local += 1;
                self.stats.fault_bytes += bytes;
                self.local_times.add(read.elapsed());
                self.to_free.add(space, images);
            }
            Served::Zero => self.stats.faults_zero += 1,
            Served::Remote(image) => {
                c.waiting.entry(at & !(self.page - 1)).or_insert(read);
                self.stats.faults_remote += 1;
                let asked = self.asked.entry(space).or_default();
                if !asked.contains(image.start) {
                    asked.insert(image.clone());
                    self.to_ask.push((space, image));
                }
            }
            Served::Later | Served::Nobody => {}
        }
        Ok(())
    }

    fn listen_to_source(&mut self, events: Events<'_>) -> Result<()> {
        self.ask(events);
        self.more = false;
        let Some(mut remote) = self.remote.take() else { return Ok(()) };
        let mut ours = None;
        let taken = remote.take(&mut |space, chunk| {
            let arrived = self.arrived(space, chunk);
            // An error of the source must not be mixed up with one of ours.
            arrived.map_err(|e| {
                let said = anyhow!("{e:#}");
                ours = Some(e);
                said
            })
        });
        if let Some(e) = ours {
            return Err(e);
        }
        match taken {
            Ok(came @ (Came::Nothing | Came::Something)) => {
                self.more = came == Came::Something;
                self.remote = Some(remote);
            }
            Ok(Came::Everything)
                if self.consumers.iter().all(|c| c.remote.is_empty())
                    && self.planned.values().all(|p| p.1.is_empty()) => {}
            Ok(Came::Everything) => {
                self.lose(&anyhow!("the source says that everything has come, but pages are missing"), events)
            }
            Err(e) => self.lose(&e, events),
        }
        self.ask(events);
        Ok(())
    }

    fn ask(&mut self, events: Events<'_>) {
        let Some(remote) = &mut self.remote else { return };
        // What came in the meantime is not asked for.
        let open = |(space, range): (Space, Range<u64>)| {
            let still: Vec<Range<u64>> =
                self.asked.get(&space).into_iter().flat_map(|a| a.overlapping(range.clone())).collect();
            still.into_iter().map(move |r| (space, r))
        };
        let asked: Result<()> =
            self.to_ask.drain(..).flat_map(open).try_for_each(|(space, range)| remote.ask(space, range));
        if let Err(e) = asked {
            self.lose(&e, events);
        }
    }

    fn lose(&mut self, why: &Error, events: Events<'_>) {
        self.remote = None;
        self.to_ask.clear();
        let mut missing: BTreeMap<Space, RangeSet> = BTreeMap::new();
        let planned = self.planned.iter().map(|(space, p)| (*space, p.1.images()));
        for (space, set) in self.consumers.iter().map(|c| (c.space, c.remote.images())).chain(planned) {
            let known = missing.entry(space).or_default();
            *known = known.union(&set);
        }
        missing.retain(|_, set| !set.is_empty());
        if !missing.is_empty() {
            self.lost = true;
            events(DaemonEvent::Lost { missing: missing.into_iter().collect(), why: format!("{why:#}") });
        }
    }

    /// Pages from the source: straight into the tasks; those whose task cannot take them now wait in the store.
    fn arrived(&mut self, space: Space, chunk: Chunk<'_>) -> Result<()> {
        let (range, bytes) = match chunk {
            Chunk::Data { vaddr, bytes } => (vaddr..vaddr + bytes.len() as u64, Some(bytes)),
            Chunk::Zero { vaddr, len } => (vaddr..vaddr + len, None),
            Chunk::Gone { vaddr, len } => bail!("the source has lost {len} bytes at {vaddr:#x} of {space:?}"),
        };
        if let Some(asked) = self.asked.get_mut(&space) {
            asked.remove(range.clone());
        }
        self.stats.remote_bytes += bytes.map_or(0, |b| b.len() as u64);
        let mut left = RangeSet::new();
        if let Some((local, remote)) = self.planned.get_mut(&space) {
            for piece in remote.take_images(range.clone()) {
                if bytes.is_some() {
                    local.insert(piece);
                    left.insert(piece.images());
                }
            }
        }
        let now = Instant::now();
        for c in self.consumers.iter_mut().filter(|c| c.space == space) {
            for piece in c.remote.take_images(range.clone()) {
                if let Some(bytes) = bytes {
                    let from = (piece.image - range.start) as usize;
                    c.local.insert(piece);
                    if !c.gone && !c.resting(now) {
                        let (_, stop) = c.place(
                            piece.start,
                            &bytes[from..from + (piece.end - piece.start) as usize],
                            self.page,
                        )?;
                        if stop == Stop::Exited {
                            continue;
                        }
                    }
                    for rest in c.local.within(piece.start..piece.end) {
                        left.insert(rest.images());
                    }
                }
                let waited: Vec<u64> = c.waiting.range(piece.start..piece.end).map(|(at, _)| *at).collect();
                for at in waited {
                    self.remote_times.add(c.waiting[&at].elapsed());
                }
                // Whoever was not woken by the copy is answered in the next round: zeros, or a page that could not be placed now.
                c.look_again(piece.start..piece.end);
                if bytes.is_some() {
                    let local = &c.local;
                    c.retry.retain(|at| local.at(*at).is_some() || !(piece.start..piece.end).contains(at));
                }
            }
        }
        if let Some(bytes) = bytes {
            for r in left.iter() {
                let from = (r.start - range.start) as usize;
                self.store.put(space, r.start, &bytes[from..from + (r.end - r.start) as usize])?;
            }
            self.stats.store_peak_bytes = self.stats.store_peak_bytes.max(self.store.bytes());
        }
        if self.looked_at_faults.elapsed() > FAULTS_AT_LEAST {
            self.faults()?;
        }
        Ok(())
    }

    fn may_fill(&self) -> bool {
        let begun = self.running || self.restored.is_some_and(|t| t.elapsed() >= self.cfg.fill_delay);
        self.restored.is_some() && begun && !self.lost
    }

    /// One batch. Restored tasks before children that they forked, which as a rule execute something else soon.
    fn fill(&mut self) -> Result<()> {
        let now = Instant::now();
        self.fill_began.get_or_insert(now);
        let n = self.consumers.len();
        let ready = |c: &Consumer| !c.gone && !c.resting(now) && !c.local.is_empty();
        let order = (0..n).map(|k| (self.turn + k) % n);
        let (first, then): (Vec<usize>, Vec<usize>) =
            order.filter(|i| ready(&self.consumers[*i])).partition(|i| !self.consumers[*i].child);
        let Some(i) = first.into_iter().chain(then).next() else { return Ok(()) };
        self.turn = i + 1;
        let (mut budget, mut end) = (self.cfg.batch, Stop::All);
        'batch: while budget > 0 {
            let c = &mut self.consumers[i];
            let mut group = c.local.group(c.cursor, budget);
            if group.is_empty() {
                group = c.local.group(0, budget);
            }
            let (Some(first), Some(last)) = (group.first(), group.last()) else { break };
            let from = first.image;
            let bytes = &mut self.buf[..(last.images().end - from) as usize];
            self.store.read_span(c.space, from, bytes)?;
            for piece in group {
                let at = (piece.image - from) as usize;
                let len = piece.end - piece.start;
                let (placed, stop) = c.place(piece.start, &bytes[at..at + len as usize], self.page)?;
                self.stats.filled_bytes += placed;
                budget = budget.saturating_sub(len);
                c.cursor = piece.end;
                self.to_free.add(c.space, piece.images());
                if stop != Stop::All {
                    end = stop;
                    break 'batch;
                }
            }
        }
        if let Stop::NotMapped(at) = end {
            self.consumers[i].cursor = at + self.page;
            // Its mapping may have gone in this moment: then an event is on its way, and nothing can be placed until it is read.
            self.faults_of(i)?;
            self.unplaced(i, at)?;
        }
        self.free()
    }

    /// A page that has no place: certain once a second attempt, after all events, is told the same.
    fn unplaced(&mut self, i: usize, at: u64) -> Result<()> {
        let page = self.page;
        let c = &mut self.consumers[i];
        let Some(piece) = c.local.at(at) else { return Ok(()) };
        let image = piece.image + (at - piece.start);
        let bytes = &mut self.buf[..page as usize];
        self.store.read_at(c.space, image, bytes)?;
        if let (_, Stop::NotMapped(_)) = c.place(at, bytes, page)? {
            c.local.remove(at..at + page);
            // A child lacks what its parent had marked MADV_DONTFORK; for a restored task there is no such reason.
            if !c.child {
                self.stats.unplaced_bytes += page;
            }
        }
        Ok(())
    }

    /// Gives back what nobody waits for any more. With several consumers of a space that is known when all but one have gone.
    fn free(&mut self) -> Result<()> {
        if !self.to_free.enough() {
            return Ok(());
        }
        for (space, range) in self.to_free.take() {
            let mut users = self.consumers.iter().filter(|c| c.space == space);
            let (Some(user), None) = (users.next(), users.next()) else { continue };
            let waits = user.local.images_within(range.clone());
            for r in RangeSet::from(range).difference(&waits).iter() {
                self.store.free(space, r)?;
            }
        }
        Ok(())
    }

    fn part_with_the_complete(&mut self) -> Result<()> {
        let (leaving, staying): (Vec<Consumer>, Vec<Consumer>) =
            std::mem::take(&mut self.consumers).into_iter().partition(|c| c.gone || c.complete());
        self.consumers = staying;
        let mut spaces: Vec<Space> = leaving.iter().map(|c| c.space).collect();
        for c in leaving {
            if let (Some(id), Some(keeper)) = (c.kept, &self.cfg.keeper) {
                let _ = keeper.drop_one(id);
            }
            c.close();
        }
        spaces.dedup();
        for space in spaces {
            let mut users = self.consumers.iter().filter(|c| c.space == space);
            match (users.next(), users.next()) {
                (None, _) => self.store.drop_space(space),
                (Some(last), None) => {
                    let unneeded = self.store.data(space).difference(&last.local.images());
                    for r in unneeded.iter() {
                        self.store.free(space, r)?;
                    }
                }
                _ => {}
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
