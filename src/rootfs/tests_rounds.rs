//! Rounds, one case at a time. Most need root: they say so and do nothing without it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::testing::{self, Wire};
use super::*;

fn skip() -> bool {
    let why = testing::cannot_run();
    why.inspect(|why| println!("SKIP: {why}")).is_some()
}

/// Both ends, in one scratch directory.
struct Ends {
    base: tempfile::TempDir,
    staged: Staged,
    apply: Apply,
}

impl Ends {
    fn new() -> Ends {
        let base = tempfile::tempdir().unwrap();
        let layer = |name: &str| {
            fs::create_dir(base.path().join(name)).unwrap();
            WritableLayer { dir: base.path().join(name), kind: LayerKind::Overlay { userxattr: false } }
        };
        let (from, to) = (layer("from"), layer("to"));
        let (staged, apply) = (Staged::new(&from).unwrap(), Apply::for_layer(&to).unwrap());
        Ends { base, staged, apply }
    }

    fn from(&self, name: &str) -> PathBuf {
        self.base.path().join("from").join(name)
    }

    fn round(&mut self, writers: &Writers) -> Stats {
        let stats = self.staged.round(writers, &mut Wire::new(&mut self.apply)).unwrap();
        self.apply.round().unwrap();
        stats
    }

    #[track_caller]
    fn same(&self) {
        let options = CompareOptions { overlay: OverlayXattrs::Trusted, atime: false };
        let found = compare(&self.from(""), &self.base.path().join("to"), options).unwrap();
        assert_eq!(found, []);
    }
}

/// Longer ago than what is not trusted.
fn settle() {
    std::thread::sleep(Duration::from_millis(60));
}

#[test]
fn nothing_changed_costs_nothing() {
    if skip() {
        return;
    }
    let mut ends = Ends::new();
    fs::create_dir_all(ends.from("a/b")).unwrap();
    fs::write(ends.from("a/b/f"), vec![7; 100_000]).unwrap();
    fs::hard_link(ends.from("a/b/f"), ends.from("a/g")).unwrap();
    settle();
    let first = ends.round(&Writers::none());
    assert_eq!((first.entries, first.bytes_data), (5, 100_000));
    let second = ends.round(&Writers::none());
    assert_eq!((second.entries, second.looked, second.bytes_read), (1, 5, 0), "{second:?}");
    ends.same();
}

#[test]
fn of_a_large_file_only_what_changed() {
    if skip() {
        return;
    }
    let mut ends = Ends::new();
    let file = File::create(ends.from("f")).unwrap();
    (0..64).for_each(|i| file.write_all_at(&vec![i as u8 + 1; 1 << 20], i << 20).unwrap());
    ends.round(&Writers::none());
    file.write_all_at(&[99; 4096], 5 << 20).unwrap();
    file.write_all_at(&[98; 10], 64 << 20).unwrap();
    let second = ends.round(&Writers::none());
    assert_eq!((second.patched, second.bytes_data), (1, 4096 + 10), "{second:?}");
    ends.same();
    // A hole where data was, a shorter file, a new name of it.
    super::sys::punch(std::os::fd::AsFd::as_fd(&file), 8192, 8192).unwrap();
    file.set_len(40 << 20).unwrap();
    fs::hard_link(ends.from("f"), ends.from("another")).unwrap();
    let third = ends.round(&Writers::none());
    assert_eq!((third.links, third.bytes_data), (1, 0), "{third:?}");
    ends.same();
}

#[test]
fn a_write_in_the_same_tick_is_seen() {
    if skip() {
        return;
    }
    let mut ends = Ends::new();
    let file = File::create(ends.from("f")).unwrap();
    for i in 0..50u8 {
        file.write_all_at(&[i; 64], 0).unwrap();
        ends.round(&Writers::none());
        ends.same();
    }
}

#[test]
fn writes_through_a_mapping_are_seen() {
    if skip() {
        return;
    }
    let mut ends = Ends::new();
    let file = File::options().read(true).write(true).create_new(true).open(ends.from("f")).unwrap();
    file.set_len(8192).unwrap();
    // SAFETY: a fresh mapping of our file, unmapped at the end.
    let map = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 8192, prot, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    let map = map.cast::<u8>();
    // SAFETY: within the mapping.
    unsafe { map.write_volatile(1) };
    let meta = file.metadata().unwrap();
    let mut writers = Writers::none();
    writers.mapped.insert((meta.dev(), meta.ino()));
    settle();
    writers.since = Writers::none().since;
    ends.round(&writers);
    // The page is dirty already: this moves no time, unless the kernel wrote it back just now.
    // SAFETY: within the mapping.
    unsafe { map.write_volatile(2) };
    let after = file.metadata().unwrap();
    if (meta.ctime(), meta.ctime_nsec()) != (after.ctime(), after.ctime_nsec()) {
        println!("the page was written back meanwhile, so that this write did move the time");
    }
    // SAFETY: mapped above.
    unsafe { libc::munmap(map.cast(), 8192) };
    // It is mapped no more; that it was at the last look is enough.
    let stats = ends.round(&Writers::none());
    assert_eq!(stats.patched, 1, "{stats:?}");
    ends.same();
}

fn meta() -> Meta {
    Meta { mode: 0o755, ..Meta::default() }
}

fn node(path: &str, kind: Kind) -> Entry {
    Entry::Node { path: path.into(), kind, meta: meta() }
}

/// A first round with a directory, a file and a way out, then these entries.
#[track_caller]
fn second_round(entries: &[Entry]) -> Result<Stats> {
    let outside = tempfile::tempdir().unwrap();
    let layer = outside.path().join("layer");
    fs::create_dir(&layer).unwrap();
    let mut apply = Wire::new(Apply::new(&layer).unwrap());
    let first = [
        node("", Kind::Directory),
        node("d", Kind::Directory),
        node("f", Kind::File { size: 10 }),
        node("out", Kind::Symlink { target: b"..".to_vec() }),
    ];
    first.iter().for_each(|e| apply.entry(e).unwrap());
    apply.entry(&Entry::End(Totals { entries: 4, bytes: 0 })).unwrap();
    apply.to.round().unwrap();
    fs::write(outside.path().join("victim"), "x").unwrap();
    let result = (|| {
        let mut count = 0;
        for entry in entries {
            apply.entry(entry)?;
            count += u64::from(entry.path().is_some());
        }
        apply.entry(&Entry::End(Totals { entries: count, bytes: 0 }))?;
        apply.to.finish()
    })();
    assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"x");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2, "something outside of the layer changed");
    result
}

#[test]
fn hostile_rounds_are_refused() {
    if skip() {
        return;
    }
    let round = || Entry::Round { format: entry::ROUND_FORMAT };
    let root = || node("", Kind::Directory);
    let remove = |path: &str| Entry::Remove { path: path.into() };
    let link = |path: &str, target: &str| Entry::Link { path: path.into(), target: target.into() };
    let refused = |entries: &[Entry], why: &str| {
        let error = format!("{:#}", second_round(entries).unwrap_err());
        assert!(error.contains(why), "{error}");
    };
    let ok = |entries: &[Entry]| assert!(second_round(entries).is_ok());
    ok(&[round(), root()]);
    ok(&[round(), root(), remove("d"), node("f", Kind::Patch { size: 3 }), remove("out")]);
    ok(&[round(), root(), remove("f"), node("f", Kind::Directory), remove("not there")]);
    ok(&[round(), root(), link("a", "f"), node("a", Kind::Patch { size: 1 })]);
    refused(&[root()], "the beginning of a round is missing");
    refused(&[round(), round()], "inside one");
    refused(&[Entry::Round { format: 2 }], "format 2");
    refused(&[round(), remove("f")], "the root's entry is not the first");
    refused(&[round(), root(), remove("")], "the root cannot be removed");
    refused(&[round(), root(), remove("../victim")], "\"..\"");
    refused(&[round(), root(), remove("out/victim")], "its directory was not sent");
    refused(&[round(), root(), node("out", Kind::Patch { size: 0 })], "did not come before");
    refused(&[round(), root(), node("d", Kind::Patch { size: 0 })], "did not come before");
    refused(&[round(), root(), node("new", Kind::Patch { size: 0 })], "did not come before");
    refused(
        &[round(), root(), node("out", Kind::Directory), node("out/victim", Kind::Patch { size: 0 })],
        "before",
    );
    refused(&[round(), root(), link("a", "out/victim")], "to link to it");
    refused(&[round(), root(), remove("f"), remove("f")], "sent twice");
    refused(&[round(), root(), remove("f"), remove("d")], "out of order");
    refused(&[round(), root(), Entry::Hole { offset: 0, len: 1 }], "belongs to no changed file");
    let hole =
        |offset, len| [round(), root(), node("f", Kind::Patch { size: 10 }), Entry::Hole { offset, len }];
    ok(&hole(2, 8));
    refused(&hole(2, 9), "in a file of 10 bytes");
}

#[test]
fn without_a_way_to_unmount_it_is_asked_for() {
    if skip() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        fs::create_dir_all(base.path().join(name)).unwrap();
        base.path().join(name)
    };
    let layer = WritableLayer { dir: dir("layer"), kind: LayerKind::Overlay { userxattr: false } };
    // No overlay is needed to see that a mark cannot be made through one.
    let mut apply = Apply::resume(&layer, Some(&dir("layer"))).unwrap();
    let redirect = Xattr { name: b"trusted.overlay.redirect".to_vec(), value: b"/x".to_vec() };
    let moved = Entry::Node {
        path: b"d".to_vec(),
        kind: Kind::Directory,
        meta: Meta { xattrs: vec![redirect], ..meta() },
    };
    apply.entry(&Entry::Round { format: entry::ROUND_FORMAT }).unwrap();
    apply.entry(&node("", Kind::Directory)).unwrap();
    let error = apply.entry(&moved).unwrap_err();
    assert!(error.downcast_ref::<NeedsUnmount>().is_some_and(|e| e.why.contains("redirect")), "{error:#}");
    apply.unmounted().unwrap();
    apply.entry(&moved).unwrap();
    apply.entry(&Entry::End(Totals { entries: 2, bytes: 0 })).unwrap();
    assert!(apply.finish().unwrap().unmounted);
    assert!(base.path().join("layer/d").is_dir());
}

/// By hand: `cargo test --release -p transship --lib rootfs::tests_rounds::bench -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn bench() {
    fn timed<T>(what: &str, work: impl FnOnce() -> T) -> (T, Duration) {
        let start = Instant::now();
        let out = work();
        let took = start.elapsed();
        println!("{what}: {took:.3?}");
        (out, took)
    }
    struct Null;
    impl Sink for Null {
        fn entry(&mut self, _: &Entry) -> Result<()> {
            Ok(())
        }
        fn data(&mut self, _: u64, _: &[u8]) -> Result<()> {
            Ok(())
        }
    }
    let scratch = std::env::var("TRANSSHIP_BENCH_DIR").unwrap_or("/tmp".into());
    for count in [10_000, 100_000] {
        let base = tempfile::tempdir_in(&scratch).unwrap();
        for i in 0..count {
            let dir = base.path().join(format!("d{}", i / 100));
            if i % 100 == 0 {
                fs::create_dir(&dir).unwrap();
            }
            fs::write(dir.join(format!("file-{i}")), vec![1; i % 4096]).unwrap();
        }
        settle();
        let layer = WritableLayer { dir: base.path().to_owned(), kind: LayerKind::Full };
        let mut staged = Staged::new(&layer).unwrap();
        timed("first round", || staged.round(&Writers::none(), &mut Null).unwrap());
        timed("second round", || staged.round(&Writers::none(), &mut Null).unwrap());
        let (stats, took) = timed("last", || staged.last(&Writers::none(), &mut Null).unwrap());
        println!(
            "{count} files: {} looked at, {} sent, {} bytes read, {:.2} us each",
            stats.looked,
            stats.entries,
            stats.bytes_read,
            took.as_secs_f64() * 1e6 / stats.looked as f64
        );
    }
    large(Path::new(&scratch), &mut Null);
}

fn large(scratch: &Path, sink: &mut dyn Sink) {
    let base = tempfile::tempdir_in(scratch).unwrap();
    let file = File::create(base.path().join("f")).unwrap();
    let chunk: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 7) as u8).collect();
    (0..1024).for_each(|i| file.write_all_at(&chunk, i << 20).unwrap());
    let layer = WritableLayer { dir: base.path().to_owned(), kind: LayerKind::Full };
    let mut staged = Staged::new(&layer).unwrap();
    let start = Instant::now();
    staged.round(&Writers::none(), sink).unwrap();
    let first = start.elapsed();
    file.write_all_at(&[0; 4096], 512 << 20).unwrap();
    let start = Instant::now();
    let stats = staged.last(&Writers::none(), sink).unwrap();
    println!(
        "1 GiB: first {first:.3?}; 4 KiB changed: {} bytes in {:.3?}",
        stats.bytes_data,
        start.elapsed()
    );
}
