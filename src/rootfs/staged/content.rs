//! A regular file: all of it, or the blocks that differ from what the destination holds.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use super::Known;
use super::walk::Walk;
use crate::rootfs::blocks::{self, Blocks};
use crate::rootfs::entry::{Entry, FLAGS, Kind};
use crate::rootfs::read;
use crate::rootfs::stamp::{self, Seen, Stamp};
use crate::rootfs::sys::{self, Inode};

/// A range of bytes.
type Range = (u64, u64);

impl Walk<'_> {
    /// Sends a file, or what changed of it since `base`; none if it cannot be read just now.
    pub fn file(&mut self, node: BorrowedFd<'_>, path: &[u8], base: Option<&Known>) -> Result<Option<Known>> {
        self.regular += 1;
        // O_NONBLOCK: a lease that a frozen task holds must end in an error, not in a wait.
        let fd = match sys::reopen(node, OFlag::O_RDONLY | OFlag::O_NOATIME | OFlag::O_NONBLOCK) {
            Ok(fd) => fd,
            Err(e) if self.running && e.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e).context("opening"),
        };
        let stat = fstat(&fd)?;
        let now = Stamp::of(&stat);
        let mut meta = read::meta(&stat, &Inode::Open(fd.as_fd()), self.overlay, &mut self.stats)?;
        meta.flags = sys::flags(fd.as_fd()).context("reading inode flags")? & FLAGS;
        let size = now.size;
        let hash = self.hash(&Kind::File { size }, &meta);
        let held = base.and_then(|b| Some((b, self.held.files.remove(&b.id)?)));
        let (id, blocks) = match held {
            Some((base, blocks)) => {
                let mut patch = Some(Entry::Node { path: path.to_vec(), kind: Kind::Patch { size }, meta });
                if base.meta != hash {
                    self.announce(&mut patch)?;
                }
                let same = !stamp::changed(&base.seen, &now) && !self.mapped(&now);
                let blocks =
                    if same { blocks } else { self.content(fd.as_fd(), size, Some(&blocks), patch)? };
                (base.id, blocks)
            }
            None => {
                self.need()?;
                self.send(Entry::Node { path: path.to_vec(), kind: Kind::File { size }, meta })?;
                let before = self.stats.bytes_data;
                let blocks = self.content(fd.as_fd(), size, None, None)?;
                self.stats.bytes_holes += size - (self.stats.bytes_data - before);
                (self.new_id(), blocks)
            }
        };
        if self.keep {
            self.held.files.insert(id, blocks);
        }
        let after = Stamp::of(&fstat(&fd)?);
        let torn = (now.size, now.mtime) != (after.size, after.mtime);
        self.stats.changed += u64::from(torn);
        let seen = Seen { stamp: now, settled: !torn && self.settled(&now) };
        let atime = read::time(stat.st_atime, stat.st_atime_nsec);
        Ok(Some(Known { seen, atime, id, meta: hash, marks: 0, names: Vec::new() }))
    }

    fn announce(&mut self, patch: &mut Option<Entry>) -> Result<()> {
        if let Some(patch) = patch.take() {
            self.need()?;
            self.send(patch)?;
        }
        Ok(())
    }

    /// Sends the ranges of data within the announced size, which a growing file does not exceed and a shrinking one
    /// does not fill. With `old` only blocks that differ, after the `patch` that announces them.
    fn content(
        &mut self,
        fd: BorrowedFd<'_>,
        size: u64,
        old: Option<&Blocks>,
        mut patch: Option<Entry>,
    ) -> Result<Blocks> {
        let (block, seed) =
            old.map_or_else(|| (blocks::block_size(size), self.held.seed), |o| (o.size(), o.seed()));
        let mut new = Blocks::new(block, seed);
        let window = (self.buffer.len() as u64 / block).max(1) * block;
        self.buffer.resize(window as usize, 0);
        let look = |at| sys::next_data(fd, at, size).context("looking for holes");
        // Blocks up to here are done.
        let mut done = 0;
        let mut next = look(0)?;
        while let Some((first, _)) = next {
            let start = first / block * block;
            let end = start.saturating_add(window).min(size);
            let mut pieces: Vec<Range> = Vec::new();
            while let Some((from, to)) = next.filter(|(from, _)| *from < end) {
                let got = self.read(fd, from, to.min(end), start)?;
                pieces.extend((got > from).then_some((from, got)));
                next = if to > end { Some((end, to)) } else { look(to)? };
            }
            if let Some(old) = old {
                self.holes(old, done, start / block, size, &mut patch)?;
            }
            done = end.div_ceil(block);
            self.window(start / block..done, start, size, &pieces, old, &mut new, &mut patch)?;
        }
        if let Some(old) = old {
            self.holes(old, done, size.div_ceil(block), size, &mut patch)?;
        }
        Ok(new)
    }

    /// Reads into the buffer, which stands for the file from `base` on; returns how far it came.
    fn read(&mut self, fd: BorrowedFd<'_>, mut at: u64, end: u64, base: u64) -> Result<u64> {
        while at < end {
            let into = &mut self.buffer[(at - base) as usize..(end - base) as usize];
            match nix::sys::uio::pread(fd, into, at as libc::off_t) {
                Ok(0) => break,
                Ok(n) => {
                    at += n as u64;
                    self.stats.bytes_read += n as u64;
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e).with_context(|| format!("reading {} bytes at {at}", end - at)),
            }
        }
        Ok(at)
    }

    /// Compares the blocks of one window, whose data `pieces` is in the buffer, and sends runs of those that differ.
    #[allow(clippy::too_many_arguments)]
    fn window(
        &mut self,
        blocks: std::ops::Range<u64>,
        base: u64,
        size: u64,
        pieces: &[Range],
        old: Option<&Blocks>,
        new: &mut Blocks,
        patch: &mut Option<Entry>,
    ) -> Result<()> {
        let Some(old) = old else {
            for n in blocks.clone().filter(|_| self.keep) {
                let hash = hash(new, n, pieces, &self.buffer, base);
                hash.into_iter().for_each(|h| new.push(n, h));
            }
            return pieces.iter().try_for_each(|p| self.data(*p, base));
        };
        // First block and whether there was data before, of the run in hand.
        let mut run: Option<(u64, bool)> = None;
        for n in blocks.start..=blocks.end {
            let differs = n < blocks.end && {
                let hash = hash(new, n, pieces, &self.buffer, base);
                let was = old.get(n);
                hash.into_iter().for_each(|h| new.push(n, h));
                if hash != was {
                    let (first, had) = run.unwrap_or((n, false));
                    run = Some((first, had || was.is_some()));
                }
                hash != was
            };
            if !differs && let Some((first, had)) = run.take() {
                let (from, to) = (first * new.size(), (n * new.size()).min(size));
                self.run(from, to, had, base, pieces, patch)?;
            }
        }
        Ok(())
    }

    fn run(
        &mut self,
        from: u64,
        to: u64,
        had_data: bool,
        base: u64,
        pieces: &[Range],
        patch: &mut Option<Entry>,
    ) -> Result<()> {
        self.announce(patch)?;
        let inside: Vec<Range> = clip(pieces, from, to).collect();
        if had_data && inside != [(from, to)] {
            self.send(Entry::Hole { offset: from, len: to - from })?;
        }
        inside.into_iter().try_for_each(|p| self.data(p, base))
    }

    /// Blocks that had data and have none now.
    fn holes(
        &mut self,
        old: &Blocks,
        first: u64,
        end: u64,
        size: u64,
        patch: &mut Option<Entry>,
    ) -> Result<()> {
        let block = old.size();
        let mut runs: Vec<Range> = Vec::new();
        for n in old.between(first, end) {
            match runs.last_mut() {
                Some((_, to)) if *to == n => *to += 1,
                _ => runs.push((n, n + 1)),
            }
        }
        for (from, to) in runs {
            self.announce(patch)?;
            let offset = from * block;
            let len = to.saturating_mul(block).min(size) - offset;
            self.send(Entry::Hole { offset, len })?;
        }
        Ok(())
    }

    fn data(&mut self, (from, to): Range, base: u64) -> Result<()> {
        let bytes = &self.buffer[(from - base) as usize..(to - base) as usize];
        self.sink.data(from, bytes)?;
        self.stats.bytes_data += to - from;
        Ok(())
    }
}

fn clip(pieces: &[Range], from: u64, to: u64) -> impl Iterator<Item = Range> + '_ {
    let first = pieces.partition_point(|(_, end)| *end <= from);
    pieces[first..]
        .iter()
        .take_while(move |(start, _)| *start < to)
        .map(move |(start, end)| ((*start).max(from), (*end).min(to)))
}

fn hash(new: &Blocks, n: u64, pieces: &[Range], buffer: &[u8], base: u64) -> Option<u64> {
    let from = n * new.size();
    let inside = clip(pieces, from, from.saturating_add(new.size()));
    blocks::hash(
        new.seed(),
        inside.map(|(a, b)| (a - from, &buffer[(a - base) as usize..(b - base) as usize])),
    )
}
