//! The fault matrix: at each phase of a migration, on each side, something breaks; afterwards there is exactly one copy, and it is whole.
//!
//! All places are struck at once: a container stands still at each, then the fault is done, once, to both nodes, and everybody goes on.
//!
//! | file | what lives there |
//! |---|---|
//! | [`place`] | the phases |
//! | [`fault`] | the faults, and what may become of a container (data) |
//! | [`strike`] | doing a fault, and undoing it |
//! | [`fleet`] | the containers and their clients |
//! | [`soak`] | many moves: at once, and for as long as is asked |
//! | [`table`] | what was found |

pub mod fault;
mod fleet;
mod place;
pub mod soak;
mod strike;
pub mod table;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::fault::{Fate, Fault, Program};
use self::fleet::{Fleet, fate, states};
use self::place::{PLACES, Side, Stage};
pub use self::strike::start_containerd;
use self::strike::{Strike, node};
use self::table::Cell;
use crate::bed::{Bed, Containerd, Node, patient, wait_for};
use crate::live;
use crate::trouble::{self, Attempt, Configured};

/// Whether this containerd's run tries a fault: each is tried under one of them. With TRANSSHIP_TEST_MATRIX=all every fault under both;
/// TRANSSHIP_TEST_FAULT: only faults whose names contain it.
fn mine(bed: &Bed, fault: Fault) -> bool {
    if let Ok(only) = std::env::var("TRANSSHIP_TEST_FAULT") {
        return fault.name().contains(&only);
    }
    let all = std::env::var("TRANSSHIP_TEST_MATRIX").is_ok_and(|m| m == "all");
    let odd = fault::FAULTS.iter().position(|f| *f == fault).is_some_and(|n| n % 2 == 1);
    all || odd == (bed.containerd() == Containerd::V21)
}

/// Tries these faults at every place.
pub fn run(bed: &Bed, faults: impl Iterator<Item = Fault>) -> Result<()> {
    let faults: Vec<_> = faults.filter(|f| mine(bed, *f)).collect();
    if faults.is_empty() {
        return Ok(());
    }
    ensure!(cfg!(debug_assertions), "release builds have no fault points: build the tests without --release");
    // all of them stand still at the same time
    let _many = Configured::new(bed, Node::A, "max_frozen = 64")?;
    let _rooms = Node::ALL.map(|node| strike::room(bed, node)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut fleet = Fleet::start(bed)?;
    let clean = shape(bed)?;
    let mut broken = 0;
    for fault in faults {
        let begun = Instant::now();
        broken += strike_all(bed, &mut fleet, fault).with_context(|| fault.name())?;
        same_shape(bed, &clean).with_context(|| format!("after {}", fault.name()))?;
        eprintln!("matrix: {}: {:.1} s", fault.name(), begun.elapsed().as_secs_f64());
    }
    fleet.finish()?;
    ensure!(broken == 0, "{broken} cells are broken\n{}", table::table().unwrap_or_default());
    Ok(())
}

/// One fault at all places where it can strike; how many cells did not hold.
fn strike_all(bed: &Bed, fleet: &mut Fleet<'_>, fault: Fault) -> Result<usize> {
    let cells: Vec<usize> = (0..PLACES.len()).filter(|n| fault.applies(&PLACES[*n])).collect();
    for ship in &mut fleet.ships {
        ship.mark()?;
    }
    let line = |n: &usize| (node(PLACES[*n].at, Node::A), format!("{} {}", PLACES[*n].point, place::id(*n)));
    let points = Points::set(bed, &cells.iter().map(line).collect::<Vec<_>>())?;
    let mut attempts = Vec::new();
    for &n in &cells {
        let mode = PLACES[n].options.first().is_none_or(|o| *o != "--mode");
        let mode: &[&str] = if mode { &["--mode", "pre-copy"] } else { &[] };
        let options = [&["--silence", fault.silence()], mode, PLACES[n].options].concat();
        attempts.push((n, Attempt::start(bed, &place::id(n), &options)?));
    }
    let reached = points.reached(|| attempts.iter_mut().any(|(_, a)| a.has_ended()));
    if let Err(e) = reached {
        return Err(e.context(early_ends(attempts)));
    }
    let mut strike = Strike::now(bed, fault, Node::A)?;
    drop(points);
    strike.last()?;
    let mut said = BTreeMap::new();
    for (n, attempt) in attempts {
        said.insert(n, attempt.finish()?);
    }
    // what is undecided while the fault lasts is decided when it is over
    strike.undo()?;
    let allowed: Vec<_> = cells.iter().map(|n| (place::id(*n), fault.allowed(&PLACES[*n]))).collect();
    let mut fates = settle(bed, Node::A, &allowed).with_context(|| fault.name())?;
    let mut verdicts = BTreeMap::new();
    for &n in &cells {
        verdicts.insert(n, judge(fault, n, fates.get(&place::id(n)).copied(), said[&n].code));
    }
    let cut_off = still_answer(bed, fleet, fault, &mut verdicts)?;
    let mut wrong = 0;
    for (n, verdict) in verdicts {
        if needs_another(n, &verdict) || cut_off.contains(&n) {
            fates.insert(place::id(n), Fate::Ended);
        }
        if let Err(why) = &verdict {
            wrong += 1;
            let (point, outcome) = (PLACES[n].point, &said[&n]);
            eprintln!("matrix: {} at {point}: {why}\n  {} {}", fault.name(), outcome.json, outcome.stderr);
        }
        table::note(fault, n, verdict.map_or_else(Cell::Broken, Cell::Held));
    }
    resolve(bed, &mut fates)?;
    fleet.gather(&fates)?;
    trouble::nothing_on(bed, Node::B)?;
    Ok(wrong)
}

/// What migrations said that were over before they were to be struck.
fn early_ends(attempts: Vec<(usize, Attempt)>) -> String {
    let mut text = String::from("nothing was struck");
    for (n, mut attempt) in attempts {
        if attempt.has_ended() {
            let said = attempt.finish().map(|o| format!("{} {} {}", o.code, o.json, o.stderr));
            let _ = write!(text, "\n{}: {}", place::id(n), said.unwrap_or_else(|e| format!("{e:#}")));
        }
    }
    text
}

/// What became of a container: whether the fault may do that, and whether the command line said so.
fn judge(fault: Fault, n: usize, found: Option<Fate>, code: i32) -> Result<Fate, String> {
    let allowed = fault.allowed(&PLACES[n]);
    match found {
        Some(fate) if !allowed.contains(&fate) => Err(format!("{fate:?} where {allowed:?} is right")),
        Some(fate) if !agrees(fault, fate, code) => {
            Err(format!("{fate:?}, but the command line said {code}"))
        }
        Some(fate) => Ok(fate),
        None => Err("neither here nor there".into()),
    }
}

/// A copy that is thawed after another one has run for a while knows nothing of what that one told its clients.
fn given_back(n: usize, verdict: &Result<Fate, String>) -> bool {
    PLACES[n].stage == Stage::Following && *verdict == Ok(Fate::Here)
}

/// Whether the next fault needs a sound container in the place of this one.
fn needs_another(n: usize, verdict: &Result<Fate, String>) -> bool {
    verdict.is_err() || given_back(n, verdict)
}

/// The clients of all that run still get replies, each as it must be; the verdict on those that do not is changed. Returns those whose
/// client has lost its connection where that may be.
fn still_answer(
    bed: &Bed,
    fleet: &mut Fleet<'_>,
    fault: Fault,
    verdicts: &mut BTreeMap<usize, Result<Fate, String>>,
) -> Result<Vec<usize>> {
    let runs =
        |n: usize, v: &Result<Fate, String>| matches!(v, Ok(Fate::Here | Fate::There)) && !given_back(n, v);
    // all of them first: their clients report once a second
    for (n, _) in verdicts.iter().filter(|(n, v)| runs(**n, v)) {
        fleet.ships[*n].mark()?;
    }
    let mut cut_off = Vec::new();
    for (n, verdict) in verdicts.iter_mut().filter(|(n, v)| runs(**n, v)) {
        let Err(e) = fleet.ships[*n].goes_on() else { continue };
        // CRIU holds sockets in repair mode and its tasks unfrozen. If it is killed they run at once, and the kernel refuses to read what
        // had come unread before the freeze: a server takes that for a broken connection. What it has and does is whole.
        if fault == Fault::Killed(Program::Criu, Side::Source) && fleet.ships[*n].is_whole(bed, Node::A)? {
            eprintln!("matrix: {} lost its connection to a CRIU that was killed", fleet.ships[*n].id);
            cut_off.push(*n);
            continue;
        }
        *verdict = Err(format!("its client: {e:#}"));
    }
    Ok(cut_off)
}

/// Waits until every container is where it may stay: what the agents have not finished they go on with.
fn settle(bed: &Bed, from: Node, wanted: &[(String, &[Fate])]) -> Result<BTreeMap<String, Fate>> {
    let begun = Instant::now();
    loop {
        let (here, there) = (states(bed, from)?, states(bed, from.other())?);
        let (mut fates, mut right, mut frozen, mut seen) = (BTreeMap::new(), true, true, String::new());
        for (id, allowed) in wanted {
            let (a, b) = (here.get(id), there.get(id));
            let found = fate(a.map(String::as_str), b.map(String::as_str));
            // a frozen one may still be decided without the operator
            let fine = found.is_some_and(|f| allowed.contains(&f) && f != Fate::Frozen);
            fates.extend(found.map(|f| (id.clone(), f)));
            if !fine {
                right = false;
                frozen &= found == Some(Fate::Frozen) && allowed.contains(&Fate::Frozen);
                seen.push_str(&format!("\n  {id}: {a:?} here, {b:?} there"));
            }
        }
        if right {
            return Ok(fates);
        }
        let limit = if frozen { 8 } else { 25 };
        if begun.elapsed() > patient(Duration::from_secs(limit)) {
            eprintln!("matrix: after {:?}:{seen}", begun.elapsed());
            return Ok(fates);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Whether the command line's exit status fits what became of the container.
fn agrees(fault: Fault, fate: Fate, code: i32) -> bool {
    match fate {
        // it was killed, or its agent: it could say nothing
        _ if matches!(fault, Fault::CommandLine | Fault::Killed(fault::Program::Agent, Side::Source)) => true,
        Fate::There => code == 0 || code == 9,
        // undecided first, and then decided
        Fate::Here => code != 0,
        // it moved, and then ended with its shim
        Fate::Ended => true,
        Fate::Frozen => code == 9,
    }
}

/// The operator's decision about those that are frozen.
fn resolve(bed: &Bed, fates: &mut BTreeMap<String, Fate>) -> Result<()> {
    for (id, fate) in fates.iter_mut().filter(|(_, f)| **f == Fate::Frozen) {
        let listed = bed.ok(Node::A, &["transship", "ps"])?;
        let line = listed.lines().find(|l| l.contains(id.as_str())).unwrap_or_default();
        ensure!(line.contains("undecided") && line.contains("resolve"), "{listed}");
        bed.ok(Node::A, &["transship", "resolve", id, "--run-here", "--yes"])?;
        // clients may have been told what is forgotten now
        *fate = Fate::Ended;
    }
    Ok(())
}

/// The points at which containers stand still; they go on when it is dropped.
struct Points<'a> {
    bed: &'a Bed,
    waited: Vec<(Node, String)>,
}

const FAULT: &str = "/run/transship/fault";

impl<'a> Points<'a> {
    /// `POINT ID` on a node, for each.
    fn set(bed: &'a Bed, waited: &[(Node, String)]) -> Result<Points<'a>> {
        let waited = waited.to_vec();
        for node in Node::ALL {
            let lines: String =
                waited.iter().filter(|(n, _)| *n == node).map(|(_, l)| format!("{l}\n")).collect();
            bed.sh(node, &format!("rm -f {FAULT}.reached; printf '{lines}' > {FAULT}"))?;
        }
        Ok(Points { bed, waited })
    }

    /// Waits until everybody stands still, or `ended` says that somebody will not.
    fn reached(&self, mut ended: impl FnMut() -> bool) -> Result<()> {
        let mut missing = Vec::new();
        let all = wait_for(Duration::from_secs(90), "all places", || {
            let mut reached = Vec::new();
            for node in Node::ALL {
                let file = self.bed.path(node, &format!("{FAULT}.reached"))?;
                reached.push(std::fs::read_to_string(file).unwrap_or_default());
            }
            missing.clear();
            for (node, line) in &self.waited {
                let there = &reached[usize::from(*node == Node::B)];
                if !there.lines().any(|l| l == line) {
                    missing.push(line.clone());
                }
            }
            ensure!(missing.is_empty() || !ended(), "a migration ended before its place");
            Ok(missing.is_empty())
        });
        all.map_err(|e| e.context(format!("not reached: {missing:?}")))
    }
}

impl Drop for Points<'_> {
    fn drop(&mut self) {
        for node in Node::ALL {
            if let Err(e) = self.bed.sh(node, &format!("rm -f {FAULT} {FAULT}.reached")) {
                eprintln!("{e:#}");
            }
        }
    }
}

/// What is on node a while all containers run there: processes, mounts, cgroups, files, rules, by their kinds.
fn shape(bed: &Bed) -> Result<String> {
    let mut lines = bed.hack(["leaks", "a"])?;
    lines.push_str(&bed.sh(
        Node::A,
        "ctr leases ls -q | sed 's/^/lease /'; ctr content active | sed 1d
         find /run/transship/incoming /run/transship/images -type f 2> /dev/null | grep -v 'dump.log$' || true
         for n in $(ip netns ls | cut -d' ' -f1); do ip netns exec $n nft list ruleset | sed \"s/^/rules of $n: /\"; done",
    )?);
    lines.push_str(&live::traces(bed, Node::A)?);
    // numbers, and what is made at random
    let plain = |line: &str| {
        let mut text = String::new();
        for c in line.chars() {
            match c {
                '0'..='9' if text.ends_with('#') => {}
                '0'..='9' => text.push('#'),
                c => text.push(c),
            }
        }
        if line.starts_with("link ") { "link #".into() } else { text }
    };
    let mut counted = BTreeMap::new();
    for line in lines.lines().filter(|l| !l.trim().is_empty()) {
        *counted.entry(plain(line)).or_insert(0) += 1;
    }
    Ok(counted.iter().map(|(line, n)| format!("{n} x {line}\n")).collect())
}

fn same_shape(bed: &Bed, clean: &str) -> Result<()> {
    let mut now = String::new();
    let same = wait_for(Duration::from_secs(20), "the node as before", || {
        now = shape(bed)?;
        Ok(now == clean)
    });
    if same.is_err() {
        let differs = |a: &str, b: &str, sign: char| {
            a.lines()
                .filter(|l| !b.lines().any(|o| o == *l))
                .map(|l| format!("  {sign} {l}\n"))
                .collect::<String>()
        };
        bail!("node a is not as before:\n{}{}", differs(clean, &now, '-'), differs(&now, clean, '+'));
    }
    Ok(())
}
