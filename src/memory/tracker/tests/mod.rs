//! Trackers on real processes that change their memory in every way we know, against a model of the destination that copies what a
//! look names. At the end everything is stopped, copied a last time and compared: not one wrong byte.

mod child;
mod leftovers;
mod measure;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::class::{Class, class, shmem_device};
use super::scan::{PAGE, Pagemap, Select};
use super::shared::{data, map_file};
use super::*;
use crate::criu::ImageKind;
use crate::memory::maps::{Mapping, mappings};

/// A process that does deeds, and its descendants: all in a session of their own.
pub struct Family {
    first: Child,
    cgroup: Option<std::path::PathBuf>,
}

/// A freezer cgroup of its own, if one can be made here.
fn cgroup() -> Option<std::path::PathBuf> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let root = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"].into_iter().find(|d| {
        let dir = std::path::Path::new(d);
        dir.join("cgroup.procs").exists()
    })?;
    let dir = std::path::Path::new(root).join(format!("tracker-{}-{n}", std::process::id()));
    std::fs::create_dir(&dir).ok()?;
    Some(dir)
}

/// The state of a thread of this process that has neither stopped nor ended.
fn awake(pid: i32) -> Option<char> {
    std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.find_map(|thread| {
        let stat = std::fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
        let state = stat[stat.rfind(')')? + 1..].trim_start().chars().next()?;
        (!is_still(state)).then_some(state)
    })
}

fn is_still(state: char) -> bool {
    matches!(state, 'T' | 'Z' | 'X')
}

impl Family {
    pub fn start(deeds: &str, seed: u64) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", &child::name(), "--nocapture"])
            .env(child::VARIABLE, format!("{deeds}:{seed}"));
        command.stdout(Stdio::piped());
        let cgroup = cgroup();
        let procs =
            cgroup.as_ref().and_then(|c| File::options().write(true).open(c.join("cgroup.procs")).ok());
        // SAFETY: system calls only.
        unsafe {
            command.pre_exec(move || {
                if let Some(mut procs) = procs.as_ref() {
                    std::io::Write::write_all(&mut procs, b"0")?;
                }
                libc::setsid();
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            })
        };
        let mut first = command.spawn().unwrap();
        // it closes it when it begins: a test binary takes a while to start where the processor is emulated
        std::io::copy(&mut first.stdout.take().unwrap(), &mut std::io::sink()).unwrap();
        Self { first, cgroup }
    }

    pub fn pid(&self) -> i32 {
        self.first.id() as i32
    }

    /// Every process of the session with its state letter: that of a thread that has not stopped, if there is one. A thread that sleeps is told
    /// how long it still had to by the kernel, on its stack, when a signal interrupts it: only then has it stopped writing.
    fn members(&self) -> Vec<(i32, char)> {
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|e| {
                let pid: i32 = e.ok()?.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
                let state = fields.next()?.chars().next()?;
                let ours = fields.nth(2)?.parse::<i32>().ok()? == self.pid();
                ours.then(|| (pid, awake(pid).unwrap_or(state)))
            })
            .collect()
    }

    fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.first.try_wait().unwrap()
    }

    pub fn tasks(&self) -> Vec<Task> {
        tasks(&self.members().iter().map(|m| m.0).collect::<Vec<_>>())
    }

    /// Stops all, also those that are being forked.
    pub fn stop(&self) {
        let mut quiet = 0;
        while quiet < 3 {
            let running: Vec<_> = self.members().into_iter().filter(|m| !is_still(m.1)).collect();
            quiet = if running.is_empty() { quiet + 1 } else { 0 };
            for (pid, _) in running {
                // SAFETY: a process of the session that we started.
                unsafe { libc::kill(pid, libc::SIGSTOP) };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        for _ in 0..3 {
            for (pid, _) in self.members() {
                // SAFETY: a process of the session that we started.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        self.first.wait().unwrap();
        let until = Instant::now() + Duration::from_secs(5);
        while let Some(dir) = &self.cgroup
            && std::fs::remove_dir(dir).is_err()
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What the destination holds.
#[derive(Default)]
struct Model {
    pages: HashMap<(Space, u64), Vec<u8>>,
    copied: u64,
}

impl Model {
    /// Copies what a look named; what has gone meanwhile is passed over.
    fn copy(&mut self, tracker: &mut dyn Tracker, all: &[Found]) {
        let mut page = vec![0; PAGE as usize];
        for found in all {
            let Ok(file) = source(&found.source) else { continue };
            let mut read = |tracker: &mut dyn Tracker, pages: &RangeSet| {
                for at in pages.iter().flat_map(|r| (r.start..r.end).step_by(PAGE as usize)) {
                    if file.read_exact_at(&mut page, at).is_ok() {
                        tracker.sent(found.space, at, &page);
                        self.pages.insert((found.space, at), page.clone());
                        self.copied += 1;
                    }
                }
                Ok(())
            };
            in_portions(tracker, &found.source, &found.written, &mut read).unwrap();
        }
    }

    /// Compares everything that CRIU would list. The number of pages, and the first wrong ones.
    fn compare(&self, tasks: &[Task]) -> (u64, Vec<String>) {
        let (mut n, mut wrong) = (0, Vec::new());
        let mut page = vec![0; PAGE as usize];
        for task in tasks {
            let memory = source(&Source::Task(task.pid)).unwrap();
            let mut pagemap = Pagemap::open(task.pid).unwrap();
            for m in mappings(task.pid).unwrap() {
                let (space, set, file, base) = match class(&m, shmem_device()) {
                    Class::Skip => continue,
                    Class::Private { .. } => (
                        Space { kind: ImageKind::Pid, id: task.vpid },
                        pagemap.scan(m.range.clone(), Select::Populated, false).unwrap(),
                        &memory,
                        m.range.start,
                    ),
                    Class::Shared { shmid } => (
                        Space { kind: ImageKind::Shmem, id: shmid },
                        data(task.pid, &m.range).unwrap(),
                        &File::open(map_file(task.pid, &m.range)).unwrap(),
                        0,
                    ),
                };
                for at in set.iter().flat_map(|r| (r.start..r.end).step_by(PAGE as usize)) {
                    n += 1;
                    file.read_exact_at(&mut page, at).unwrap();
                    let have = self.pages.get(&(space, at));
                    if have != Some(&page) {
                        let what = if have.is_some() { "differs" } else { "was never named" };
                        wrong.push(format!("{space:?} page {} of {m:?} {what}", (at - base) / PAGE));
                    }
                }
            }
        }
        (n, wrong)
    }
}

fn source(source: &Source) -> std::io::Result<File> {
    match source {
        Source::Task(pid) => File::open(format!("/proc/{pid}/mem")),
        Source::SharedMap { pid, start, end, .. } => File::open(map_file(*pid, &(*start..*end))),
    }
}

/// Why a tracker cannot be tried here.
fn missing(kind: TrackerKind) -> Option<String> {
    match kind {
        TrackerKind::UffdWp => try_uffd_wp().err(),
        TrackerKind::SoftDirty => try_soft_dirty().err(),
        TrackerKind::Hash => None,
    }
}

/// One run; gives the pages compared and those copied.
fn moves(kind: TrackerKind, late: bool, deeds: &str, seed: u64) -> (u64, u64) {
    let mut family = Family::start(deeds, seed);
    let mut random = child::Random(seed);
    std::thread::sleep(Duration::from_millis(30 + random.below(60) as u64));
    let (mut tracker, mut model) = (open(kind).unwrap(), Model::default());
    if late {
        tracker.protect_late();
    }
    for _ in 0..6 {
        let found = tracker.look(&family.tasks(), false).unwrap();
        model.copy(&mut *tracker, &found);
        std::thread::sleep(Duration::from_millis(random.below(25) as u64));
    }
    family.stop();
    let tasks = family.tasks();
    let found = tracker.look(&tasks, true).unwrap();
    model.copy(&mut *tracker, &found);
    let (n, wrong) = model.compare(&tasks);
    if let Some(end) = family.ended() {
        panic!("{deeds}:{seed}: the child has ended: {end}");
    }
    assert!(n > 50, "{n} pages only: does the child run?");
    assert!(
        wrong.is_empty(),
        "{kind} {deeds}:{seed}: {} of {n} pages are wrong:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(8)].join("\n")
    );
    (n, model.copied)
}

/// How many seeds: more by hand with TRANSSHIP_SEEDS.
fn seeds() -> std::ops::Range<u64> {
    let n = std::env::var("TRANSSHIP_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let from = std::env::var("TRANSSHIP_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    from..from + n
}

fn every_deed(kind: TrackerKind, late: bool) {
    if let Some(why) = missing(kind) {
        println!("skipped: {kind}: {why}");
        return;
    }
    let all = child::DEEDS.join(",");
    for seed in seeds() {
        let chosen = std::env::var("TRANSSHIP_DEEDS").ok();
        let deeds: Vec<&str> = match &chosen {
            Some(chosen) => vec![chosen],
            None => child::DEEDS.into_iter().chain([all.as_str()]).collect(),
        };
        for deed in deeds {
            let began = Instant::now();
            let (n, copied) = moves(kind, late, deed, seed);
            println!("{kind} {deed}:{seed}: {n} pages right, {copied} copied, {:?}", began.elapsed());
        }
    }
}

#[test]
fn write_protection_misses_nothing() {
    every_deed(TrackerKind::UffdWp, false);
}

#[test]
fn protecting_late_misses_nothing() {
    every_deed(TrackerKind::UffdWp, true);
}

/// What is named first is protected when it is read, and not before: a page that is written in between is no news later.
#[test]
fn what_is_written_before_it_is_read_is_read_once() {
    if let Some(why) = missing(TrackerKind::UffdWp) {
        println!("skipped: {why}");
        return;
    }
    let family = Family::start("idle", 1);
    let (tasks, source) = (family.tasks(), Source::Task(family.pid()));
    let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", family.pid())).unwrap();
    let write = |at| {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).unwrap();
        memory.write_all_at(&byte, at).unwrap();
    };
    let heap = mappings(family.pid()).unwrap().into_iter().find(|m| m.name == "[heap]").unwrap().range;
    let mut tracker = open(TrackerKind::UffdWp).unwrap();
    tracker.protect_late();
    let first = tracker.look(&tasks, false).unwrap();
    let of_us = first.iter().find(|f| f.source == source).unwrap();
    let pages = of_us.written.span(heap).unwrap();
    let (early, later) = (pages.start, pages.end - PAGE);
    assert!(tracker.is_late(&source) && early < later);
    write(early);
    // and one that there was not: in a mapping that was named in part, a thread's stack for example
    let anonymous = |m: &Mapping| m.write && !m.shared && m.inode == 0 && !m.name.starts_with("[v");
    let fresh = mappings(family.pid())
        .unwrap()
        .into_iter()
        .filter(|m| anonymous(m) && of_us.written.overlapping(m.range.clone()).next().is_some())
        .find_map(|m| m.range.step_by(PAGE as usize).find(|at| !of_us.written.contains(*at)))
        .expect("a page that nobody has touched");
    write(fresh);
    let mut read = RangeSet::new();
    let mut note = |_: &mut dyn Tracker, pages: &RangeSet| {
        read = read.union(pages);
        Ok(())
    };
    in_portions(&mut *tracker, &source, &of_us.written, &mut note).unwrap();
    assert!(of_us.written.difference(&read).is_empty());
    write(later);
    let second = tracker.look(&tasks, false).unwrap();
    let found = |at| second.iter().any(|f| f.source == source && f.written.contains(at));
    assert!(found(later) && !found(early), "{early:x}, {later:x}: {second:x?}");
    assert!(read.contains(fresh) || found(fresh), "{fresh:x} is lost: {second:x?}");
    assert!(!tracker.is_late(&source), "the second look protects by itself");
}

#[test]
fn soft_dirty_misses_nothing() {
    every_deed(TrackerKind::SoftDirty, false);
}

#[test]
fn comparing_misses_nothing() {
    every_deed(TrackerKind::Hash, false);
}

#[test]
fn the_names_of_trackers() {
    for (kind, name) in [
        (TrackerKind::UffdWp, "uffd-wp"),
        (TrackerKind::SoftDirty, "soft-dirty"),
        (TrackerKind::Hash, "hash"),
    ] {
        assert_eq!(kind.to_string(), name);
        assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{name}\""));
        assert_eq!(open(kind).unwrap().kind(), kind);
    }
    assert_eq!(choose(true, || true), TrackerKind::UffdWp);
    assert_eq!(choose(false, || true), TrackerKind::SoftDirty);
    assert_eq!(choose(false, || false), TrackerKind::Hash);
    assert_eq!(missing(detect()), None);
}
