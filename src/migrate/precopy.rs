//! Pre-copy on the source: rounds of memory and writable layer while the container runs, until the rest fits the downtime that
//! is allowed or no longer shrinks. The decision itself is [`crate::memory::converge`]'s.

use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::background::Background;
use super::capture::Context;
use super::codec::Kind;
use super::copier::Copier;
use super::fault;
use super::layers::Layers;
use super::prepared::Prepared;
use super::protocol::{self, Prepare, Ready};
use super::report::{Clock, Round, millis};
use super::slowdown::{Slowdown, Usual};
use super::tmpfs::{self, Tmpfs};
use super::turn::{Turn, Turns};
use crate::control::Event;
use crate::criu::page_server::page_size;
use crate::criu::prepared::{PreparedDump, Worker};
use crate::criu::{self, MemoryMode, stand_in};
use crate::memory::converge::{self, Budget, Decision, RoundStats};
use crate::memory::tracker::{self, Found};
use crate::program::Programs;

/// So long a container waits for its turn to stand still before it is copied once more.
const TURN: Duration = Duration::from_millis(500);

/// How to go on when the rounds have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Everything that is missing goes over in the freeze.
    Freeze,
    /// What is missing stays here and follows when the tasks run on the destination.
    FreezePostCopy,
}

/// What the rounds came to.
pub(super) struct Ahead {
    pub next: Next,
    /// What is known to be unsent.
    pub found: Vec<Found>,
    /// The right to stand still.
    pub turn: Turn,
    pub rounds: Vec<Round>,
    /// A CRIU that only waits for the freeze.
    pub worker: PreparedDump,
    /// Its tools.
    pub tools: PathBuf,
}

/// Copies in rounds, has the destination make itself ready, and catches up with what was written meanwhile.
///
/// # Errors
/// With the container running as before, but for the tracker's registration, which goes with `copier`.
pub(super) fn run(
    cx: &Context<'_>,
    prepared: &Prepared,
    copier: &mut Copier,
    layers: &mut Layers,
    tmpfs: Option<&mut Tmpfs>,
    clock: &mut Clock,
) -> Result<Ahead> {
    let tuning = &cx.options.tuning;
    // CRIU's first image: runc wants it before CRIU's restore begins
    send_descriptors(cx, prepared)?;
    let budget = Budget::new(Duration::from_millis(tuning.max_downtime_ms), tuning.max_rounds, tuning.mode);
    let mut rounds = Rounds {
        cx,
        prepared,
        copier,
        layers,
        tmpfs,
        all: Vec::new(),
        stats: Vec::new(),
        usual: None,
        destination_waits: false,
    };
    let mut decision = converge::decide(&[], &budget, None);
    let mut found = Vec::new();
    if decision == Decision::Another {
        rounds.usual = Some(Usual::watch(rounds.pids()?));
        found = rounds.look()?;
        while decision == Decision::Another {
            found = rounds.one(&found, clock)?;
            decision = converge::decide(&rounds.stats, &budget, rounds.link_rate());
        }
    }
    let mut next = match decision {
        Decision::FreezePostCopy => Next::FreezePostCopy,
        _ => Next::Freeze,
    };
    if !rounds.layers.begun() {
        // the destination mounts it now
        let pids = rounds.pids()?;
        rounds.layers.round(&pids, cx.link)?;
        rounds.tmpfs(&pids)?;
    }
    cx.begin(clock, "prepare the destination");
    let post_copy = next == Next::FreezePostCopy;
    cx.link.json(Kind::Prepare, &Prepare {})?;
    cx.link.flush()?;
    let programs = Programs::find()?;
    let tools = criu::tar::tools(&prepared.work(), &programs).context("CRIU's tools")?;
    let unseen = stand_in::worth_it(rounds.pids()?);
    let how = Worker {
        memory: MemoryMode::Parent,
        netns: Some(prepared.netns.as_fd()),
        path_first: Some(&criu::tar::first(&tools)),
        conceal: rounds.copier.knows_shared() && criu::conceal::possible(rounds.pids()?),
        unseen: programs.quick.as_deref().map(|quick| (quick, &unseen[..])).filter(|_| !unseen.is_empty()),
    };
    let worker = prepared.criu.prepare_dump(&how).context("starting CRIU")?;
    cx.link.wire().expect::<Ready>(Kind::Ready).context("waiting until the destination is ready")?;
    rounds.destination_waits = true;
    if !post_copy {
        // what was written while the destination made itself ready
        found = merge(found, rounds.look()?);
        if converge::top_up(bytes_of(&found), rounds.link_rate()) {
            found = rounds.one(&found, clock)?;
            if converge::decide(&rounds.stats, &budget, rounds.link_rate()) == Decision::FreezePostCopy {
                next = Next::FreezePostCopy;
            }
        }
    }
    let turns = Turns::of_node(cx.options.limits.max_frozen);
    let turn = loop {
        match turns.take(cx, TURN)? {
            Some(turn) => break turn,
            None if post_copy => {}
            // others stand still: what is written meanwhile need not wait for the freeze
            None => {
                found = merge(found, rounds.look()?);
                found = rounds.one(&found, clock)?;
            }
        }
    };
    Ok(Ahead { next, found, turn, rounds: rounds.all, worker, tools })
}

/// Two looks as one: what either has found is still to be sent.
pub(super) fn merge(earlier: Vec<Found>, mut later: Vec<Found>) -> Vec<Found> {
    for old in earlier {
        match later.iter_mut().find(|new| new.space == old.space) {
            Some(new) => new.written = new.written.union(&old.written),
            None => later.push(old),
        }
    }
    later
}

struct Rounds<'a> {
    cx: &'a Context<'a>,
    prepared: &'a Prepared,
    copier: &'a mut Copier,
    layers: &'a mut Layers,
    tmpfs: Option<&'a mut Tmpfs>,
    all: Vec<Round>,
    stats: Vec<RoundStats>,
    /// What the tasks did before the first round.
    usual: Option<Usual>,
    /// Then nobody is to wait for the processor any more.
    destination_waits: bool,
}

impl Rounds<'_> {
    fn pids(&self) -> Result<Vec<i32>> {
        Ok(self.prepared.freezer.pids().context("listing the tasks")?.into_iter().collect())
    }

    fn look(&mut self) -> Result<Vec<Found>> {
        self.copier.look(&tracker::tasks(&self.pids()?), false)
    }

    fn tmpfs(&mut self, pids: &[i32]) -> Result<tmpfs::Sent> {
        let Some(tmpfs) = &mut self.tmpfs else { return Ok(tmpfs::Sent::default()) };
        let (cx, copier) = (self.cx, Mutex::new(&mut *self.copier));
        tmpfs.round(pids, cx.link, &|bytes| {
            cx.abort.go_on()?;
            copier.lock().unwrap_or_else(PoisonError::into_inner).pace(bytes, &|_| cx.abort.go_on())
        })
    }

    /// Sends what was found, and looks what was written meanwhile.
    fn one(&mut self, found: &[Found], clock: &mut Clock) -> Result<Vec<Found>> {
        let cx = self.cx;
        cx.go_on()?;
        let n = self.all.len() as u32 + 1;
        clock.phase(&format!("round {n}"));
        (cx.events)(Event::Round { n, total: Some(bytes_of(found)) });
        fault::point(if n == 1 { "round" } else { "later-round" }, Some(cx.link));
        let begun = Instant::now();
        cx.link.json(Kind::Round, &protocol::Round { n, bytes: bytes_of(found) })?;
        let (sent, shown) = (Cell::new(0), Cell::new(0));
        let background = (!self.destination_waits).then(Background::enter);
        let slowdown = RefCell::new(self.usual.take().map(Usual::copying));
        let copied = self.copier.send(found, cx.link, &|bytes| {
            let owed = slowdown.borrow_mut().as_mut().map(Slowdown::owed);
            std::thread::sleep(owed.unwrap_or_default());
            sent.set(sent.get() + bytes);
            if sent.get() - shown.get() > 8 << 20 {
                shown.set(sent.get());
                (cx.events)(Event::Progress { bytes: sent.get(), total: None });
            }
            cx.go_on()
        })?;
        let pids = self.pids()?;
        let layer = self.layers.round(&pids, cx.link)?;
        let tmpfs = self.tmpfs(&pids)?;
        cx.link.flush()?;
        drop(background);
        let next = self.look()?;
        let took = begun.elapsed();
        let page = page_size() as u64;
        let dirty_after_bytes = bytes_of(&next);
        let stats = RoundStats {
            bytes: copied.bytes,
            pages: copied.bytes / page,
            seconds: took.as_secs_f64().max(1e-6),
            dirty_after_bytes,
        };
        self.stats.push(stats);
        let round = Round {
            n,
            start_ms: clock.now_ms() - millis(took),
            ms: millis(took),
            pages: (copied.bytes + copied.zero_bytes) / page,
            bytes: copied.bytes + copied.zero_bytes,
            wire_bytes: copied.wire_bytes,
            zero_pages: copied.zero_bytes / page,
            dirty_after_bytes,
            dirty_rate: stats.dirty_rate() as u64,
            layer_bytes: layer.bytes,
            layer_entries: layer.entries,
            tmpfs_bytes: tmpfs.bytes,
        };
        (cx.events)(Event::RoundDone { round: round.clone() });
        self.all.push(round);
        Ok(next)
    }

    /// Bytes of memory per second that reach the peer, by the rounds so far.
    fn link_rate(&self) -> Option<f64> {
        let (bytes, seconds) = self
            .stats
            .iter()
            .filter(|s| s.bytes > 1 << 20)
            .fold((0, 0.0), |(b, t), s| (b + s.bytes, t + s.seconds));
        if seconds > 0.0 { Some(bytes as f64 / seconds) } else { self.copier.rate() }
    }
}

fn bytes_of(found: &[Found]) -> u64 {
    found.iter().map(|f| f.written.bytes()).sum()
}

fn send_descriptors(cx: &Context<'_>, prepared: &Prepared) -> Result<()> {
    let bytes = serde_json::to_vec(&prepared.descriptors)?;
    let name = criu::stdio::FILE.to_owned();
    cx.link.json(Kind::File, &protocol::FileHeader { name, size: bytes.len() as u64 })?;
    cx.link.frame(Kind::FileData, &[&bytes])
}
