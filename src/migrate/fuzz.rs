//! Fuzz targets of what a peer or a checkpoint file says: see [`crate::fuzz`].

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use super::backlog::{self, Arrived};
use super::codec::{self, Decoder, HEADER_LEN, Kind};
use super::protocol::{
    self, FORMAT, Failure, FileHeader, Final, Frozen, Hello, Manifest, Restored, Running, Welcome,
};
use super::stream::{self, Counter, Receiver};
use super::tmpfs::piece::Piece;
use super::{archive, report};
use crate::control::Limits;
use crate::criu::{ImageKind, page_server::PE_PRESENT, page_server::page_size};
use crate::fuzz::{Input, json};
use crate::memory::batch::{self, Builder};
use crate::memory::read::Chunk;
use crate::memory::sets::{
    MAX_RANGES, decode_bits, decode_ranges, decode_want, encode_bits, encode_ranges, encode_want,
};
use crate::memory::{RangeSet, Space};
use crate::net::{Packet, backlog::Offload};
use crate::policy::Policy;
use crate::rootfs::{Apply, Entry, LayerKind, WritableLayer};

/// Gives every frame of a stream the checksum that it should have: nothing would come through otherwise.
fn mended(stream: &[u8]) -> Vec<u8> {
    let mut out = stream.to_vec();
    let mut at = 0;
    while let Some(head) = out.get(at..at + HEADER_LEN) {
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(payload) = out.get(at + HEADER_LEN..(at + HEADER_LEN).saturating_add(len)) else { break };
        let sum = xxhash_rust::xxh3::xxh3_64(payload);
        out[at + 8..at + HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
        at += HEADER_LEN + len;
    }
    out
}

fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec::write(&mut out, kind, &[payload], false).expect("a vector takes everything");
    out
}

fn text(kind: Kind, message: &impl serde::Serialize) -> (Kind, Vec<u8>) {
    (kind, serde_json::to_vec(message).expect("a message"))
}

/// Packets that came to a frozen container.
fn packets() -> Vec<u8> {
    let mut frame = vec![5; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    let offload = Offload { flags: 1, hdr_len: 54, csum_start: 34, csum_offset: 16, ..Offload::default() };
    let one = Packet { link: "eth0".into(), offload, frame };
    backlog::encode(&[one.clone(), one]).remove(0)
}

/// One frame of each kind that means something, in an order that a receiver takes.
fn samples() -> Vec<(Kind, Vec<u8>)> {
    let page = vec![7; page_size()];
    let space = Space { kind: ImageKind::Pid, id: 1 };
    let mut builder = Builder::new(space, batch::MAX_BATCH);
    builder.push(Chunk::Data { vaddr: 0x10000, bytes: &page });
    builder.push(Chunk::Zero { vaddr: 0x20000, len: 4 * page.len() as u64 });
    let memory = builder.finish().expect("a batch");
    let set: RangeSet = [0x40000..0x41000, 0x50000..0x60000].into_iter().collect();
    let pages = [&0x10000u64.to_le_bytes()[..], &PE_PRESENT.to_le_bytes(), &page].concat();
    let hole = [0x20000u64.to_le_bytes(), 4u64.to_le_bytes()].concat();
    let entry = |e: Entry| {
        let mut out = Vec::new();
        e.encode(&mut out);
        (Kind::LayerEntry, out)
    };
    let piece = |p: Piece<'_>| (Kind::Staged, p.encode(|parts| parts.concat()));
    let meta = crate::rootfs::entry::Meta { mode: 0o755, ..Default::default() };
    let node = |path: &[u8], kind| entry(Entry::Node { path: path.to_vec(), kind, meta: meta.clone() });
    vec![
        text(Kind::Hello, &Hello { oldest: 1, newest: 3, migration_id: "m-1".into(), ticket: "t".into() }),
        text(Kind::Welcome, &Welcome { version: 3 }),
        text(Kind::Manifest, &Manifest { version: FORMAT, live: true, ..Manifest::default() }),
        text(Kind::Round, &protocol::Round { n: 1, bytes: 4096 }),
        (Kind::Memory, memory),
        node(b"", crate::rootfs::Kind::Directory),
        node(b"f", crate::rootfs::Kind::File { size: 5 }),
        (Kind::LayerData, [&0u64.to_le_bytes()[..], b"hello"].concat()),
        entry(Entry::End(crate::rootfs::entry::Totals { entries: 2, bytes: 5 })),
        (Kind::LayerEnd, b"{}".to_vec()),
        piece(Piece::Size { id: 1, size: 9000 }),
        piece(Piece::Data { id: 1, offset: 4096, bytes: b"abc" }),
        piece(Piece::Zeros { id: 1, offset: 0, len: 4096 }),
        piece(Piece::Hole { id: 1, offset: 0, len: 4096 }),
        text(Kind::Frozen, &Frozen { processes: 2 }),
        (Kind::PagesOpen, [&[1][..], &1u64.to_le_bytes()].concat()),
        (Kind::Pages, pages),
        (Kind::PagesHole, [&hole[..], &1u32.to_le_bytes()].concat()),
        (Kind::PagesExist, encode_bits(&set).remove(0)),
        (Kind::PagesClose, Vec::new()),
        (Kind::RemotePages, encode_ranges(space, &set).remove(0)),
        (Kind::HotPages, encode_ranges(space, &set).remove(0)),
        (Kind::MemoryWant, encode_want(space, &(0x1000..0x2000)).to_vec()),
        text(Kind::File, &FileHeader { name: "core-1.img".into(), size: 4 }),
        (Kind::FileData, b"core".to_vec()),
        (Kind::Stdio, b"{\"out\":[]}".to_vec()),
        (Kind::Backlog, packets()),
        text(Kind::Final, &Final { files: 1, file_bytes: 4, ..Final::default() }),
        text(Kind::Restored, &Restored::default()),
        text(Kind::Running, &Running { since_ms: 1.5, ..Running::default() }),
        text(
            Kind::Failed,
            &Failure { phase: "restore".into(), message: "no room".into(), ..Failure::default() },
        ),
        (Kind::Heartbeat, Vec::new()),
    ]
}

/// Bytes of a peer as frames, at once and in pieces; what each frame says, and says again when it is written anew.
pub mod migrate_frames {
    use super::*;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let how = input.byte();
        let (protected, mend, piece) = (how & 1 == 1, how & 2 == 2, 1 + usize::from(how >> 2));
        let stream = if mend { mended(input.rest()) } else { input.rest().to_vec() };
        let whole = decode(&stream, protected, usize::MAX);
        assert_eq!(whole, decode(&stream, protected, piece), "other frames when they come in pieces");
        for (kind, payload) in &whole.0 {
            message(*kind, payload);
            assert_eq!(decode(&frame(*kind, payload), false, usize::MAX).0, [(*kind, payload.clone())]);
        }
        protocol::migration_of(&String::from_utf8_lossy(&stream));
    }

    /// The frames, and what ended them.
    fn decode(mut rest: &[u8], protected: bool, piece: usize) -> (Vec<(Kind, Vec<u8>)>, String) {
        let (mut decoder, mut all, mut ready) = (Decoder::new(protected), Vec::new(), false);
        loop {
            // in pieces, every second read finds nothing
            let got = decoder.next(&mut |buf| {
                ready = !ready || piece == usize::MAX;
                if !ready {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let len = buf.len().min(piece);
                rest.read(&mut buf[..len])
            });
            match got {
                Ok(kind) => all.push((kind, decoder.payload().to_vec())),
                Err(codec::CodecError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return (all, e.to_string()),
            }
        }
    }

    fn message(kind: Kind, payload: &[u8]) {
        match kind {
            Kind::Hello => json::<Hello>(payload),
            Kind::Welcome => json::<Welcome>(payload),
            Kind::Manifest => json::<Manifest>(payload),
            Kind::Frozen => json::<Frozen>(payload),
            Kind::MemoryDone => json::<protocol::Filled>(payload),
            Kind::Round => json::<protocol::Round>(payload),
            Kind::Prepare => json::<protocol::Prepare>(payload),
            Kind::Ready => json::<protocol::Ready>(payload),
            Kind::Final => json::<Final>(payload),
            Kind::Restored => json::<Restored>(payload),
            Kind::Commit => json::<protocol::Commit>(payload),
            Kind::Running => json::<Running>(payload),
            Kind::Failed => json::<Failure>(payload),
            Kind::Stdio => json::<serde_json::Value>(payload),
            Kind::LayerEnd => json::<report::Report>(payload),
            Kind::File => {
                if let Ok(header) = serde_json::from_slice::<FileHeader>(payload)
                    && header.is_safe()
                {
                    assert!(!header.name.contains('/') && header.name != ".." && header.name != ".");
                }
            }
            Kind::MemoryWant => {
                if let Ok((space, range)) = decode_want(payload) {
                    assert_eq!(encode_want(space, &range)[..], *payload);
                }
            }
            Kind::RemotePages | Kind::HotPages => {
                if let Ok((space, set)) = decode_ranges(payload)
                    && set.len() <= MAX_RANGES
                {
                    assert_eq!(encode_ranges(space, &set), [payload]);
                }
            }
            Kind::PagesExist => {
                if let Ok(set) = decode_bits(payload) {
                    let frames = encode_bits(&set);
                    let again = frames.iter().map(|part| decode_bits(part).expect("a set"));
                    assert_eq!(again.fold(RangeSet::new(), |all, part| all.union(&part)), set);
                }
            }
            Kind::Staged => {
                if let Ok(piece) = Piece::decode(payload) {
                    assert_eq!(piece.encode(|parts| parts.concat()), payload);
                }
            }
            Kind::Pages => drop(stream::decode_pages(payload)),
            Kind::Backlog => {
                let mut arrived = Arrived::default();
                if arrived.add(payload).is_ok() {
                    let mut again = Arrived::default();
                    backlog::encode(&arrived.packets).iter().for_each(|p| again.add(p).expect("packets"));
                    assert_eq!(again.packets, arrived.packets);
                }
            }
            // these have targets of their own
            Kind::Memory | Kind::LayerEntry => {}
            Kind::FileData | Kind::PagesOpen | Kind::PagesHole | Kind::PagesClose => {}
            Kind::LayerData | Kind::Heartbeat => {}
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let one = |how: u8, frames: &[(Kind, Vec<u8>)]| {
            let frames: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            [&[how][..], &frames].concat()
        };
        let all = samples();
        let mut seeds: Vec<_> = all.iter().map(|f| one(2, std::slice::from_ref(f))).collect();
        seeds.push(one(3 << 2 | 3, &all));
        seeds.push(one(0, &all[..3]));
        seeds
    }
}

/// Frames of a source that says what it likes, taken in by the destination: images, layer, tmpfs files, memory.
pub mod migrate_stream {
    use super::*;

    /// Bytes of memory that it may bring.
    const CAP: u64 = 1 << 20;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let live = input.byte() & 1 == 1;
        let cage = crate::fuzz::Cage::new();
        let (images, dir) = (cage.make("images"), cage.root());
        let layer = WritableLayer { dir, kind: LayerKind::Overlay { userxattr: false } };
        let limits = Limits {
            silence_s: 1,
            ghost_limit: 0,
            criu: None,
            memory_cap: CAP,
            max_frozen: 0,
            images_dir: images.clone(),
            policy: Policy::default(),
        };
        let spec = serde_json::Value::Null;
        let receiver = match live {
            true => Receiver::live(&images, &layer, &limits, &spec),
            false => Receiver::new(&images, &layer, &limits, &spec),
        };
        let mut receiver = receiver.expect("an empty layer");
        let mut counter = Counter::default();
        while !input.is_empty() {
            let kind = Kind::ALL[usize::from(input.byte()) % Kind::ALL.len()];
            let payload = input.chunk();
            let counted = counter.count(kind, payload);
            if kind == Kind::Frozen {
                counter = Counter::default();
            }
            let taken = receiver.take(kind, payload);
            assert!(counted.is_ok() || taken.is_err(), "what cannot be counted was taken: {kind:?}");
            assert!(receiver.stored() <= CAP, "more memory than was allowed");
            if taken.is_err() {
                break;
            }
        }
        let totals = counter.totals();
        if live {
            drop(receiver.finish_live(&totals));
        } else {
            drop(receiver.finish(&totals));
        }
        cage.check(&["images"]);
        // whatever flags were set: nothing stays behind
        Apply::for_layer(&layer).expect("the layer can be emptied");
    }

    fn script(live: bool, frames: &[(Kind, Vec<u8>)]) -> Vec<u8> {
        let mut out = vec![u8::from(live)];
        for (kind, payload) in frames {
            out.push(Kind::ALL.iter().position(|k| k == kind).expect("every kind is listed") as u8);
            out.extend(crate::fuzz::chunk(payload));
        }
        out
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let state = |live: bool| -> Vec<(Kind, Vec<u8>)> {
            let only_live = |k| {
                matches!(k, Kind::Memory | Kind::RemotePages | Kind::HotPages | Kind::Staged | Kind::Frozen)
            };
            let fits = |k: Kind| {
                Counter::default().count(k, &[]).is_ok()
                    || matches!(k, Kind::Pages | Kind::File | Kind::FileData | Kind::Staged)
            };
            samples().into_iter().filter(|(k, _)| fits(*k) && (live || !only_live(*k))).collect()
        };
        // the mappings by which memory is planned
        let mm = crate::criu::fuzz::mappings();
        let mut planned = vec![
            text(Kind::File, &FileHeader { name: "mm-1.img".into(), size: mm.len() as u64 }),
            (Kind::FileData, mm),
        ];
        planned.extend(state(true));
        vec![script(false, &state(false)), script(true, &state(true)), script(true, &planned)]
    }
}

/// A checkpoint file.
pub mod migrate_checkpoint {
    use super::*;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let bytes = match input.byte() {
            0 => input.rest().to_vec(),
            _ => [&b"TRSHPCK1"[..], &mended(input.rest())].concat(),
        };
        let fd =
            nix::sys::memfd::memfd_create(c"fuzz", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let mut file = File::from(fd);
        file.write_all(&bytes).expect("memory");
        let begun = || {
            let mut file = file.try_clone().expect("a descriptor");
            file.rewind().expect("a memfd");
            file
        };
        let Ok((manifest, totals)) = archive::verify(begun(), None) else { return };
        // what is fine as a whole is read from its manifest on, frame by frame, up to its end
        let (again, mut wire) = archive::open(begun(), None).expect("it was verified");
        assert_eq!(again, manifest);
        while wire.recv().expect("it was verified") != Kind::Final {}
        assert_eq!(wire.message::<Final>().expect("it was verified"), totals);
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let mut frames = vec![text(Kind::Manifest, &Manifest { version: FORMAT, ..Manifest::default() })];
        let mut counter = Counter::default();
        for (kind, payload) in samples() {
            let state =
                !matches!(kind, Kind::Hello | Kind::Welcome | Kind::Manifest | Kind::Final | Kind::Round);
            if state && counter.count(kind, &payload).is_ok() {
                frames.push((kind, payload));
            }
        }
        frames.push(text(Kind::Final, &counter.totals()));
        let frames: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
        vec![[&[1][..], &frames].concat(), [&[0][..], b"TRSHPCK1", &frames].concat()]
    }
}
