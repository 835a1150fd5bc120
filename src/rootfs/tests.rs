//! Capture and apply together, on real directories. Most need root: they say so and do nothing without it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::testing::{self, Wire};
use super::*;

/// Prints why, and tells the test to end.
fn skip() -> bool {
    if let Some(why) = testing::cannot_run() {
        println!("SKIP: {why}");
        return true;
    }
    false
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v}")))
}

#[test]
fn random_layers_arrive_exactly() {
    if skip() {
        return;
    }
    let sum = testing::property(number("TRANSSHIP_SEED", 1), number("TRANSSHIP_CASES", 24)).unwrap();
    println!("{sum:?}");
}

#[test]
fn random_rounds_arrive_exactly() {
    if skip() {
        return;
    }
    let sum = testing::rounds(number("TRANSSHIP_SEED", 1), number("TRANSSHIP_CASES", 24)).unwrap();
    println!("{sum:?}");
}

/// Applies hand-made entries and tells how it ended.
fn apply(dir: &Path, entries: &[Entry]) -> Result<Stats> {
    let mut apply = Wire::new(Apply::new(dir)?);
    for entry in entries {
        apply.entry(entry)?;
    }
    apply.to.finish()
}

fn node(path: &str, kind: Kind) -> Entry {
    Entry::Node { path: path.into(), kind, meta: Meta { mode: 0o755, ..Meta::default() } }
}

fn link(path: &str, target: &str) -> Entry {
    Entry::Link { path: path.into(), target: target.into() }
}

fn end(entries: u64, bytes: u64) -> Entry {
    Entry::End(Totals { entries, bytes })
}

#[track_caller]
fn refused(entries: &[Entry], why: &str) {
    let outside = tempfile::tempdir().unwrap();
    let layer = outside.path().join("layer");
    fs::create_dir(&layer).unwrap();
    let mut all = entries.to_vec();
    all.push(end(entries.len() as u64, 0));
    let error = format!("{:#}", apply(&layer, &all).unwrap_err());
    assert!(error.contains(why), "{error}");
    assert_eq!(
        fs::read_dir(outside.path()).unwrap().count(),
        1,
        "something was written outside of the layer"
    );
}

#[test]
fn hostile_streams_are_refused() {
    if skip() {
        return;
    }
    use Kind::*;
    let root = || node("", Directory);
    let file = |size| File { size };
    let to = |target: &str| Symlink { target: target.into() };
    refused(&[], "the end without the root's entry");
    refused(&[node("a", Directory)], "the root's entry is not the first");
    refused(&[root(), root()], "sent twice");
    refused(&[node("", Fifo)], "the root is not a directory");
    refused(&[root(), node("..", Directory)], "\"..\"");
    refused(&[root(), node("../x", file(0))], "\"..\"");
    refused(&[root(), node("/etc/x", file(0))], "empty name");
    refused(&[root(), node("a/x", file(0))], "its directory was not sent");
    refused(&[root(), node("a", Directory), node("a", Directory)], "\"a\": sent twice");
    refused(&[root(), node("b", Directory), node("a", Directory)], "sent after \"b\"");
    refused(&[root(), node("a", Directory), node("b", Directory), node("a/x", file(0))], "out of order");
    refused(&[root(), node("a", to("..")), node("a/x", file(0))], "its directory was not sent");
    refused(&[root(), node("a", to("..")), node("a/x/y", file(0))], "its directory was not sent");
    refused(&[root(), node("a", to("..")), link("b", "a/layer")], "opening \"a/layer\"");
    refused(&[root(), link("b", "../etc/passwd")], "\"..\"");
    refused(&[root(), link("b", "a")], "opening \"a\" to link to it");
    refused(&[root(), node("a", Directory), link("b", "a")], "linking to \"a\"");
    refused(&[root(), node("a", file(0)), link("a/b", "a")], "its directory was not sent");
    refused(&[root(), end(1, 0), node("a", file(0))], "after the end mark");
    refused(&[root(), end(2, 0)], "after the end mark");
    refused(&[root(), node("a", CharDevice { major: 0, minor: 0 })], "whiteout");
}

#[test]
fn data_stays_within_its_file() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut apply = Apply::new(dir.path()).unwrap();
    assert!(apply.data(0, b"x").unwrap_err().to_string().contains("belongs to no file"));
    apply.entry(&node("", Kind::Directory)).unwrap();
    assert!(apply.data(0, b"x").is_err());
    apply.entry(&node("a", Kind::File { size: 10 })).unwrap();
    apply.data(2, b"ab").unwrap();
    for (offset, bytes) in [(3, &b"x"[..]), (9, b"xx"), (11, b""), (u64::MAX, b"xx"), (1 << 63, b"x")] {
        assert!(apply.data(offset, bytes).is_err(), "{offset}");
    }
    apply.data(9, b"z").unwrap();
    apply.entry(&node("b", Kind::Fifo)).unwrap();
    assert!(apply.data(0, b"x").is_err());
    apply.entry(&end(3, 3)).unwrap();
    assert!(apply.data(0, b"x").is_err());
    let stats = apply.finish().unwrap();
    assert_eq!((stats.bytes_data, stats.bytes_holes), (3, 7));
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"\0\0ab\0\0\0\0\0z");
}

#[test]
fn a_stream_cut_short_is_no_layer() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let error = apply(dir.path(), &[node("", Kind::Directory)]).unwrap_err().to_string();
    assert!(error.contains("cut short after 1 entries"), "{error}");
    let error = apply(dir.path(), &[node("", Kind::Directory), end(2, 0)]).unwrap_err().to_string();
    assert!(error.contains("2 and 0 were announced"), "{error}");
}

#[test]
fn the_destination_is_emptied_only_when_asked() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    let layer = dir.path().join("layer");
    fs::create_dir_all(layer.join("sub/deep")).unwrap();
    fs::write(&outside, "keep").unwrap();
    fs::write(layer.join("sub/deep/file"), "old").unwrap();
    symlink("../../outside", layer.join("sub/link")).unwrap();
    symlink("..", layer.join("up")).unwrap();
    assert!(Apply::new(&layer).err().unwrap().to_string().contains("not empty"));
    assert!(layer.join("sub/deep/file").exists());
    let full = WritableLayer { dir: layer.clone(), kind: LayerKind::Full };
    drop(Apply::for_layer(&full).unwrap());
    assert_eq!(fs::read_dir(&layer).unwrap().count(), 0);
    assert_eq!(fs::read(&outside).unwrap(), b"keep");
    symlink(&layer, dir.path().join("alias")).unwrap();
    assert!(Apply::new(&dir.path().join("alias")).is_err(), "a symlink instead of the directory");
}

#[test]
fn the_roots_own_attributes_are_replaced() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2777)).unwrap();
    let meta = Meta {
        mode: 0o1751,
        uid: 7,
        gid: 8,
        mtime: Time { secs: -5, nanos: 999_999_999 },
        atime: Time { secs: 6, nanos: 1 },
        flags: 0,
        xattrs: vec![Xattr { name: b"trusted.overlay.opaque".to_vec(), value: b"y".to_vec() }],
    };
    let child = node("a", Kind::Directory);
    let root = Entry::Node { path: vec![], kind: Kind::Directory, meta };
    let stats = apply(dir.path(), &[root, child, end(2, 0)]).unwrap();
    assert_eq!(stats.opaque, 1);
    let stat = fs::symlink_metadata(dir.path()).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o1751, 7, 8));
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (-5, 999_999_999));
    assert_eq!((stat.atime(), stat.atime_nsec()), (6, 1));
}

/// Changes a file after its entry was taken, as a running task could during a checkpoint.
struct Meddler<F: FnMut(&[u8])> {
    apply: Apply,
    on_entry: F,
}

impl<F: FnMut(&[u8])> Sink for Meddler<F> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        (self.on_entry)(entry.path().unwrap_or_default());
        self.apply.entry(entry)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.apply.data(offset, bytes)
    }
}

#[test]
fn files_that_change_while_they_are_read() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("grows"), vec![1; 10_000]).unwrap();
    fs::write(from.join("shrinks"), vec![2; 10_000]).unwrap();
    fs::write(from.join("vanishes"), "x").unwrap();
    let meddle = |path: &[u8]| match path {
        b"grows" => fs::OpenOptions::new()
            .write(true)
            .open(from.join("grows"))
            .and_then(|f| f.write_all_at(&[3; 10_000], 10_000))
            .unwrap(),
        b"shrinks" => {
            fs::OpenOptions::new().write(true).open(from.join("shrinks")).unwrap().set_len(100).unwrap();
            fs::remove_file(from.join("vanishes")).unwrap();
        }
        _ => {}
    };
    let mut sink = Meddler { apply: Apply::new(&to).unwrap(), on_entry: meddle };
    let stats = capture(&from, &CaptureOptions::default(), &mut sink).unwrap();
    sink.apply.finish().unwrap();
    assert_eq!(stats.changed, 3, "{stats:?}");
    assert_eq!(fs::read(to.join("grows")).unwrap(), vec![1; 10_000]);
    assert_eq!(fs::metadata(to.join("shrinks")).unwrap().len(), 10_000);
    assert!(!to.join("vanishes").exists());
}

#[test]
fn layers_that_are_not_whole_are_refused() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("f"), "").unwrap();
    let file = fs::File::open(from.join("f")).unwrap();
    let inode = sys::Inode::Open(std::os::fd::AsFd::as_fd(&file));
    inode.set_xattr(c"trusted.overlay.metacopy", b"").unwrap();
    let error = capture(&from, &CaptureOptions::default(), &mut Apply::new(&to).unwrap()).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("\"f\": cannot be moved") && error.contains("metacopy=on"), "{error}");
}

#[test]
fn nesting_has_a_limit() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = |name: &str| WritableLayer { dir: dir.path().join(name), kind: LayerKind::Full };
    let (from, to) = (layer("from"), layer("to"));
    fs::create_dir_all(from.dir.join("d/".repeat(entry::MAX_DEPTH))).unwrap();
    fs::create_dir(&to.dir).unwrap();
    let stats = testing::move_layer(&from, &to).unwrap();
    assert_eq!(stats.directories, 1 + entry::MAX_DEPTH as u64);
    fs::create_dir(from.dir.join("d/".repeat(entry::MAX_DEPTH + 1))).unwrap();
    let error = format!("{:#}", testing::move_layer(&from, &to).unwrap_err());
    assert!(error.contains("deeper than 512 levels"), "{error}");
}

/// Throughput, by hand: `cargo test --release -p transship --lib rootfs::tests::bench -- --ignored --nocapture`, twice
/// on a virtual machine: the first time it also measures how fast the host hands out fresh memory.
#[test]
#[ignore = "a measurement, not a check"]
fn bench() {
    let base =
        tempfile::tempdir_in(std::env::var("TRANSSHIP_BENCH_DIR").unwrap_or("/dev/shm".into())).unwrap();
    let layer = |name: &str| {
        let dir = base.path().join(name);
        fs::create_dir(&dir).unwrap();
        WritableLayer { dir, kind: LayerKind::Overlay { userxattr: false } }
    };
    let (large, many) = (layer("large"), layer("many"));
    let chunk = vec![0x5a; 1 << 20];
    let file = fs::File::create(large.dir.join("f")).unwrap();
    (0..1024).for_each(|i| file.write_all_at(&chunk, i << 20).unwrap());
    for i in 0..20_000 {
        let dir = many.dir.join(format!("d{}", i / 100));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file-{i}")), &chunk[..i % 8192]).unwrap();
    }
    for (name, from) in [("1 GiB file", &large), ("20,000 files", &many)] {
        struct Null;
        impl Sink for Null {
            fn entry(&mut self, _: &Entry) -> Result<()> {
                Ok(())
            }
            fn data(&mut self, _: u64, _: &[u8]) -> Result<()> {
                Ok(())
            }
        }
        let start = std::time::Instant::now();
        let mut null = Wire::new(Null);
        let stats = capture(&from.dir, &CaptureOptions::for_layer(from), &mut null).unwrap();
        let alone = start.elapsed();
        let to = layer(&format!("to {name}"));
        let start = std::time::Instant::now();
        testing::move_layer(from, &to).unwrap();
        let both = start.elapsed();
        println!(
            "{name}: {} entries, {} bytes of data, {} bytes of entries: capture {alone:.3?}, capture and apply {both:.3?}",
            stats.entries, stats.bytes_data, null.entry_bytes
        );
    }
}
