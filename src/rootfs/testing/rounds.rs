//! Random layers sent in rounds while they change, the last round into a mounted overlay.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Mounted, Random, Tree, Wire, add, in_private_scratch, show};
use crate::rootfs::layer::{LayerKind, WritableLayer};
use crate::rootfs::{Apply, CompareOptions, Difference, OverlayXattrs, Staged, Stats, Writers, compare};

/// What the cases of a run were, so that a test can see that nothing was left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rounds {
    /// Sums over all rounds of all cases.
    pub stats: Stats,
    /// Sums over the last rounds.
    pub last: Stats,
    /// Cases.
    pub cases: u64,
    /// The last round went through a mounted overlay.
    pub through: u64,
    /// Of these: the mount had to be taken away.
    pub unmounted: u64,
    /// The layer changed while it was walked.
    pub raced: u64,
}

/// Runs `cases` cases from `seed` on, as [`super::property`].
///
/// # Errors
/// The first case that fails, with the seed that makes it again.
pub fn rounds(seed: u64, cases: u64) -> Result<Rounds> {
    in_private_scratch(move |scratch| {
        let mut sum = Rounds::default();
        for seed in seed..seed.saturating_add(cases) {
            case(scratch, seed, &mut sum).with_context(|| {
                format!("random rounds failed; again with TRANSSHIP_SEED={seed} TRANSSHIP_CASES=1")
            })?;
            sum.cases += 1;
        }
        Ok(sum)
    })
}

fn case(scratch: &Path, seed: u64, sum: &mut Rounds) -> Result<()> {
    let base = tempfile::Builder::new().prefix("rounds-").tempdir_in(scratch)?;
    let mut rng = Random::new(seed ^ 0x726f_756e_6473);
    let _tmpfs = if rng.below(4) == 0 { Some(Mounted::tmpfs(base.path())?) } else { None };
    let result = if rng.below(5) == 0 {
        whole_tree(base.path(), &mut rng, sum)
    } else {
        overlay(base.path(), &mut rng, sum)
    };
    super::empty_all(base.path())?;
    result
}

/// Both ends of one layer's way.
struct Way {
    staged: Staged,
    apply: Apply,
    racing: bool,
}

impl Way {
    fn writers(&self) -> Writers {
        if self.racing { Writers::unknown() } else { Writers::none() }
    }

    fn round(&mut self, last: bool) -> Result<Stats> {
        let writers = self.writers();
        let mut wire = Wire::new(&mut self.apply);
        let sent = if last {
            self.staged.last(&writers, &mut wire)?
        } else {
            self.staged.round(&writers, &mut wire)?
        };
        let got = self.apply.round()?;
        let comparable = |s: Stats| Stats {
            xattrs_dropped: 0,
            flags_dropped: 0,
            changed: 0,
            looked: 0,
            bytes_read: 0,
            unmounted: false,
            ..s
        };
        ensure!(comparable(sent) == comparable(got), "sent {sent:?}, applied {got:?}");
        Ok(Stats { unmounted: got.unmounted, ..sent })
    }
}

/// Everything but the last round: `tree` changes between the rounds, and in some cases during them.
fn before_last(way: &mut Way, tree: &mut Tree, rng: &mut Random, sum: &mut Rounds) -> Result<()> {
    sum.raced += u64::from(way.racing);
    for _ in 0..1 + rng.below(3) {
        // What is old enough is trusted: without a pause nothing would be.
        std::thread::sleep(Duration::from_millis(rng.below(2) * 60));
        let stats = if way.racing {
            let stop = AtomicBool::new(false);
            let mut inner = rng.clone();
            std::thread::scope(|scope| -> Result<Stats> {
                let mutator = scope.spawn(|| -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        tree.change(&mut inner, 6)?;
                    }
                    Ok(())
                });
                let stats = way.round(false);
                stop.store(true, Ordering::Relaxed);
                mutator.join().map_err(|_| anyhow::anyhow!("the changing thread panicked"))??;
                stats
            })?
        } else {
            way.round(false)?
        };
        rng.next();
        add(&mut sum.stats, &stats);
        if !rng.once_in(4) {
            let count = 3 + rng.below(30);
            tree.change(rng, count)?;
        }
    }
    Ok(())
}

fn whole_tree(base: &Path, rng: &mut Random, sum: &mut Rounds) -> Result<()> {
    let layer = |name: &str| WritableLayer { dir: base.join(name), kind: LayerKind::Full };
    let (from, to) = (layer("from"), layer("to"));
    std::fs::create_dir(&from.dir)?;
    std::fs::create_dir(&to.dir)?;
    let mut tree = Tree::new(&from.dir, rng);
    tree.change(rng, 60)?;
    let mut way = Way { staged: Staged::new(&from)?, apply: Apply::for_layer(&to)?, racing: rng.once_in(2) };
    before_last(&mut way, &mut tree, rng, sum)?;
    if rng.once_in(3) {
        tree.protect(rng)?;
    }
    let stats = way.round(true)?;
    way.apply.finish_rounds()?;
    add(&mut sum.last, &stats);
    same(
        &from.dir,
        &to.dir,
        CompareOptions { overlay: OverlayXattrs::None, atime: true },
        "the trees",
        |_| true,
    )
}

fn overlay(base: &Path, rng: &mut Random, sum: &mut Rounds) -> Result<()> {
    let userxattr = rng.below(6) == 0;
    let mut more = String::from(if userxattr { ",userxattr" } else { "" });
    if !userxattr {
        more += if rng.below(3) == 0 { ",redirect_dir=on" } else { "" };
        more += if rng.below(4) == 0 { ",uuid=on" } else { "" };
    }
    more += if rng.below(3) == 0 { ",xino=on" } else { "" };
    more += ",index=off,metacopy=off";
    let dir = |name: &str| base.join(name);
    std::fs::create_dir(dir("lower"))?;
    Tree::new(&dir("lower"), rng).change(rng, 70)?;
    let kind = LayerKind::Overlay { userxattr };
    let layer = |name: &str| WritableLayer { dir: dir(name), kind };
    let mount =
        |m: &str, up: &str, work: &str| Mounted::overlay(&dir(m), &dir("lower"), &dir(up), &dir(work), &more);

    let source = mount("m1", "up1", "work1")?;
    let mut tree = Tree::new(&dir("m1"), rng);
    let count = rng.below(60);
    tree.change(rng, count)?;
    std::fs::create_dir(dir("up2"))?;
    let mut way = Way {
        staged: Staged::new(&layer("up1"))?,
        apply: Apply::for_layer(&layer("up2"))?,
        racing: rng.once_in(2),
    };
    before_last(&mut way, &mut tree, rng, sum)?;

    let through = !rng.once_in(3);
    let mounted = Arc::new(Mutex::new(None));
    if through {
        sum.through += 1;
        *mounted.lock().expect("not poisoned") = Some(mount("m2", "up2", "work2")?);
        // The last changes, and the mount knows the names of before and after them, those that do not exist included.
        touch(&dir("m2"), &dir("m2"));
        let count = 3 + rng.below(60);
        tree.change(rng, count)?;
        touch(&dir("m1"), &dir("m2"));
        let taken = mounted.clone();
        let unmount = move |_: &str| taken.lock().expect("not poisoned").take().context("not mounted")?.end();
        way.apply.through(&dir("m2"), Some(Box::new(unmount)))?;
    }
    if rng.once_in(4) {
        tree.protect(rng)?;
    }
    let stats = way.round(true)?;
    way.apply.finish_rounds()?;
    add(&mut sum.last, &stats);
    sum.unmounted += u64::from(stats.unmounted);

    let plain = CompareOptions { overlay: OverlayXattrs::None, atime: false };
    let layers = CompareOptions { overlay: kind.overlay_xattrs(), atime: true };
    if mounted.lock().expect("not poisoned").is_some() {
        // overlayfs writes its own marks: what they mean is compared below, in the merged views.
        let (up1, up2) = (dir("up1"), dir("up2"));
        same(&up1, &up2, layers, "the upper directories", |d| !is_mark(&up1, &up2, d))?;
        // A mount shows a file that it copied up under the image's inode number as long as it lives, but its new hard
        // links under that of the copy: links were compared in the layers.
        let links = |d: &Difference| d.what.starts_with("hard link to");
        same(&dir("m1"), &dir("m2"), plain, "the merged views as mounted", |d| !links(d))?;
    } else {
        let by_mount = |d: &Difference| stats.unmounted && is_mark(&dir("up1"), &dir("up2"), d);
        same(&dir("up1"), &dir("up2"), layers, "the upper directories", |d| !by_mount(d))?;
    }
    drop(mounted.lock().expect("not poisoned").take());
    source.end()?;
    let _a = mount("m1", "up1", "work1")?;
    let _b = mount("m2", "up2", "work2")?;
    same(&dir("m1"), &dir("m2"), plain, "the merged views mounted anew", |_| true)
}

/// Looks up every path of `names` below `root`.
fn touch(names: &Path, root: &Path) {
    let mut open = vec![PathBuf::new()];
    while let Some(dir) = open.pop() {
        let listed = std::fs::read_dir(names.join(&dir)).into_iter().flatten().flatten();
        for path in listed.map(|e| dir.join(e.file_name())) {
            let _ = std::fs::symlink_metadata(root.join(&path));
            if std::fs::symlink_metadata(names.join(&path)).is_ok_and(|m| m.is_dir()) {
                let _ = std::fs::read_dir(root.join(&path)).map(Iterator::count);
                open.push(path);
            }
        }
    }
}

/// A difference in overlayfs' marks only: an attribute of its own, a whiteout where there is nothing to hide.
fn is_mark(up1: &Path, up2: &Path, difference: &Difference) -> bool {
    let what = &difference.what;
    if what.starts_with("xattr trusted.overlay.") || what.starts_with("xattr user.overlay.") {
        return true;
    }
    let whiteout = |side: &Path| {
        std::fs::symlink_metadata(side.join(&difference.path))
            .is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
    };
    match what.as_str() {
        "only in the first" => whiteout(up1),
        "only in the second" => whiteout(up2),
        // Those that the mount leaves are its own: mode 0, root's, of now.
        _ => whiteout(up1) && whiteout(up2),
    }
}

fn same(
    a: &Path,
    b: &Path,
    options: CompareOptions,
    what: &str,
    counts: impl Fn(&Difference) -> bool,
) -> Result<()> {
    let mut found = compare(a, b, options)?;
    found.retain(counts);
    // A whole name only: paths in the list can be long.
    found.sort_by_key(|d| OsStr::new(d.path.as_os_str()).as_bytes().len());
    show(&found, what)
}
