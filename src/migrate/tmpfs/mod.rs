//! The content of files on the container's tmpfs mounts (/dev/shm and others), copied ahead of the freeze. In it CRIU has the mounts
//! archived by our `tar`, which then only names this content ([`crate::criu::tar::staged`]).
//!
//! Names, owners and times are not here: a file is its inode. The rounds compare blocks by their hashes. In the freeze every file is
//! compared once more that may have been written since ([`watch`]), and what changed is sent; the table for `tar` then has all that the
//! destination holds. A file that could not be read, or is not in the table for any other reason, is archived with its content.
//!
//! | file | what lives there |
//! |---|---|
//! | [`mounts`] | which mounts, and the files on them |
//! | [`watch`] | whether a file may have been written |
//! | [`piece`] | what is sent, as bytes and back |
//! | [`stage`] | what the destination makes of it |

mod mounts;
pub(super) mod piece;
mod stage;
mod watch;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use nix::sys::stat::fstat;

use super::codec::Kind;
use super::link::Link;
use crate::criu::tar::staged::{Reference, Staged};
use crate::rootfs::content::{self, Blocks, Hash, How, ZERO};
use crate::rootfs::stamp::{self, Seen, Stamp};
use crate::rootfs::{self, Writers};
pub(super) use piece::Piece;
pub(super) use stage::Stage;
use watch::{Watch, Watcher};

/// Smaller files are quicker in the archive.
const LEAST: u64 = 64 << 10;
/// Content bytes in one frame.
const PIECE: u64 = 1 << 20;

/// Called with the bytes of content that were sent since the last call; an error ends the copying.
pub(super) type GoOn<'a> = dyn Fn(u64) -> Result<()> + Sync + 'a;

/// The files, on the source.
pub(super) struct Tmpfs {
    init: i32,
    external: HashSet<String>,
    watcher: Watcher,
    files: HashMap<(u64, u64), Known>,
    ids: u64,
    seed: u64,
}

/// A file as it was sent.
struct Known {
    id: u64,
    seen: Seen,
    blocks: Blocks<Hash>,
    watch: Watch,
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes of content.
    pub bytes: u64,
    /// Bytes that were read and compared.
    pub read: u64,
}

impl Tmpfs {
    /// Of the container with this init; what is mounted from outside there is not its own.
    pub fn new(init: i32, external: HashSet<String>) -> Result<Tmpfs> {
        let watcher = Watcher::new().context("watching the container's tmpfs files")?;
        let mut seed = [0; 8];
        std::io::Read::read_exact(&mut File::open("/dev/urandom").context("a seed")?, &mut seed)?;
        let seed = u64::from_ne_bytes(seed);
        Ok(Tmpfs { init, external, watcher, files: HashMap::new(), ids: 0, seed })
    }

    /// Sends what is new while the tasks run.
    pub fn round(&mut self, pids: &[i32], link: &Link, go_on: &GoOn<'_>) -> Result<Sent> {
        self.pass(pids, link, go_on, true)
    }

    /// The tasks stand still: sends what changed last. The table says what the destination then holds.
    pub fn last(&mut self, pids: &[i32], link: &Link, go_on: &GoOn<'_>) -> Result<(Sent, Vec<Staged>)> {
        let sent = self.pass(pids, link, go_on, false)?;
        let table = self.files.iter().map(|(key, known)| known.staged(*key)).collect();
        Ok((sent, table))
    }

    fn pass(&mut self, pids: &[i32], link: &Link, go_on: &GoOn<'_>, running: bool) -> Result<Sent> {
        let all = mounts::of_task(self.init, &self.external).context("looking for tmpfs mounts")?;
        let devices = all.iter().map(|m| m.device).collect();
        let writers = Writers::of_devices(pids, &devices);
        let mut present = HashSet::new();
        let mut sent = Sent::default();
        self.watcher.look();
        for mount in &all {
            mounts::files(self.init, mount, LEAST, &mut |node| {
                let Ok(file) = rootfs::reopen(std::os::fd::AsFd::as_fd(&node)) else { return Ok(()) };
                let Ok(stat) = fstat(&file) else { return Ok(()) };
                let now = Stamp::of(&stat);
                // of several names the first is enough
                if present.insert(now.key) {
                    self.file(&file, &now, &writers, running, link, go_on, &mut sent)?;
                }
                Ok(())
            })?;
        }
        let gone: Vec<_> = self.files.keys().filter(|key| !present.contains(*key)).copied().collect();
        for key in gone {
            if let Some(known) = self.files.remove(&key) {
                self.watcher.drop_watch(&known.watch);
                say(link, Piece::Gone { id: known.id })?;
            }
        }
        Ok(sent)
    }

    #[expect(clippy::too_many_arguments, reason = "one file of a pass: the pass has them all")]
    fn file(
        &mut self,
        file: &File,
        now: &Stamp,
        writers: &Writers,
        running: bool,
        link: &Link,
        go_on: &GoOn<'_>,
        sent: &mut Sent,
    ) -> Result<()> {
        let (open, mapped) = writers.of(now.key);
        if let Some(known) = self.files.get(&now.key) {
            let busy = if running { mapped } else { watch::open_for_writing(file) };
            if !busy && !stamp::changed(&known.seen, now) && !self.watcher.suspect(&known.watch) {
                return Ok(());
            }
        }
        // a failure from here on leaves it out of the table: the archive then has its content
        let known = self.files.remove(&now.key);
        let (id, watch, old) = match known {
            Some(Known { id, watch, blocks, seen }) => {
                if seen.stamp.size != now.size {
                    say(link, Piece::Size { id, size: now.size })?;
                }
                (id, watch, blocks)
            }
            None => {
                self.ids += 1;
                say(link, Piece::Size { id: self.ids, size: now.size })?;
                let none = Blocks::new(content::block_size(now.size), self.seed);
                (self.ids, self.watcher.watch(file), none)
            }
        };
        // before its content is read: what is written then counts next time
        self.watcher.forget(&watch);
        let threads = if running { 1 } else { content::all_threads() };
        let how = How { size: now.size, block: old.size(), seed: old.seed(), threads };
        let (bytes, read) = (AtomicU64::new(0), AtomicU64::new(0));
        let blocks = content::scan(file, &how, &|at, data, hashes| {
            read.fetch_add(data.len() as u64, Ordering::Relaxed);
            let first = at / how.block;
            for (run, zeros) in changed(hashes, |i| old.get(first + i as u64)) {
                let from = run.start as u64 * how.block;
                let to = (run.end as u64 * how.block).min(data.len() as u64);
                let offset = at + from;
                if zeros {
                    say(link, Piece::Zeros { id, offset, len: to - from })?;
                    continue;
                }
                bytes.fetch_add(to - from, Ordering::Relaxed);
                for piece in (from..to).step_by(PIECE as usize) {
                    let bytes = &data[piece as usize..(piece + PIECE).min(to) as usize];
                    say(link, Piece::Data { id, offset: at + piece, bytes })?;
                    go_on(bytes.len() as u64)?;
                }
            }
            go_on(0)
        })?;
        holes(&old, &blocks, now.size, &mut |offset, len| say(link, Piece::Hole { id, offset, len }))?;
        sent.bytes += bytes.into_inner();
        sent.read += read.into_inner();
        let after = Stamp::of(&fstat(file)?);
        let torn = (now.size, now.mtime) != (after.size, after.mtime);
        let settled = !torn && !mapped && stamp::settled(now.ctime, writers.since, open);
        self.files.insert(now.key, Known { id, seen: Seen { stamp: *now, settled }, blocks, watch });
        Ok(())
    }
}

impl Known {
    fn staged(&self, key: (u64, u64)) -> Staged {
        let stamp = &self.seen.stamp;
        Staged {
            key,
            mtime: (stamp.mtime.secs, stamp.mtime.nanos.into()),
            reference: Reference {
                id: self.id,
                size: stamp.size,
                block: self.blocks.size(),
                seed: self.blocks.seed(),
                digest: content::digest(stamp.size, &self.blocks),
            },
        }
    }
}

fn say(link: &Link, piece: Piece<'_>) -> Result<()> {
    piece.encode(|parts| link.frame(Kind::Staged, parts))
}

/// Runs of blocks that differ from what they were, and whether a run is zeros. Pure.
pub(super) fn changed(
    hashes: &[Hash],
    was: impl Fn(usize) -> Option<Hash>,
) -> Vec<(std::ops::Range<usize>, bool)> {
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    for (i, hash) in hashes.iter().enumerate().filter(|(i, hash)| was(*i) != Some(**hash)) {
        let zeros = *hash == ZERO;
        match runs.last_mut() {
            Some((run, z)) if run.end == i && *z == zeros => run.end = i + 1,
            _ => runs.push((i..i + 1, zeros)),
        }
    }
    runs
}

/// Ranges of a file of this size that had data and have none now. Pure.
fn holes(
    old: &Blocks<Hash>,
    new: &Blocks<Hash>,
    size: u64,
    each: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let block = old.size();
    let mut run: Option<std::ops::Range<u64>> = None;
    let gone = old.between(0, size.div_ceil(block)).filter(|n| new.get(*n).is_none());
    for n in gone.map(Some).chain([None]) {
        match (&mut run, n) {
            (Some(run), Some(n)) if run.end == n => run.end = n + 1,
            (last, n) => {
                if let Some(run) = last.take() {
                    let offset = run.start * block;
                    each(offset, (run.end * block).min(size) - offset)?;
                }
                *last = n.map(|n| n..n + 1);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
