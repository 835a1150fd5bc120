//! Random layers through a real overlay mount: made, captured, encoded, decoded, applied and compared, as layers and as
//! the container sees them. Used by this room's unit tests and by the root tests in `tests/`; nothing else calls it.
//!
//! Everything is mounted in a private mount namespace of a thread of its own, so that nothing stays behind, however it
//! ends.

mod generate;
mod random;
mod rounds;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

pub use generate::Tree;
pub use random::Random;
pub use rounds::{Rounds, rounds};

use super::layer::{LayerKind, WritableLayer};
use super::{
    Apply, CaptureOptions, CompareOptions, Difference, Entry, OverlayXattrs, Sink, Stats, capture, compare,
};

/// Why these tests cannot run here; none when they can.
pub fn cannot_run() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root (overlay mounts, devices, trusted attributes)".into());
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    (!known.contains("overlay")).then(|| "the kernel has no overlayfs (modprobe overlay)".into())
}

/// Encodes each entry, decodes it and passes it on: what the network does to a stream.
pub struct Wire<S> {
    /// Where it goes.
    pub to: S,
    buffer: Vec<u8>,
    /// Bytes of encoded entries so far.
    pub entry_bytes: u64,
}

impl<S: Sink> Wire<S> {
    /// Passes everything on to `to`.
    pub fn new(to: S) -> Self {
        Wire { to, buffer: Vec::new(), entry_bytes: 0 }
    }
}

impl<S: Sink> Sink for Wire<S> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.buffer.clear();
        entry.encode(&mut self.buffer);
        self.entry_bytes += self.buffer.len() as u64;
        self.to.entry(&Entry::decode(&self.buffer)?)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.to.data(offset, bytes)
    }
}

/// Moves a layer's content from one directory to another on this machine.
///
/// # Errors
/// As [`capture()`] and [`Apply`], or if both count differently.
pub fn move_layer(from: &WritableLayer, to: &WritableLayer) -> Result<Stats> {
    let mut wire = Wire::new(Apply::for_layer(to)?);
    let sent = capture(&from.dir, &CaptureOptions::for_layer(from), &mut wire)?;
    let got = wire.to.finish()?;
    let comparable =
        |s: Stats| Stats { xattrs_dropped: 0, flags_dropped: 0, changed: 0, looked: 0, bytes_read: 0, ..s };
    if comparable(sent) != comparable(got) {
        bail!("sent {sent:?}, applied {got:?}");
    }
    Ok(sent)
}

/// Runs `cases` random cases from `seed` on; each is made by seed + its number alone. Sums up what was moved.
///
/// # Errors
/// The first case that fails, with the seed that makes it again.
pub fn property(seed: u64, cases: u64) -> Result<Stats> {
    in_private_scratch(move |scratch| {
        let mut sum = Stats::default();
        for seed in seed..seed.saturating_add(cases) {
            let stats = case(scratch, seed).with_context(|| {
                format!("random layer failed; again with TRANSSHIP_SEED={seed} TRANSSHIP_CASES=1")
            })?;
            add(&mut sum, &stats);
        }
        Ok(sum)
    })
}

/// Runs `work` in a thread with a mount namespace of its own.
fn in_private_scratch<T: Send + 'static>(
    work: impl FnOnce(&Path) -> Result<T> + Send + 'static,
) -> Result<T> {
    let worker = std::thread::Builder::new().name("layer-property".into()).spawn(move || {
        let scratch = private_scratch()?;
        work(scratch.path())
    })?;
    match worker.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Moves this thread into a mount namespace of its own and makes a directory to work in.
fn private_scratch() -> Result<tempfile::TempDir> {
    unshare(CloneFlags::CLONE_NEWNS).context("making a private mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    Ok(tempfile::Builder::new().prefix("transship-rootfs-").tempdir()?)
}

fn add(sum: &mut Stats, s: &Stats) {
    sum.entries += s.entries;
    sum.directories += s.directories;
    sum.opaque += s.opaque;
    sum.files += s.files;
    sum.links += s.links;
    sum.symlinks += s.symlinks;
    sum.special += s.special;
    sum.whiteouts += s.whiteouts;
    sum.bytes_data += s.bytes_data;
    sum.bytes_holes += s.bytes_holes;
    sum.xattrs += s.xattrs;
    sum.xattrs_dropped += s.xattrs_dropped;
    sum.flags_dropped += s.flags_dropped;
    sum.changed += s.changed;
    sum.removed += s.removed;
    sum.patched += s.patched;
    sum.looked += s.looked;
    sum.bytes_read += s.bytes_read;
    sum.unmounted |= s.unmounted;
}

/// A mount that ends with its scope.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path) -> Result<Self> {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=256m"))
            .context("mounting tmpfs")?;
        Ok(Mounted(at.to_owned()))
    }

    fn overlay(at: &Path, lower: &Path, upper: &Path, work: &Path, more: &str) -> Result<Self> {
        for dir in [at, upper, work] {
            std::fs::create_dir_all(dir)?;
        }
        let show = |p: &Path| p.display().to_string();
        let data = format!("lowerdir={},upperdir={},workdir={}{more}", show(lower), show(upper), show(work));
        mount(Some("overlay"), at, Some("overlay"), MsFlags::MS_NOATIME, Some(data.as_str()))
            .with_context(|| format!("mounting overlay with {data}"))?;
        Ok(Mounted(at.to_owned()))
    }

    /// Unlike dropping, tells whether it worked: a busy mount would leave the layer in use.
    fn end(self) -> Result<()> {
        let at = self.0.clone();
        std::mem::forget(self);
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match umount2(&at, MntFlags::empty()) {
                // a child that another test forks has our descriptors until it executes its program
                Err(Errno::EBUSY) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                result => return result.with_context(|| format!("unmounting {}", at.display())),
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// One random layer. Every fourth is on tmpfs, every fourth a whole tree instead of an overlay.
fn case(scratch: &Path, seed: u64) -> Result<Stats> {
    let base = tempfile::Builder::new().prefix("case-").tempdir_in(scratch)?;
    let mut rng = Random::new(seed);
    let _tmpfs = if rng.below(4) == 0 { Some(Mounted::tmpfs(base.path())?) } else { None };
    let result =
        if rng.below(4) == 0 { whole_tree(base.path(), &mut rng) } else { overlay(base.path(), &mut rng) };
    // a case that failed may have left a mount, in which nothing can be emptied: its own error comes first
    let emptied = empty_all(base.path());
    let stats = result?;
    emptied?;
    Ok(stats)
}

/// Immutable files would keep the scratch directory alive.
fn empty_all(base: &Path) -> Result<()> {
    for dir in std::fs::read_dir(base)? {
        let dir = nix::fcntl::open(&dir?.path(), nix::fcntl::OFlag::O_PATH, nix::sys::stat::Mode::empty())?;
        super::sys::empty(std::os::fd::AsFd::as_fd(&dir), 4096)?;
    }
    Ok(())
}

fn whole_tree(base: &Path, rng: &mut Random) -> Result<Stats> {
    let layer = |name: &str| WritableLayer { dir: base.join(name), kind: LayerKind::Full };
    let (from, to) = (layer("from"), layer("to"));
    for side in [&from, &to] {
        std::fs::create_dir(&side.dir)?;
        // The destination starts with other content, as a native snapshot does.
        Tree::new(&side.dir, rng).change(rng, 40)?;
    }
    Tree::new(&from.dir, rng).protect(rng)?;
    Tree::new(&to.dir, rng).protect(rng)?;
    let stats = move_layer(&from, &to)?;
    same(&from.dir, &to.dir, CompareOptions { overlay: OverlayXattrs::None, atime: true }, "the trees")?;
    Ok(stats)
}

fn overlay(base: &Path, rng: &mut Random) -> Result<Stats> {
    let userxattr = rng.below(6) == 0;
    let mut more = String::from(if userxattr { ",userxattr" } else { "" });
    if !userxattr {
        more += if rng.below(2) == 0 { ",redirect_dir=on" } else { "" };
        more += if rng.below(3) == 0 { ",uuid=on" } else { "" };
    }
    more += if rng.below(3) == 0 { ",xino=on" } else { "" };
    more += ",index=off,metacopy=off";
    let dir = |name: &str| base.join(name);
    std::fs::create_dir(dir("lower"))?;
    Tree::new(&dir("lower"), rng).change(rng, 60)?;

    let merged = Mounted::overlay(&dir("m1"), &dir("lower"), &dir("up1"), &dir("work1"), &more)?;
    let mut tree = Tree::new(&dir("m1"), rng);
    tree.change(rng, 60)?;
    tree.protect(rng)?;
    merged.end()?;

    let kind = LayerKind::Overlay { userxattr };
    let layer = |name: &str| WritableLayer { dir: dir(name), kind };
    std::fs::create_dir(dir("up2"))?;
    std::fs::set_permissions(dir("up2"), std::fs::Permissions::from_mode(0o711))?;
    let stats = move_layer(&layer("up1"), &layer("up2"))?;
    let options = CompareOptions { overlay: kind.overlay_xattrs(), atime: true };
    same(&dir("up1"), &dir("up2"), options, "the upper directories")?;

    let _a = Mounted::overlay(&dir("m1"), &dir("lower"), &dir("up1"), &dir("work1"), &more)?;
    let _b = Mounted::overlay(&dir("m2"), &dir("lower"), &dir("up2"), &dir("work2"), &more)?;
    same(
        &dir("m1"),
        &dir("m2"),
        CompareOptions { overlay: OverlayXattrs::None, atime: false },
        "the merged views",
    )?;
    Ok(stats)
}

fn same(a: &Path, b: &Path, options: CompareOptions, what: &str) -> Result<()> {
    show(&compare(a, b, options)?, what)
}

fn show(found: &[Difference], what: &str) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = found.iter().take(20).map(|d| format!("  {d}")).collect();
    bail!("{what} differ in {} ways:\n{}", found.len(), lines.join("\n"))
}
