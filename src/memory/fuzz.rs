//! Fuzz targets of pages on the wire, and of what the kernel and CRIU say in texts: see [`crate::fuzz`].

use super::batch::{self, Builder};
use super::compress::{Compression, Compressor};
use super::read::Chunk;
use super::{Space, maps};
use crate::criu::ImageKind;
use crate::criu::page_server::page_size;
use crate::fuzz::Input;

/// A payload of pages: what it says is packed anew, in every compression, and says the same.
pub mod memory_batch {
    use super::*;

    /// A run that can be kept.
    #[derive(Debug, PartialEq, Eq)]
    enum Run {
        Data(u64, Vec<u8>),
        Zero(u64, u64),
        Gone(u64, u64),
    }

    /// Takes note of runs; neighbours become one.
    fn note<'a>(all: &mut Vec<Run>, chunks: impl Iterator<Item = Chunk<'a>>) {
        for chunk in chunks {
            match (all.last_mut(), chunk) {
                (Some(Run::Data(at, all)), Chunk::Data { vaddr, bytes })
                    if *at + all.len() as u64 == vaddr =>
                {
                    all.extend_from_slice(bytes);
                }
                (Some(Run::Zero(at, n)), Chunk::Zero { vaddr, len }) if *at + *n == vaddr => *n += len,
                (Some(Run::Gone(at, n)), Chunk::Gone { vaddr, len }) if *at + *n == vaddr => *n += len,
                (_, Chunk::Data { vaddr, bytes }) => all.push(Run::Data(vaddr, bytes.to_vec())),
                (_, Chunk::Zero { vaddr, len }) => all.push(Run::Zero(vaddr, len)),
                (_, Chunk::Gone { vaddr, len }) => all.push(Run::Gone(vaddr, len)),
            }
        }
    }

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let compression = match input.byte() % 3 {
            0 => Compression::None,
            1 => Compression::Lz4,
            _ => Compression::Zstd,
        };
        let (mut scratch, mut said) = (Vec::new(), Vec::new());
        let Ok(whole) = batch::decode(input.rest(), &mut scratch) else { return };
        let (space, mut builder) = (whole.space(), Builder::new(whole.space(), 16 << 10));
        note(&mut said, whole.chunks());
        let payloads: Vec<_> = whole.chunks().filter_map(|c| builder.push(c)).collect();
        let payloads = payloads.into_iter().chain(builder.finish());
        let (mut packer, mut again) = (Compressor::new(compression), Vec::new());
        for payload in payloads {
            let packed = packer.pack(payload);
            let mut scratch = Vec::new();
            let batch = batch::decode(&packed, &mut scratch).expect("it was packed here");
            assert_eq!(batch.space(), space);
            note(&mut again, batch.chunks());
            assert!(scratch.capacity() <= batch::MAX_BATCH + 64);
        }
        assert_eq!(said, again);
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let page = page_size() as u64;
        let mut builder = Builder::new(Space { kind: ImageKind::Pid, id: 7 }, batch::MAX_BATCH);
        let bytes = b"abcdefgh".repeat(2 * page as usize / 8);
        builder.push(Chunk::Data { vaddr: page, bytes: &bytes });
        builder.push(Chunk::Zero { vaddr: 9 * page, len: 5 * page });
        builder.push(Chunk::Gone { vaddr: 90 * page, len: page });
        builder.push(Chunk::Data { vaddr: 50 * page, bytes: &bytes[..page as usize] });
        let plain = builder.finish().expect("there are runs");
        let packed = |c| Compressor::new(c).pack(plain.clone());
        let all = [plain.clone(), packed(Compression::Lz4), packed(Compression::Zstd)];
        all.iter().enumerate().map(|(n, payload)| [&[n as u8][..], payload].concat()).collect()
    }
}

/// Texts of /proc, of CRIU's log and of `--version`.
pub mod proc_text {
    use super::*;
    use crate::{agent::host, cgroup::locate, criu::log, rootfs::writers};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let (how, bytes) = (input.byte(), input.rest());
        let text = String::from_utf8_lossy(bytes);
        match how {
            0 => {
                let all = maps::parse(&text).unwrap_or_default();
                assert!(all.len() <= text.lines().count());
                bytes.split(|b| *b == b'\n').for_each(|line| drop(writers::shared_writable(line)));
            }
            1 => {
                let (cgroups, mounts) = text.split_once("\n\n").unwrap_or((&text, ""));
                let (cgroups, all) = (locate::parse_proc_cgroup(cgroups), locate::parse_mountinfo(mounts));
                let found = locate::freezer_dir(&cgroups, &all).map(|(_, dir)| dir);
                let climbs =
                    |p: &std::path::Path| p.components().any(|c| c == std::path::Component::ParentDir);
                // a mount point may have any name, what is below it not
                assert!(found.is_none_or(|p| !climbs(&p) || mounts.contains("..") || mounts.contains('\\')));
            }
            2 => {
                let found = log::first_error(text.lines().map(str::to_owned));
                assert!(found.is_none_or(|f| text.contains(&f.line)));
            }
            _ => {
                host::cpu_features(&text);
                host::first_version(&text);
                host::mem_available(&text);
            }
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let maps = "55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]\n\
                    7f1200000000-7f1200002000 r-xp 0001a000 fe:01 1835                       /usr/lib/a b.so\n\
                    7f1300000000-7f1300001000 rw-s 00000000 00:01 4097                       /dev/zero\\012 (deleted)\n";
        let v1 = "8:pids:/default/m1\n6:freezer:/default/m1\n1:name=systemd:/\n0::/\n\n\
                  32 31 0:29 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
                  38 31 0:35 /docker/x /sys/fs/cgroup/pids\\040b rw - cgroup cgroup rw,pids\n";
        let v2 =
            "0::/../a/b\n\n30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let log = "(00.001) Warn  (compel/src/infect.c:130): Unable to interrupt\n\
                   (00.010)     42: Error (criu/sk-inet.c:191): sk-inet: Unsupported proto 262 for socket 2a\n\
                   (00.011) Error (criu/cr-dump.c:1) rlimit: \n";
        let unexpected = "(00.001) Warn  (criu/seize.c:2): Unexpected process 5 in freezer cgroup\n";
        let with = |n: u8, text: &str| [&[n][..], text.as_bytes()].concat();
        vec![
            with(0, maps),
            with(1, v1),
            with(1, v2),
            with(2, log),
            with(2, unexpected),
            with(3, "processor : 0\nflags\t\t: fpu sse2 avx\n\nprocessor : 1\nflags\t\t: fpu sse2\n"),
            with(3, "runc version v1.3.3-rc1\nspec: 1.0.2\n"),
            with(3, "MemTotal:       24 kB\nMemAvailable:   12 kB\n"),
        ]
    }
}
