//! The state on its way out.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Counter, HOLE, HOLES, PIECE, hole_bytes, kind_number};
use crate::criu::PageEvent;
use crate::criu::page_server::{PE_PARENT, page_size};
use crate::memory::RangeSet;
use crate::memory::sets::encode_bits;
use crate::migrate::codec::Kind;
use crate::migrate::link::Link;
use crate::migrate::protocol::{FileHeader, Final};
use crate::rootfs::{self, CaptureOptions, Entry, Sink, WritableLayer};

/// Sends the state; counts what it sends. Borrowed by closures of the dump, therefore one object for all parts.
pub struct Sender<'a> {
    link: &'a Link,
    counter: Counter,
    entry: Vec<u8>,
    /// Runs of pages without bytes that wait to be sent together: there may be very many.
    holes: Vec<u8>,
    /// Does the peer take sets of pages as bits?
    bits: bool,
}

impl<'a> Sender<'a> {
    /// Sends through `link`.
    pub(in crate::migrate) fn new(link: &'a Link) -> Self {
        Sender { link, counter: Counter::default(), entry: Vec::new(), holes: Vec::new(), bits: false }
    }

    /// To a peer that takes sets of pages as bits, or does not.
    pub(in crate::migrate) fn bits(self, bits: bool) -> Self {
        Sender { bits, ..self }
    }

    fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<()> {
        self.link.frame(kind, parts)
    }

    /// One event of CRIU's dump.
    pub fn pages(&mut self, event: PageEvent<'_>) -> Result<()> {
        if let PageEvent::Hole { vaddr, pages, flags } = event {
            self.holes.extend_from_slice(&hole_bytes(vaddr, pages, flags));
            return if self.holes.len() < HOLES * HOLE { Ok(()) } else { self.send_holes() };
        }
        self.send_holes()?;
        match event {
            PageEvent::Open { kind, id } => {
                self.frame(Kind::PagesOpen, &[&[kind_number(kind)], &id.to_le_bytes()])
            }
            PageEvent::Pages { vaddr, flags, bytes } => {
                for (n, piece) in bytes.chunks(PIECE).enumerate() {
                    let vaddr = vaddr + (n * PIECE) as u64;
                    self.frame(Kind::Pages, &[&vaddr.to_le_bytes(), &flags.to_le_bytes(), piece])?;
                }
                self.counter.totals.pages += (bytes.len() / page_size()) as u64;
                self.counter.totals.page_bytes += bytes.len() as u64;
                Ok(())
            }
            PageEvent::Close => self.frame(Kind::PagesClose, &[]),
            PageEvent::Hole { .. } => Ok(()),
            PageEvent::Idle => self.link.wire().alive(),
        }
    }

    /// These pages of the memory that is open exist; their content comes otherwise.
    pub(in crate::migrate) fn exist(&mut self, set: &RangeSet) -> Result<()> {
        if self.bits {
            self.send_holes()?;
            return encode_bits(set).iter().try_for_each(|payload| self.frame(Kind::PagesExist, &[payload]));
        }
        set.iter().try_for_each(|run| {
            let (vaddr, pages) = (run.start, (run.end - run.start) / page_size() as u64);
            self.pages(PageEvent::Hole { vaddr, pages, flags: PE_PARENT })
        })
    }

    fn send_holes(&mut self) -> Result<()> {
        if !self.holes.is_empty() {
            self.link.frame(Kind::PagesHole, &[&self.holes])?;
            self.holes.clear();
        }
        Ok(())
    }

    /// Every plain file of CRIU's images directory, by name, but for those that were sent before; it holds metadata only.
    pub fn files(&mut self, dir: &Path, sent: &HashSet<OsString>) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .with_context(|| format!("reading {}", dir.display()))?
            .map(|e| Ok(e?.file_name()))
            .collect::<Result<_>>()?;
        names.sort();
        let mut buf = vec![0; PIECE];
        for name in names.into_iter().filter(|name| !sent.contains(name)) {
            let path = dir.join(&name);
            let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                continue;
            }
            let header = FileHeader { name: name.to_string_lossy().into_owned(), size: meta.len() };
            ensure!(header.is_safe(), "CRIU wrote an image with an odd name: {}", path.display());
            self.link.json(Kind::File, &header)?;
            let mut left = header.size as usize;
            while left > 0 {
                let n = left.min(PIECE);
                file.read_exact(&mut buf[..n]).with_context(|| format!("reading {}", path.display()))?;
                self.frame(Kind::FileData, &[&buf[..n]])?;
                left -= n;
            }
            self.counter.totals.files += 1;
            self.counter.totals.file_bytes += header.size;
        }
        Ok(())
    }

    /// The writable layer.
    pub fn layer(&mut self, layer: &WritableLayer) -> Result<()> {
        rootfs::capture(&layer.dir, &CaptureOptions::for_layer(layer), self)
            .context("reading the writable layer")?;
        self.layer_end()
    }

    /// A round of the writable layer is complete.
    pub(in crate::migrate) fn layer_end(&mut self) -> Result<()> {
        self.frame(Kind::LayerEnd, &[b"{}"])
    }

    /// Stdio that was queued at the freeze.
    pub fn stdio(&mut self, carry: &Value) -> Result<()> {
        self.link.json(Kind::Stdio, carry)
    }

    /// So many bytes of tmpfs files have been sent beside this.
    pub(in crate::migrate) fn tmpfs_sent(&mut self, bytes: u64) {
        self.counter.totals.tmpfs_bytes += bytes;
    }

    /// Bytes sent so far, see [`Wire::bytes`](crate::migrate::wire::Wire::bytes).
    pub fn sent(&self) -> u64 {
        self.link.wire().bytes().0
    }

    /// Says that this was everything.
    pub fn finish(&mut self) -> Result<Final> {
        let totals = self.counter.totals();
        self.link.json(Kind::Final, &totals)?;
        self.link.flush()?;
        Ok(totals)
    }
}

impl Sink for Sender<'_> {
    fn entry(&mut self, e: &Entry) -> Result<()> {
        self.counter.totals.layer_entries += 1;
        self.entry.clear();
        e.encode(&mut self.entry);
        self.link.frame(Kind::LayerEntry, &[&self.entry])
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            self.frame(Kind::LayerData, &[&(offset + (n * PIECE) as u64).to_le_bytes(), piece])?;
        }
        self.counter.totals.layer_bytes += bytes.len() as u64;
        Ok(())
    }
}
