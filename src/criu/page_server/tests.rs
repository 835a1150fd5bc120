//! The parser with streams cut at every place, and the server with a CRIU that is a thread.

use std::io::{Read, Write};

use anyhow::bail;

use super::parser::{CMD_ADD_FLAGS, CMD_FORCE_CLOSE, CMD_OPEN2, WORTHWHILE};
use super::*;

fn header(wide: bool, cmd: u32, pages: u64, vaddr: u64, image: u64) -> Vec<u8> {
    let mut h = cmd.to_le_bytes().to_vec();
    if wide {
        h.extend([0xaa; 4]); // padding is not zeroed by every compiler
        h.extend(pages.to_le_bytes());
    } else {
        h.extend((pages as u32).to_le_bytes());
    }
    h.extend(vaddr.to_le_bytes());
    h.extend(image.to_le_bytes());
    h
}

fn add(flags: u32) -> u32 {
    flags << 16 | CMD_ADD_FLAGS
}

/// A dump of task 1 (three pages in two runs, a hole) and of segment 7 (600 pages).
fn dump(wide: bool) -> Vec<u8> {
    let mut s = header(wide, CMD_OPEN2, 0, 0, 1 << 8 | 1);
    s.extend(header(wide, add(PE_PRESENT), 2, 0x10000, 1 << 8 | 1));
    s.extend([1; 8192]);
    s.extend(header(wide, add(PE_PARENT), 5, 0x20000, 1 << 8 | 1));
    s.extend(header(wide, add(PE_PRESENT | PE_LAZY), 1, 0x30000, 1 << 8 | 1));
    s.extend([2; 4096]);
    s.extend(header(wide, CMD_OPEN2, 0, 0, 7 << 8 | 2));
    s.extend(header(wide, add(PE_PRESENT), 600, 0, 7 << 8 | 2));
    s.extend(vec![3; 600 * 4096]);
    s.extend(header(wide, CMD_FORCE_CLOSE, 0, 0, 0));
    s
}

#[derive(Debug, PartialEq)]
enum Seen {
    Open(ImageKind, u64),
    Pages(u64, u32, usize, u8),
    Hole(u64, u64, u32),
    Close,
    Reply(Reply),
}

fn run(stream: &[u8], piece: usize) -> Result<Vec<Seen>> {
    let mut p = Parser::new(4096);
    let mut seen = Vec::new();
    let mut rest = stream;
    loop {
        while let Some(step) = p.step()? {
            seen.push(match step {
                Step::Event(PageEvent::Open { kind, id }) => Seen::Open(kind, id),
                Step::Event(PageEvent::Pages { vaddr, flags, bytes }) => {
                    assert!(bytes.iter().all(|b| *b == bytes[0]));
                    Seen::Pages(vaddr, flags, bytes.len() / 4096, bytes[0])
                }
                Step::Event(PageEvent::Hole { vaddr, pages, flags }) => Seen::Hole(vaddr, pages, flags),
                Step::Event(PageEvent::Close) => Seen::Close,
                Step::Event(PageEvent::Idle) => unreachable!("the parser knows no time"),
                Step::Reply(r) => Seen::Reply(r),
            });
        }
        if rest.is_empty() {
            return Ok(seen);
        }
        let space = p.space();
        assert!(!space.is_empty());
        let n = piece.min(space.len()).min(rest.len());
        space[..n].copy_from_slice(&rest[..n]);
        rest = &rest[n..];
        p.filled(n);
    }
}

/// Pieces of one run put together again.
fn merged(seen: Vec<Seen>) -> Vec<Seen> {
    let mut out: Vec<Seen> = Vec::new();
    for s in seen {
        match (out.last_mut(), &s) {
            (Some(Seen::Pages(a, f, n, b)), Seen::Pages(a2, f2, n2, b2))
                if *a + *n as u64 * 4096 == *a2 && (&*f, &*b) == (f2, b2) =>
            {
                *n += n2;
            }
            _ => out.push(s),
        }
    }
    out
}

#[test]
fn both_headers_and_any_fragmentation_give_the_same_events() {
    let want = vec![
        Seen::Open(ImageKind::Pid, 1),
        Seen::Reply(Reply::Parent),
        Seen::Pages(0x10000, 4, 2, 1),
        Seen::Hole(0x20000, 5, 1),
        Seen::Pages(0x30000, 6, 1, 2),
        Seen::Close,
        Seen::Open(ImageKind::Shmem, 7),
        Seen::Reply(Reply::Parent),
        Seen::Pages(0, 4, 600, 3),
        Seen::Close,
        Seen::Reply(Reply::Status),
    ];
    for wide in [false, true] {
        for piece in [1, 7, 4096, 1 << 22] {
            assert_eq!(merged(run(&dump(wide), piece).unwrap()), want, "wide {wide}, pieces of {piece}");
        }
    }
}

#[test]
fn large_runs_arrive_in_large_pieces() {
    let pieces: Vec<usize> = run(&dump(true), 4096)
        .unwrap()
        .iter()
        .filter_map(|s| if let Seen::Pages(_, _, n, 3) = s { Some(*n * 4096) } else { None })
        .collect();
    assert!(pieces[..pieces.len() - 1].iter().all(|n| *n >= WORTHWHILE), "{pieces:?}");
}

#[test]
fn a_dump_without_memory_just_closes() {
    for wide in [false, true] {
        assert_eq!(run(&header(wide, CMD_FORCE_CLOSE, 0, 0, 0), 64).unwrap(), [Seen::Reply(Reply::Status)]);
    }
}

#[test]
fn nonsense_is_refused() {
    let open = header(true, CMD_OPEN2, 0, 0, 1 << 8 | 1);
    for (bad, why) in [
        (header(true, CMD_OPEN2, 0, 0, 1 << 8 | 9), "unknown type"),
        (header(true, 77, 0, 0, 1), "unknown page server command"),
        ([open.clone(), header(true, add(4), 0, 0, 1 << 8 | 1)].concat(), "impossible run"),
        ([open.clone(), header(true, add(4), u64::MAX / 2, 0, 1 << 8 | 1)].concat(), "impossible run"),
        ([open.clone(), header(true, add(4), 1, u64::MAX - 4095, 1 << 8 | 1)].concat(), "impossible address"),
        ([open.clone(), header(true, add(4), 1, 1, 1 << 8 | 1)].concat(), "impossible address"),
        ([open, header(true, add(4), 1, 0, 2 << 8 | 1)].concat(), "not the open one"),
    ] {
        assert!(run(&bad, 1000).unwrap_err().to_string().contains(why), "{why}");
    }
}

fn serve(stream: Vec<u8>, sink: &mut PageSink<'_>) -> (PageServer, Vec<u8>) {
    let (mut server, criu) = PageServer::pair().unwrap();
    let criu = std::thread::spawn(move || {
        let mut criu = std::os::unix::net::UnixStream::from(criu);
        criu.write_all(&stream).unwrap();
        criu.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        criu.read_to_end(&mut answers).unwrap();
        answers
    });
    while !server.ended() {
        server.serve(sink);
    }
    let _ = shutdown(server.socket.as_raw_fd(), Shutdown::Write);
    (server, criu.join().unwrap())
}

#[test]
fn a_sink_that_fails_is_drained_and_criu_is_told() {
    let mut calls = 0;
    let (mut server, answers) = serve(dump(true), &mut |_| {
        calls += 1;
        bail!("the network went away")
    });
    assert_eq!(calls, 1);
    assert_eq!(answers, [0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(server.bytes(), 603 * 4096);
    assert_eq!(server.take_failure().unwrap().to_string(), "the network went away");
}

#[test]
fn a_good_transfer_is_answered_with_zero() {
    let (mut server, answers) = serve(dump(true), &mut |_| Ok(()));
    assert_eq!(answers, [0; 6]);
    assert!(server.take_failure().is_none());
}

#[test]
fn a_broken_transfer_cuts_the_answers_and_reads_on() {
    let (mut server, answers) =
        serve([header(true, 77, 0, 0, 1), vec![0; 3 << 20]].concat(), &mut |_| Ok(()));
    assert!(answers.is_empty());
    assert!(server.take_failure().unwrap().to_string().contains("unknown page server command"));
}
