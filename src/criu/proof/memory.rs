//! Dumps of single processes of several sizes: what leaving memory alone is worth, and that the list of pages is the right one.
//! `cargo test -p transship --lib criu::proof::memory -- --ignored --nocapture`

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::skip_reason;
use crate::cgroup::Freezer;
use crate::criu::rpc::{CriuOpts, NetworkLock};
use crate::criu::{
    Criu, DumpRequest, DumpStats, ImageKind, Listing, MemoryMode, PageEvent, PreparedDump, Worker,
};

/// A process with this much private and shared memory, every page different from zero, in a freezer cgroup of its own.
struct Subject {
    child: Child,
    _stdin: ChildStdin,
    cgroup: String,
    addresses: [u64; 2],
}

const PROGRAM: &str = r#"
import mmap, ctypes, sys, os
open(sys.argv[3] + "/cgroup.procs", "w").write(str(os.getpid()))
os.setsid()
os.closerange(3, 1000)
def fill(mb, flags):
    if not mb: return 0
    m = mmap.mmap(-1, mb << 20, flags=flags | mmap.MAP_ANONYMOUS)
    keep.append(m)
    page = b"x" * (1 << 20)
    for i in range(mb): m[i << 20:(i + 1) << 20] = page
    return ctypes.addressof(ctypes.c_char.from_buffer(m))
keep = []
print(fill(int(sys.argv[1]), mmap.MAP_PRIVATE), fill(int(sys.argv[2]), mmap.MAP_SHARED), flush=True)
sys.stdin.read()
"#;

impl Subject {
    /// In the mount namespace of `worker`: a process that is no container must share CRIU's.
    fn start(private_mb: u64, shared_mb: u64, worker: i32) -> Result<Self> {
        let cgroup = format!("/sys/fs/cgroup/freezer/criu-proof-{}", std::process::id());
        std::fs::create_dir_all(&cgroup)?;
        let mut child = Command::new("nsenter")
            .arg(format!("--mount=/proc/{worker}/ns/mnt"))
            .args(["python3", "-c", PROGRAM, &private_mb.to_string(), &shared_mb.to_string(), &cgroup])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        // read to the end of the line only: what stays open is a pipe to us, external to the dump
        BufReader::new(child.stdout.as_mut().context("stdout")?).read_line(&mut line)?;
        let at: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(at.len() == 2, "the subject says {line:?}");
        let stdin = child.stdin.take().context("stdin")?;
        Ok(Self { child, _stdin: stdin, cgroup, addresses: [at[0], at[1]] })
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn dump(&self, prepared: PreparedDump, listing: Listing<'_>) -> Result<(DumpStats, Duration, Seen)> {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let pipe = |fd: i32| std::fs::read_link(format!("/proc/{}/fd/{fd}", self.pid()));
        let external = [pipe(0)?, pipe(1)?, pipe(2)?].map(|p| p.to_string_lossy().into_owned());
        let opts = CriuOpts {
            pid: Some(self.pid()),
            leave_running: Some(true),
            external: external.to_vec(),
            freeze_cgroup: Some(self.cgroup.clone()),
            network_lock: Some(NetworkLock::Skip as i32),
            manage_cgroups_mode: Some(0),
            log_level: Some(std::env::var("CRIU_LOG_LEVEL").map_or(1, |l| l.parse().unwrap_or(1))),
            ..CriuOpts::default()
        };
        let freezer = Freezer::of_pid(self.pid())?;
        ensure!(freezer.path().to_string_lossy() == self.cgroup, "{:?}", freezer.path());
        freezer.freeze(Duration::from_secs(5))?;
        let mut seen = Seen::default();
        let objects = std::cell::RefCell::new(Vec::new());
        let mut on_shared = |file: std::fs::File| {
            objects.borrow_mut().push(file);
            Ok(())
        };
        let mut image = None;
        let at = Instant::now();
        let result = prepared.dump(
            &mut DumpRequest {
                opts,
                images_dir: dir.path(),
                work_dir: dir.path(),
                descriptors: &Default::default(),
                on_post_dump: None,
                on_images: None,
                listing,
                on_shared: Some(&mut on_shared),
            },
            &mut |event| {
                match event {
                    PageEvent::Open { kind, .. } => image = Some(kind),
                    PageEvent::Pages { bytes, .. } => {
                        *seen.bytes.entry(image.context("an image")?).or_default() += bytes.len() as u64
                    }
                    PageEvent::Hole { vaddr, pages, .. } => {
                        seen.holes.push((image.context("an image")?, vaddr, pages * 4096))
                    }
                    _ => {}
                }
                Ok(())
            },
        );
        let took = at.elapsed();
        seen.objects = objects.take();
        freezer.thaw()?;
        if std::env::var_os("KEEP_LOG").is_some() {
            std::fs::copy(dir.path().join("dump.log"), "/tmp/criu-proof-dump.log").ok();
        }
        let stats = result?;
        let left: Vec<_> = std::fs::read_dir(dir.path())?.flatten().map(|e| e.file_name()).collect();
        ensure!(!left.iter().any(|n| n == "parent" || n == "parent-images"), "{left:?}");
        Ok((stats, took, seen))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

#[derive(Default)]
struct Seen {
    bytes: BTreeMap<ImageKind, u64>,
    holes: Vec<(ImageKind, u64, u64)>,
    /// Shared memory that CRIU did not see.
    objects: Vec<std::fs::File>,
}

impl Seen {
    fn holes_of(&self, kind: ImageKind) -> u64 {
        self.holes.iter().filter(|h| h.0 == kind).map(|h| h.2).sum()
    }
}

#[test]
#[ignore = "needs root and CRIU"]
fn clean_memory_is_left_alone() {
    if let Some(reason) = skip_reason() {
        return println!("SKIPPED: {reason}");
    }
    let criu = Criu::find(Some(std::path::Path::new(super::CRIU))).unwrap();
    let at = Instant::now();
    let modes = criu.memory_modes();
    println!("{modes:?} in {:.1?}", at.elapsed());
    assert_eq!(modes.best, MemoryMode::Parent);
    let sizes = std::env::var("SIZES").unwrap_or("64".into());
    let shared = std::env::var("SHARED").map_or(8, |s| s.parse().unwrap());
    for mb in sizes.split(',').map(|s| s.parse::<u64>().unwrap()) {
        for (mode, written) in [
            (MemoryMode::Full, false),
            (MemoryMode::Parent, false),
            (MemoryMode::Full, false),
            (MemoryMode::Parent, true),
        ] {
            let prepared = criu.prepare_dump(&Worker { memory: mode, ..Worker::default() }).unwrap();
            let subject = Subject::start(mb, shared, prepared.pid()).unwrap();
            let ids = [u64::from(subject.child.id())];
            let listing = if written { Listing::Written(&ids) } else { Listing::Sent };
            let (stats, took, seen) = subject.dump(prepared, listing).unwrap();
            let [private, _] = subject.addresses;
            println!(
                "{mb} MB {mode:?} {listing:?}: {took:.1?} (sink {:.1?}) bytes {:?} holes private {} MB shared {} MB in {} runs",
                stats.in_sink,
                seen.bytes,
                seen.holes_of(ImageKind::Pid) >> 20,
                seen.holes_of(ImageKind::Shmem) >> 20,
                seen.holes.len()
            );
            let end = private + (mb << 20);
            let in_it: u64 = seen
                .holes
                .iter()
                .filter(|h| h.0 == ImageKind::Pid)
                .map(|(_, at, len)| (at + len).min(end).saturating_sub((*at).max(private)))
                .sum();
            if mode == MemoryMode::Parent {
                assert_eq!(in_it, mb << 20, "every page is in the list");
                assert_eq!(seen.bytes.get(&ImageKind::Pid), None);
            } else {
                assert_eq!(in_it, 0);
                assert!(seen.bytes[&ImageKind::Pid] >= mb << 20);
            }
        }
    }
    std::io::stdout().flush().unwrap();
}

#[test]
#[ignore = "needs root and CRIU"]
fn shared_memory_is_left_alone() {
    use std::os::unix::fs::FileExt;
    if let Some(reason) = skip_reason() {
        return println!("SKIPPED: {reason}");
    }
    let criu = Criu::find(Some(std::path::Path::new(super::CRIU))).unwrap();
    let mb = std::env::var("SHARED").map_or(64, |s| s.parse::<u64>().unwrap());
    for conceal in [false, true, false, true] {
        let how = Worker { memory: MemoryMode::Parent, conceal, ..Worker::default() };
        let prepared = criu.prepare_dump(&how).unwrap();
        let subject = Subject::start(1, mb, prepared.pid()).unwrap();
        let (stats, took, seen) = subject.dump(prepared, Listing::Sent).unwrap();
        let bytes = seen.bytes.get(&ImageKind::Shmem).copied().unwrap_or(0);
        println!(
            "{mb} MB shared, concealed {conceal}: {took:.1?} (sink {:.1?}), {bytes} bytes",
            stats.in_sink
        );
        assert_eq!(seen.holes_of(ImageKind::Shmem), 0);
        if conceal {
            assert_eq!((bytes, seen.objects.len()), (0, 1));
            assert_eq!(seen.objects[0].metadata().unwrap().len(), mb << 20);
            let mut page = [0; 4096];
            seen.objects[0].read_exact_at(&mut page, (mb << 20) - 4096).unwrap();
            assert_eq!(page, [b'x'; 4096]);
        } else {
            assert_eq!((bytes, seen.objects.len()), (mb << 20, 0));
        }
    }
}

/// With soft-dirty bits cleared ahead of the freeze, what was written since comes with its bytes, and all else as holes.
#[test]
#[ignore = "needs root and CRIU"]
fn writes_after_the_clearing_are_brought() {
    use std::os::unix::fs::FileExt;
    if let Some(reason) = skip_reason() {
        return println!("SKIPPED: {reason}");
    }
    let criu = Criu::find(Some(std::path::Path::new(super::CRIU))).unwrap();
    let modes = criu.memory_modes();
    assert_eq!(modes.best, MemoryMode::Parent);
    if !modes.soft_dirty {
        return println!("SKIPPED: no soft-dirty bits here");
    }
    let parent = Worker { memory: MemoryMode::Parent, ..Worker::default() };
    let mut prepared = criu.prepare_dump(&parent).unwrap();
    let subject = Subject::start(16, 0, prepared.pid()).unwrap();
    prepared.forget_writes([subject.pid()]).unwrap();
    let [private, _] = subject.addresses;
    let memory = std::fs::File::options().write(true).open(format!("/proc/{}/mem", subject.pid())).unwrap();
    let written = [5, 6, 900];
    for page in written {
        memory.write_at(b"after the clearing", private + page * 4096).unwrap();
    }
    let (_, _, seen) = subject.dump(prepared, Listing::Sent).unwrap();
    let is_hole = |page: u64| {
        let at = private + page * 4096;
        seen.holes.iter().any(|h| h.0 == ImageKind::Pid && (h.1..h.1 + h.2).contains(&at))
    };
    let brought: Vec<u64> = (0..16 * 256).filter(|p| !is_hole(*p)).collect();
    assert_eq!(brought, written);
    assert!(seen.bytes[&ImageKind::Pid] < 1 << 20, "{:?}", seen.bytes);
}
