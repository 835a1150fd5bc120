//! Two things that take many moves: all at once in both directions, and one after the other with random faults, for as long as is asked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::fault::{FAULTS, Fate, Fault, Program};
use super::fleet::{Fleet, Ship};
use super::place::{PLACES, Place, Stage};
use super::strike::Strike;
use super::{Points, agrees, settle, strike};
use crate::bed::{Bed, Node};
use crate::trouble::{self, Attempt};

/// Containers that move at the same time, half of them each way.
const AT_ONCE: usize = 20;

/// How many containers of a node stand still at this moment.
fn standing(bed: &Bed, node: Node, ships: &[Ship]) -> Result<usize> {
    let root = bed.path(node, "/sys/fs/cgroup")?;
    let frozen = |ship: &&Ship| {
        let id = &ship.id;
        let v1 = std::fs::read_to_string(root.join(format!("freezer/default/{id}/freezer.state")));
        let v2 = std::fs::read_to_string(root.join(format!("default/{id}/cgroup.freeze")));
        v1.is_ok_and(|s| s.starts_with("FR")) || v2.is_ok_and(|s| s.trim() == "1")
    };
    Ok(ships.iter().filter(frozen).count())
}

/// Twenty containers cross each other, with clients on all: none fails, and as many stand still at a time as may.
pub fn crossing(bed: &Bed) -> Result<()> {
    let mut fleet = Fleet::of(bed, AT_ONCE)?;
    // every second one begins on the other side
    let half: BTreeMap<_, _> = fleet.ships.iter().step_by(2).map(|s| (s.id.clone(), Fate::Here)).collect();
    fleet.each(|bed, ship| if half.contains_key(&ship.id) { ship.go(bed, Node::A) } else { Ok(()) })?;
    for ship in &mut fleet.ships {
        ship.mark()?;
    }
    let from = |ship: &Ship| if half.contains_key(&ship.id) { Node::B } else { Node::A };
    let begun = Instant::now();
    let mut attempts = Vec::new();
    for ship in &fleet.ships {
        attempts.push((ship.id.clone(), Attempt::from(bed, from(ship), &ship.id, &[])?));
    }
    let over = AtomicBool::new(false);
    let (most, outcomes) = std::thread::scope(|scope| {
        let ships = &fleet.ships;
        let over = &over;
        let watch = scope.spawn(move || -> Result<[usize; 2]> {
            let mut most = [0; 2];
            while !over.load(Ordering::Relaxed) {
                for (most, node) in most.iter_mut().zip(Node::ALL) {
                    *most = standing(bed, node, ships)?.max(*most);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(most)
        });
        let outcomes: Result<Vec<_>> = attempts.into_iter().map(|(id, a)| Ok((id, a.finish()?))).collect();
        over.store(true, Ordering::Relaxed);
        (watch.join().unwrap_or_else(|_| anyhow::bail!("panicked")), outcomes)
    });
    let took = begun.elapsed();
    for (id, outcome) in outcomes? {
        ensure!(outcome.code == 0, "{id}: {} {}", outcome.json, outcome.stderr);
    }
    let most = most?;
    let may = std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).max(1));
    eprintln!("{AT_ONCE} moves at once in {took:.1?}; standing still at the same time: {most:?}, {may} may");
    // one that has left is frozen until it is killed
    ensure!(
        most.iter().all(|m| (1..=2 * may).contains(m)),
        "{most:?} stood still at the same time on the nodes, {may} may"
    );
    let mut fates = BTreeMap::new();
    for ship in &mut fleet.ships {
        ship.goes_on()?;
        fates.extend((!half.contains_key(&ship.id)).then(|| (ship.id.clone(), Fate::There)));
    }
    fleet.gather(&fates)?;
    fleet.finish()
}

/// What a soak watches: it must not grow.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// Resident memory of agents and shims, in kB.
    memory: u64,
    /// Their descriptors.
    descriptors: u64,
    /// Files of both nodes, in kB: containerd's, ours, what is on tmpfs.
    disk: u64,
}

fn held(bed: &Bed) -> Result<Held> {
    let mut held = Held::default();
    for node in Node::ALL {
        let mut pids = trouble::processes(bed, node, trouble::AGENT)?;
        pids.extend(trouble::processes(bed, node, trouble::SHIM)?);
        for pid in pids {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
            held.memory += rss.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
            held.descriptors += std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |d| d.count() as u64);
        }
        // what logs and the database of containerd grow by is not ours
        let folders = "du -skx /run /var/lib/transship /var/lib/containerd/io.containerd.snapshotter* /var/lib/containerd/io.containerd.content* 2> /dev/null | cut -f1; true";
        held.disk += bed.sh(node, folders)?.lines().filter_map(|l| l.parse::<u64>().ok()).sum::<u64>();
    }
    Ok(held)
}

/// Whether a soak strikes with this fault there: one copy runs afterwards, and there is something to strike.
fn harmless(fault: Fault, place: &Place) -> bool {
    match fault {
        // what of its memory has not come is lost by many of them
        _ if !fault.applies(place) || place.stage == Stage::Following => false,
        Fault::Killed(Program::Shim, _) | Fault::MemoryLimit(_) | Fault::Clock | Fault::Full(_) => false,
        // with the commit on its way they may have ended by themselves
        Fault::Killed(Program::Criu | Program::Runc, _) => place.stage < Stage::Sent,
        Fault::Killed(..) | Fault::Silent(..) | Fault::Flutter(_) | Fault::Cut(_) | Fault::CommandLine => {
            true
        }
    }
}

/// A small generator, so that a run can be repeated by its seed (xorshift, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Moves back and forth, with a random fault at a random place in every third, until the time is over. Afterwards memory, descriptors and disk
/// are as they were after the first tenth.
pub fn soak(bed: &Bed, minutes: f64) -> Result<()> {
    const SHIPS: usize = 4;
    let seed = std::env::var("TRANSSHIP_SEED").ok().and_then(|s| s.parse().ok());
    let seed =
        seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64 | 1);
    println!("soak: TRANSSHIP_SEED={seed}");
    let mut dice = Dice(seed);
    let mut fleet = Fleet::of(bed, SHIPS)?;
    let mut at = [Node::A; SHIPS];
    let (begun, limit) = (Instant::now(), Duration::from_secs_f64(minutes * 60.0));
    let (mut moves, mut faults, mut back) = (0, 0, 0);
    let mut early: Option<Held> = None;
    let mut last = Held::default();
    while begun.elapsed() < limit || moves < 3 * SHIPS {
        let n = dice.below(SHIPS);
        let (from, id) = (at[n], fleet.ships[n].id.clone());
        fleet.ships[n].mark()?;
        if moves % 3 == 2 {
            let fault = FAULTS[dice.below(FAULTS.len())];
            let place = &PLACES[dice.below(PLACES.len())];
            if !harmless(fault, place) {
                continue;
            }
            let say =
                || format!("move {moves}: {} at {}, from node {}", fault.name(), place.point, from.name());
            faults += 1;
            let points =
                Points::set(bed, &[(strike::node(place.at, from), format!("{} {id}", place.point))])?;
            let options = [&["--silence", fault.silence(), "--mode", "pre-copy"], place.options].concat();
            let mut attempt = Attempt::from(bed, from, &id, &options)?;
            points.reached(|| attempt.has_ended()).with_context(say)?;
            let mut strike = Strike::now(bed, fault, from).with_context(say)?;
            drop(points);
            strike.last().with_context(say)?;
            let outcome = attempt.finish()?;
            strike.undo().with_context(say)?;
            let found = settle(bed, from, &[(id.clone(), fault.allowed(place))])?;
            let fate = found.get(&id).copied();
            let held =
                fate.is_some_and(|f| fault.allowed(place).contains(&f) && agrees(fault, f, outcome.code));
            ensure!(held, "{}: {fate:?}; the command line said {} {}", say(), outcome.code, outcome.json);
            match fate {
                Some(Fate::There) => at[n] = from.other(),
                Some(Fate::Here) => back += 1,
                other => anyhow::bail!("{}: {other:?}", say()),
            }
            fleet.ships[n].goes_on().with_context(say)?;
        } else {
            fleet.ships[n].go(bed, from).with_context(|| format!("move {moves}"))?;
            at[n] = from.other();
        }
        moves += 1;
        if moves % 10 == 0 {
            last = held(bed)?;
            println!(
                "soak: {:.0} s, {moves} moves, {faults} faults ({back} rolled back): {last:?}",
                begun.elapsed().as_secs_f64()
            );
            // what is loaded and cached once is there by then
            if early.is_none() && begun.elapsed() > limit / 10 {
                early = Some(last);
            }
        }
    }
    if let Some(early) = early {
        let flat = |now: u64, then: u64, slack: u64| now <= then + then / 10 + slack;
        ensure!(flat(last.memory, early.memory, 4096), "memory grew: {early:?} to {last:?}");
        ensure!(flat(last.descriptors, early.descriptors, 8), "descriptors grew: {early:?} to {last:?}");
        ensure!(flat(last.disk, early.disk, 4096), "files grew: {early:?} to {last:?}");
    }
    println!(
        "soak: {moves} moves, {faults} faults, {back} rolled back, in {:.0} s; {early:?} became {last:?}",
        begun.elapsed().as_secs_f64()
    );
    let there =
        fleet.ships.iter().zip(at).filter(|(_, at)| *at == Node::B).map(|(s, _)| (s.id.clone(), Fate::There));
    let there = there.collect();
    fleet.gather(&there)?;
    fleet.finish()
}
