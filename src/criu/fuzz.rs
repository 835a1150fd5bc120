//! Fuzz targets of CRIU's images, page server protocol and messages: see [`crate::fuzz`].

use std::path::Path;

use prost::Message;

use super::images::{IMG_COMMON_MAGIC, PageStore};
use super::mm_image::{Mappings, Vma};
use super::page_server::{ImageKind, PE_LAZY, PE_PARENT, PE_PRESENT, PageEvent, Parser, Step, page_size};
use super::{cgroup_image, conceal, gate, kdat, listing, rpc, stdio, timerfd_image, vet};
use crate::fuzz::{Input, chunk, json};

/// An image of the mappings of a task, as CRIU writes it: a heap and a file.
pub(crate) fn mappings() -> Vec<u8> {
    let vmas = [
        Vma { start: 0x10000, end: 0x80000, prot: 3, flags: 0x22, status: 1 << 9, ..Vma::default() },
        Vma { start: 0x10_0000, end: 0x11_0000, prot: 5, flags: 2, status: 1 << 6, ..Vma::default() },
    ];
    // field 14 of the message is a list of them
    let body: Vec<u8> = vmas
        .iter()
        .map(Message::encode_to_vec)
        .flat_map(|v| [&[14 << 3 | 2, v.len() as u8][..], &v].concat())
        .collect();
    image(0x5749_2820, &[body])
}

/// Entries behind the two magic words and their lengths.
fn image(magic: u32, entries: &[Vec<u8>]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|e| [&(e.len() as u32).to_le_bytes()[..], e].concat());
    [IMG_COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat().into_iter().chain(entries).collect()
}

/// A page event that can be kept: the content by its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Open(ImageKind, u64),
    Pages { vaddr: u64, flags: u32, bytes: Vec<u8> },
    Hole { vaddr: u64, pages: u64, flags: u32 },
    Close,
}

/// Takes note of an event; pieces of one run become one again.
fn note(all: &mut Vec<Seen>, event: PageEvent<'_>, merge_holes: bool) {
    let page = page_size() as u64;
    match (all.last_mut(), event) {
        (Some(Seen::Pages { vaddr: at, flags: f, bytes: all }), PageEvent::Pages { vaddr, flags, bytes })
            if *f == flags && *at + all.len() as u64 == vaddr =>
        {
            all.extend_from_slice(bytes);
        }
        (Some(Seen::Hole { vaddr: at, pages: n, flags: f }), PageEvent::Hole { vaddr, pages, flags })
            if merge_holes && *f == flags && at.checked_add(n.saturating_mul(page)) == Some(vaddr) =>
        {
            *n += pages;
        }
        (_, PageEvent::Open { kind, id }) => all.push(Seen::Open(kind, id)),
        (_, PageEvent::Pages { vaddr, flags, bytes }) => {
            all.push(Seen::Pages { vaddr, flags, bytes: bytes.to_vec() });
        }
        (_, PageEvent::Hole { vaddr, pages, flags }) => all.push(Seen::Hole { vaddr, pages, flags }),
        (_, PageEvent::Close) => all.push(Seen::Close),
        (_, PageEvent::Idle) => {}
    }
}

/// CRIU's images: what is understood is written, and is then the same; and what else CRIU leaves in files.
pub mod criu_images {
    use super::*;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => {
                if let Ok(mappings) = Mappings::decode(input.rest()) {
                    let (lazy, anonymous) = (mappings.lazy(), mappings.anonymous());
                    let all: crate::memory::RangeSet = mappings.0.iter().map(|v| v.start..v.end).collect();
                    assert!(lazy.difference(&all).is_empty() && anonymous.difference(&all).is_empty());
                    assert!(mappings.stacks().difference(&all).is_empty());
                }
            }
            1 => {
                if let Ok(Some(image)) = timerfd_image::rearmed(input.rest()) {
                    assert_eq!(timerfd_image::rearmed(&image).expect("it was written here"), None);
                }
            }
            2 => {
                if let Ok(kept) = cgroup_image::without_paths(input.rest()) {
                    assert_eq!(cgroup_image::without_paths(&kept).expect("it was written here"), kept);
                }
            }
            3 => memory(&mut input),
            4 => drop(kdat::check(input.rest(), false)),
            5 => drop(conceal::is_filtered(&String::from_utf8_lossy(input.rest()))),
            7 => vet::fuzz::run(input.rest()),
            _ => state(input.rest()),
        }
    }

    /// What runc remembers of a container's descriptors.
    fn state(json: &[u8]) {
        let dir = crate::fuzz::dir();
        let path = dir.path().join("state.json");
        std::fs::write(&path, json).expect("a file");
        if let Ok(descriptors) = stdio::descriptors(Some(&path), i32::MAX) {
            stdio::write(dir.path(), &descriptors).expect("a file");
            let written = std::fs::read(dir.path().join(stdio::FILE)).expect("it was written");
            assert_eq!(serde_json::from_slice::<[String; 3]>(&written).expect("it was written"), descriptors);
        }
    }

    /// A list of pages and the pages: read, written by the destination's writer, and read again.
    fn memory(input: &mut Input<'_>) {
        let dir = crate::fuzz::dir();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        for (n, dir) in [&from, &to].into_iter().enumerate() {
            std::fs::create_dir(dir).expect("a directory");
            if n == 0 {
                std::fs::write(dir.join("pagemap-7.img"), input.chunk()).expect("a file");
                std::fs::write(dir.join("pages-1.img"), input.rest()).expect("a file");
            }
        }
        let Ok(events) = read(&from, true) else { return };
        let mut store = PageStore::new(&to, u64::MAX);
        for event in &events {
            let event = match event {
                Seen::Open(kind, id) => PageEvent::Open { kind: *kind, id: *id },
                Seen::Pages { vaddr, flags, bytes } => {
                    PageEvent::Pages { vaddr: *vaddr, flags: *flags, bytes }
                }
                Seen::Hole { vaddr, pages, flags } => {
                    PageEvent::Hole { vaddr: *vaddr, pages: *pages, flags: *flags }
                }
                Seen::Close => PageEvent::Close,
            };
            // runs out of order and the like: refused
            if store.event(event).is_err() {
                return;
            }
        }
        store.finish().expect("every image was closed");
        assert_eq!(read(&to, true).expect("it was written here"), events);
    }

    fn read(dir: &Path, merge: bool) -> anyhow::Result<Vec<Seen>> {
        let mut all = Vec::new();
        listing::replay(dir, &mut |event| {
            note(&mut all, event, merge);
            Ok(())
        })?;
        Ok(all)
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let dir = crate::fuzz::dir();
        let page = page_size() as u64;
        let mut store = PageStore::new(dir.path(), u64::MAX);
        for event in [
            PageEvent::Open { kind: ImageKind::Pid, id: 7 },
            PageEvent::Hole { vaddr: page, pages: 3, flags: PE_PARENT },
            PageEvent::Pages { vaddr: 9 * page, flags: PE_PRESENT | PE_LAZY, bytes: &vec![5; page as usize] },
            PageEvent::Hole { vaddr: 11 * page, pages: 1, flags: PE_LAZY },
            PageEvent::Close,
        ] {
            store.event(event).expect("a small image");
        }
        let file = |name: &str| std::fs::read(dir.path().join(name)).expect("it was written");
        let pages = [&[3][..], &chunk(&file("pagemap-7.img")), &file("pages-1.img")].concat();
        // a timerfd that has expired, as CRIU has it in files.img
        let timer = [&[
            0x08, 17, 0x10, 3, 0x62, 22, 8, 3, 16, 0, 0x1a, 2, 8, 0, 32, 1, 40, 1, 48, 0, 56, 0, 64, 0, 72,
            0, 80, 20,
        ][..]]
        .concat();
        // two sets, the second with a member, and a controller
        let cgroups = [
            &[0x0a, 2, 8, 1, 0x0a, 17, 8, 2, 0x12, 13, 0x0a, 7][..],
            b"freezer",
            &[0x12, 2],
            b"/x",
            &[0x12, 9, 0x0a, 7],
            b"freezer",
        ]
        .concat();
        let mut known = vec![0; 700];
        known[..4].copy_from_slice(&0x5702_3458u32.to_le_bytes());
        known[16] = 40;
        known[33..36].fill(1);
        known[40..48].copy_from_slice(&0x7fff_ffff_f000u64.to_le_bytes());
        let with = |n: u8, bytes: &[u8]| [&[n][..], bytes].concat();
        let mut seeds = vec![
            with(0, &mappings()),
            with(1, &image(0x5630_3138, &[timer.clone(), timer])),
            with(2, &image(0x5938_3330, &[cgroups])),
            pages,
            with(4, &known),
            with(5, b"Name:\tredis\nSeccomp:\t2\nSeccomp_filters:\t1\n"),
            with(6, br#"{"external_descriptors":["/dev/null","pipe:[7]","pipe:[8]"]}"#),
        ];
        seeds.extend(vet::fuzz::seeds().iter().map(|seed| with(7, seed)));
        seeds
    }
}

/// What CRIU's page client sends: the same events however it is cut.
pub mod criu_page_server {
    use super::*;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let piece = 1 + usize::from(input.byte()) * 64;
        let stream = input.rest();
        let (whole, cut) = (parse(stream, usize::MAX), parse(stream, piece));
        assert_eq!(whole, cut, "pieces of {piece}");
        let pages = |e: &Seen| if let Seen::Pages { bytes, .. } = e { bytes.len() } else { 0 };
        assert!(whole.0.iter().map(pages).sum::<usize>() <= stream.len());
    }

    /// The events of complete commands, the number of replies, and whether it was refused.
    fn parse(mut rest: &[u8], piece: usize) -> (Vec<Seen>, usize, bool) {
        let mut parser = Parser::new(page_size());
        let (mut all, mut replies) = (Vec::new(), 0);
        loop {
            match parser.step() {
                Ok(Some(Step::Event(event))) => note(&mut all, event, false),
                Ok(Some(Step::Reply(_))) => replies += 1,
                Err(_) => return (settled(all), replies, true),
                Ok(None) if rest.is_empty() => return (settled(all), replies, false),
                Ok(None) => {
                    let space = parser.space();
                    assert!(!space.is_empty(), "no room and no event");
                    let len = piece.min(space.len()).min(rest.len());
                    space[..len].copy_from_slice(&rest[..len]);
                    rest = &rest[len..];
                    parser.filled(len);
                }
            }
        }
    }

    /// Without the run that may not have come as a whole: how much of it was passed on depends on the pieces.
    fn settled(mut all: Vec<Seen>) -> Vec<Seen> {
        if matches!(all.last(), Some(Seen::Pages { .. })) {
            all.pop();
        }
        all
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let page = page_size();
        let dump = |wide: bool| {
            let header = |cmd: u32, pages: u64, vaddr: u64, image: u64| {
                let mut out = cmd.to_le_bytes().to_vec();
                match wide {
                    true => out.extend([&[0xaa; 4][..], &pages.to_le_bytes()].concat()),
                    false => out.extend((pages as u32).to_le_bytes()),
                }
                out.extend([vaddr, image].iter().flat_map(|n| n.to_le_bytes()));
                out
            };
            let mut out = vec![3];
            for (cmd, pages, vaddr, image) in [
                (4, 0, 0, 1 << 8 | 1),
                (PE_PRESENT << 16 | 6, 2, 0x10000, 1 << 8 | 1),
                (PE_PARENT << 16 | 6, 5, 0x20000, 1 << 8 | 1),
                (5, 0, 0, 1 << 8 | 1),
                (4, 0, 0, 7 << 8 | 2),
                (1, 1, 0, 7 << 8 | 2),
                (0x1024, 0, 0, 0),
            ] {
                out.extend(header(cmd, pages, vaddr, image));
                if matches!(cmd, 1) || cmd == PE_PRESENT << 16 | 6 {
                    out.extend(vec![9; page * pages as usize]);
                }
            }
            out
        };
        vec![dump(false), dump(true)]
    }
}

/// CRIU's requests and answers, the gate's look at them, and what the gate and the shim say to each other.
pub mod criu_requests {
    use super::*;
    use crate::criu::rpc::{CriuOpts, CriuReq, CriuResp, ReqType};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => {
                let bytes = input.rest();
                let asks = gate::asks_restore(&bytes[..bytes.len().min(2)]);
                let Ok(request) = CriuReq::decode(bytes) else { return };
                // as runc, crun and we write it; then the first two bytes tell
                let again = request.encode_to_vec();
                let restores = request.r#type == ReqType::Restore as i32;
                assert_eq!(gate::asks_restore(&again[..2]), restores);
                assert!(!asks || restores || again != bytes);
                assert_eq!(CriuReq::decode(&again[..]).expect("it was written here"), request);
            }
            1 => {
                let Ok(answer) = CriuResp::decode(input.rest()) else { return };
                let again = answer.encode_to_vec();
                assert_eq!(CriuResp::decode(&again[..]).expect("it was written here"), answer);
            }
            2 => json::<gate::Hello>(input.rest()),
            _ => json::<gate::Go>(input.rest()),
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let opts = CriuOpts {
            images_dir_fd: 5,
            pid: Some(1),
            leave_running: Some(true),
            root: Some("/r".into()),
            ps: Some(rpc::PageServerInfo { fd: Some(7), ..Default::default() }),
            network_lock: Some(rpc::NetworkLock::Skip as i32),
            ..CriuOpts::default()
        };
        let mut seeds = Vec::new();
        for kind in [ReqType::Restore, ReqType::Dump, ReqType::Version, ReqType::FeatureCheck] {
            seeds.push([&[0][..], &CriuReq::with_opts(kind, opts.clone()).encode_to_vec()].concat());
        }
        let answer = CriuResp {
            r#type: ReqType::Notify as i32,
            success: true,
            notify: Some(rpc::Notify { script: Some("post-dump".into()), pid: Some(1) }),
            version: Some(rpc::VersionResp { major_number: 4, minor_number: 2, ..Default::default() }),
            cr_errmsg: Some("no".into()),
            ..CriuResp::default()
        };
        seeds.push([&[1][..], &answer.encode_to_vec()].concat());
        seeds.push(b"\x02{\"at\":\"post-restore\"}\n".to_vec());
        seeds.push(
            b"\x03{\"go\":true,\"netns\":\"/n\",\"path_first\":\"/p\",\"small_pages\":true}\n".to_vec(),
        );
        seeds
    }
}
