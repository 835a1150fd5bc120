//! A checkpoint file: the same frames that a peer would get, recorded behind a magic number.
//!
//! The first frame is the manifest (with what the agent needs to make the container), the last one `Final` with the
//! counts; every frame has its checksum. [`verify`] reads a file once from end to end before anything is made of it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::codec::Kind;
use super::protocol::{FORMAT, Final, Manifest, OLDEST};
use super::stream::Counter;
use super::wire::{Transport, Wire};

const MAGIC: &[u8; 8] = b"TRSHPCK1";

/// A checkpoint file as the place where frames go to or come from.
struct OnDisk(File);

impl Read for OnDisk {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for OnDisk {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Transport for OnDisk {
    fn finish(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }
}

/// Begins a checkpoint in an empty file; [`Wire::close`] makes it durable.
pub fn create(mut file: File) -> Result<Wire> {
    file.write_all(MAGIC).context("writing the checkpoint file")?;
    Ok(Wire::new(Box::new(OnDisk(file)), Duration::from_secs(3600)))
}

/// Reads a checkpoint's manifest; the file then stands behind it, where [`resume`] goes on.
///
/// # Errors
/// It is no checkpoint of ours, of a version that this build does not read, or damaged.
pub fn open(file: &mut File) -> Result<Manifest> {
    let mut magic = [0; MAGIC.len()];
    file.seek(SeekFrom::Start(0))?;
    let is_ours = file.read_exact(&mut magic).is_ok() && &magic == MAGIC;
    ensure!(is_ours, "this is not a transship checkpoint file");
    let mut wire = resume(file.try_clone()?);
    ensure!(wire.recv()? == Kind::Manifest, "the checkpoint file does not begin with its manifest");
    let manifest: Manifest = wire.message()?;
    if !(OLDEST..=FORMAT).contains(&manifest.version) {
        bail!(
            "the checkpoint file has format {}, this transship reads {OLDEST} to {FORMAT}",
            manifest.version
        );
    }
    Ok(manifest)
}

/// The frames behind the manifest of a file that [`open`] has read.
pub fn resume(file: File) -> Wire {
    Wire::new(Box::new(OnDisk(file)), Duration::from_secs(3600))
}

/// Reads the whole file: every checksum, the order of the frames and the counts at the end.
///
/// # Errors
/// What is damaged, and where, in bytes from the start.
pub fn verify(file: &mut File) -> Result<(Manifest, Final)> {
    let manifest = open(file)?;
    let mut wire = Wire::new(Box::new(OnDisk(file.try_clone()?)), Duration::from_secs(3600));
    let mut counter = Counter::default();
    let start = file.stream_position()?;
    let totals = loop {
        let at = start + wire.bytes().1;
        let damaged = || format!("the checkpoint file is damaged or truncated (at byte {at})");
        let kind = wire.recv().with_context(damaged)?;
        if kind == Kind::Final {
            break wire.message::<Final>().with_context(damaged)?;
        }
        counter.count(kind, wire.payload()).with_context(damaged)?;
    };
    ensure!(
        counter.totals() == totals,
        "the checkpoint file is damaged: it holds {:?}, its last frame says {totals:?}",
        counter.totals()
    );
    let rest = io::copy(file, &mut io::sink())?;
    ensure!(rest == 0, "the checkpoint file is damaged: {rest} bytes follow its end");
    Ok((manifest, totals))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::protocol::FileHeader;
    use crate::migrate::wire::FrameSink;

    fn sample() -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        let mut w = create(file.try_clone().unwrap()).unwrap();
        w.json(Kind::Manifest, &Manifest { version: FORMAT, ..Manifest::default() }).unwrap();
        w.json(Kind::File, &FileHeader { name: "core-1.img".into(), size: 5 }).unwrap();
        w.frame(Kind::FileData, &[b"hello"]).unwrap();
        w.json(Kind::Final, &Final { files: 1, file_bytes: 5, ..Final::default() }).unwrap();
        w.close().unwrap();
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn check(bytes: &[u8]) -> Result<(Manifest, Final)> {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        verify(&mut f)
    }

    #[test]
    fn a_whole_file_is_accepted_and_read_from_behind_its_manifest() {
        let bytes = sample();
        assert_eq!(check(&bytes).unwrap().1.file_bytes, 5);
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(&bytes).unwrap();
        open(&mut f).unwrap();
        assert_eq!(resume(f).recv().unwrap(), Kind::File);
    }

    #[test]
    fn every_truncation_and_any_garbage_is_refused() {
        let bytes = sample();
        for cut in 0..bytes.len() {
            assert!(check(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in (0..bytes.len()).filter(|at| !header_flags(&bytes, *at)) {
            let mut bad = bytes.clone();
            bad[at] ^= 0x20;
            assert!(check(&bad).is_err(), "byte {at}");
        }
        assert!(check(&[bytes.as_slice(), b"x"].concat()).unwrap_err().to_string().contains("follow"));
        assert!(check(b"#!/bin/sh\n").unwrap_err().to_string().contains("not a transship"));
    }

    /// Whether the byte is one of a header's two flag bytes, which mean nothing for a known kind.
    fn header_flags(bytes: &[u8], at: usize) -> bool {
        let mut head = MAGIC.len();
        while head < bytes.len() {
            if (head + 6..head + 8).contains(&at) {
                return true;
            }
            head += 16 + u32::from_le_bytes(bytes[head..head + 4].try_into().unwrap()) as usize;
        }
        false
    }
}
