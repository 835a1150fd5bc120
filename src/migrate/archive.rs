//! A checkpoint file: the same frames that a peer would get, recorded behind a magic number.
//!
//! The first frame is the manifest (with what the agent needs to make the container), the last one `Final` with the
//! counts; every frame has its checksum. [`verify`] reads a file once from end to end before anything is made of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::codec::Kind;
use super::protocol::{FORMAT, Final, Manifest, OLDEST};
use super::seal::{self, SealTo};
use super::stream::Counter;
use super::wire::{Transport, Wire};

const MAGIC: &[u8; 8] = b"TRSHPCK1";
/// A file is not silent.
const PATIENCE: Duration = Duration::from_secs(3600);
const DAMAGED: &str = "the checkpoint file is damaged or truncated";

/// A key was given for a file that is not encrypted.
#[derive(Debug, thiserror::Error)]
#[error(
    "the file is not encrypted, though an identity or a passphrase was given: whoever wrote it, it is not protected as you expect"
)]
pub struct NotSealed;

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

/// Begins a checkpoint in an empty file, encrypted if `seal` says so (with the file that holds the passphrase, if it is one);
/// [`Wire::close`] makes it durable.
pub fn create(file: File, seal: Option<(&SealTo, Option<&File>)>) -> Result<Wire> {
    let mut io: Box<dyn Transport> = match seal {
        None => Box::new(OnDisk(file)),
        Some((to, secret)) => seal::seal(file, to, secret)?,
    };
    io.write_all(MAGIC).context("writing the checkpoint file")?;
    Ok(Wire::new(io, PATIENCE))
}

/// Reads a checkpoint's manifest; the frames behind it come from what is returned with it. `keys` holds the identities or the
/// passphrase of an encrypted file, as it is asked for by [`seal::unseal`].
///
/// # Errors
/// It is no checkpoint of ours, of a version that this build does not read, or damaged; [`seal::WrongKey`] if that is all.
pub fn open(mut file: File, keys: Option<&File>) -> Result<(Manifest, Wire)> {
    let mut io: Box<dyn Transport> = match (seal::is_sealed(&mut file)?, keys) {
        (true, keys) => seal::unseal(file, keys)?,
        (false, None) => Box::new(OnDisk(file)),
        // whoever gives a key counts on what it protects from
        (false, Some(_)) => bail!(NotSealed),
    };
    let mut magic = [0; MAGIC.len()];
    let is_ours = match io.read_exact(&mut magic) {
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(e).context(DAMAGED),
        read => read.is_ok() && &magic == MAGIC,
    };
    ensure!(is_ours, "this is not a transship checkpoint file");
    let mut wire = Wire::new(io, PATIENCE);
    ensure!(wire.recv()? == Kind::Manifest, "the checkpoint file does not begin with its manifest");
    let manifest: Manifest = wire.message()?;
    if !(OLDEST..=FORMAT).contains(&manifest.version) {
        bail!(
            "the checkpoint file has format {}, this transship reads {OLDEST} to {FORMAT}",
            manifest.version
        );
    }
    Ok((manifest, wire))
}

/// Reads the whole file: every checksum, the order of the frames and the counts at the end; of an encrypted one every MAC too.
///
/// # Errors
/// As [`open`]; what is damaged, and where, in bytes from the start (of what is inside, if it is encrypted).
pub fn verify(file: File, keys: Option<&File>) -> Result<(Manifest, Final)> {
    let (manifest, mut wire) = open(file, keys)?;
    let mut counter = Counter::default();
    let totals = loop {
        let at = MAGIC.len() as u64 + wire.bytes().1;
        let damaged = || format!("{DAMAGED} (at byte {at})");
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
    let rest = wire.rest().context(DAMAGED)?;
    ensure!(rest == 0, "the checkpoint file is damaged: {rest} bytes follow its end");
    Ok((manifest, totals))
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;
    use crate::migrate::protocol::FileHeader;
    use crate::migrate::wire::FrameSink;

    fn sample() -> Vec<u8> {
        sample_with(None)
    }

    fn sample_with(seal: Option<&SealTo>) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        let mut w = create(file.try_clone().unwrap(), seal.map(|to| (to, None))).unwrap();
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

    fn holding(bytes: &[u8]) -> File {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    fn check(bytes: &[u8]) -> Result<(Manifest, Final)> {
        verify(holding(bytes), None)
    }

    #[test]
    fn a_whole_file_is_accepted_and_read_from_behind_its_manifest() {
        let bytes = sample();
        assert_eq!(check(&bytes).unwrap().1.file_bytes, 5);
        let (_, mut wire) = open(holding(&bytes), None).unwrap();
        assert_eq!(wire.recv().unwrap(), Kind::File);
    }

    #[test]
    fn an_encrypted_file_is_verified_and_read_alike() {
        let identity = age::x25519::Identity::generate();
        let to = SealTo::Recipients(vec![identity.to_public().to_string()]);
        let bytes = sample_with(Some(&to));
        let keys = holding(age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).as_bytes());
        assert_eq!(verify(holding(&bytes), Some(&keys)).unwrap().1.file_bytes, 5);
        let (_, mut wire) = open(holding(&bytes), Some(&keys)).unwrap();
        assert_eq!(wire.recv().unwrap(), Kind::File);
        assert!(verify(holding(&bytes), None).unwrap_err().is::<seal::WrongKey>());
        assert!(verify(holding(&sample()), Some(&keys)).unwrap_err().is::<NotSealed>());
        for cut in (0..bytes.len()).filter(|cut| *cut > 20) {
            assert!(verify(holding(&bytes[..cut]), Some(&keys)).is_err(), "cut at {cut}");
        }
        // what is encrypted is believed no more than what is not
        let mut sealed = tempfile::tempfile().unwrap();
        let mut w = seal::seal(sealed.try_clone().unwrap(), &to, None).unwrap();
        w.write_all(b"#!/bin/sh\n").unwrap();
        w.finish().unwrap();
        sealed.seek(SeekFrom::Start(0)).unwrap();
        assert!(verify(sealed, Some(&keys)).unwrap_err().to_string().contains("not a transship"));
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
