//! The receiving end of CRIU's page server protocol, which a dump speaks on a unix socket pair (`ps.fd` in the RPC).
//!
//! CRIU sends, per memory image, OPEN2 and then one header per run of pages, each followed by the pages themselves; FORCE_CLOSE
//! ends the dump. It waits for one byte after OPEN2 (is there a parent image?) and for a status after FORCE_CLOSE; a status
//! other than 0 makes the dump fail, which resumes the tasks. Header (criu/page-xfer.c):
//!
//! ```text
//! up to 4.1.x   cmd u32 | pages u32           | vaddr u64 | image u64      24 bytes
//! from 4.2 on   cmd u32 | padding | pages u64 | vaddr u64 | image u64      32 bytes
//! ```
//!
//! [`Parser`] is pure: bytes in, events and replies out. It holds one fixed buffer whatever the size of the memory.
//! [`PageServer`] puts it on a socket. Where the pages go is the caller's business.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Error, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, setsockopt, shutdown, socketpair,
    sockopt,
};

/// Bytes that wait at most in our memory; events carry up to this much.
pub const BUFFER: usize = 1 << 20;
/// An event is held back until it has at least this much (or its run is complete), so that pages travel in large pieces.
const WORTHWHILE: usize = 256 << 10;
/// No single run of pages is larger than this (a quarter of the x86-64 user address space).
const RUN_CAP: u64 = 1 << 45;

/// `PE_PARENT`: the pages are in the parent image.
pub const PE_PARENT: u32 = 1;
/// `PE_LAZY`: the pages may be restored lazily.
pub const PE_LAZY: u32 = 2;
/// `PE_PRESENT`: the pages' bytes are in the image.
pub const PE_PRESENT: u32 = 4;

/// Which memory an image describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum ImageKind {
    /// A task's address space; the id is its pid in the container.
    Pid,
    /// A piece of shared memory; the id is CRIU's `shmid`.
    Shmem,
}

/// What a dump's memory is made of, in the order in which an image holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEvent<'a> {
    /// A new image begins; what follows belongs to it.
    Open {
        /// Which memory.
        kind: ImageKind,
        /// Which task or segment.
        id: u64,
    },
    /// Whole pages from `vaddr` on. One run of pages may arrive in several of these.
    Pages {
        /// Address of the first byte (offset in the segment for [`ImageKind::Shmem`]).
        vaddr: u64,
        /// `PE_PRESENT`, maybe with `PE_LAZY`.
        flags: u32,
        /// A multiple of the page size.
        bytes: &'a [u8],
    },
    /// Pages without bytes: in the parent image, or lazy.
    Hole {
        /// Address of the first byte.
        vaddr: u64,
        /// How many pages.
        pages: u64,
        /// `PE_PARENT` or `PE_LAZY`.
        flags: u32,
    },
    /// The image that was open is complete.
    Close,
    /// Nothing came for a while (see [`super::dump`]): time for a sign of life to whoever waits.
    Idle,
}

/// Where the events go.
pub type PageSink<'s> = dyn FnMut(PageEvent<'_>) -> Result<()> + 's;

const CMD_OPEN: u32 = 3;
const CMD_ADD: u32 = 1;
const CMD_HOLE: u32 = 2;
const CMD_OPEN2: u32 = 4;
const CMD_PARENT: u32 = 5;
const CMD_ADD_FLAGS: u32 = 6;
const CMD_CLOSE: u32 = 0x1023;
const CMD_FORCE_CLOSE: u32 = 0x1024;

const TYPE_PID: u64 = 1;
const TYPE_SHMEM: u64 = 2;

/// What CRIU waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// One byte: is there a parent image?
    Parent,
    /// An `int`: the same.
    ParentInt,
    /// An `int`: the status of the whole transfer. The dump's pages are complete.
    Status,
}

/// What one step of the parser gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// To the sink.
    Event(PageEvent<'a>),
    /// To CRIU.
    Reply(Reply),
}

#[derive(Clone, Copy)]
enum State {
    Header,
    Data { vaddr: u64, left: u64, flags: u32 },
    Replying(Reply),
}

/// The protocol without the socket.
pub struct Parser {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    /// 24 or 32; told by the first header.
    header: Option<usize>,
    image: Option<u64>,
    page_size: u64,
}

impl Parser {
    /// A parser for this page size (that of the dumped machine).
    pub fn new(page_size: usize) -> Self {
        let buf = vec![0; BUFFER].into_boxed_slice();
        Self {
            buf,
            start: 0,
            end: 0,
            state: State::Header,
            header: None,
            image: None,
            page_size: page_size as u64,
        }
    }

    /// Where to put the next bytes. Never empty once [`Parser::step`] has returned `None`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buf[self.end..]
    }

    /// So many bytes have been put into [`Parser::space`].
    pub fn filled(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.buf.len());
    }

    /// The next event or reply; `None` when more bytes are needed.
    pub fn step(&mut self) -> Result<Option<Step<'_>>> {
        match self.state {
            State::Replying(reply) => {
                self.state = State::Header;
                Ok(Some(Step::Reply(reply)))
            }
            State::Data { vaddr, left, flags } => Ok(self.data(vaddr, left, flags)),
            State::Header => self.header(),
        }
    }

    fn data(&mut self, vaddr: u64, left: u64, flags: u32) -> Option<Step<'_>> {
        let here = (self.end - self.start) as u64;
        let take = here.min(left) / self.page_size * self.page_size;
        if take == 0 || (take < left && take < WORTHWHILE as u64) {
            return None;
        }
        let from = self.start;
        self.start += take as usize;
        self.state = match left - take {
            0 => State::Header,
            left => State::Data { vaddr: vaddr + take, left, flags },
        };
        Some(Step::Event(PageEvent::Pages { vaddr, flags, bytes: &self.buf[from..from + take as usize] }))
    }

    fn header(&mut self) -> Result<Option<Step<'_>>> {
        let have = &self.buf[self.start..self.end];
        let size = match self.header {
            Some(size) => size,
            None if have.len() < 24 => return Ok(None),
            // The first header names no pages and no address: with the wide form these bytes are the address and so 0, with the
            // narrow one they are the image's number, whose type is never 0. (A dump without any memory closes at once with
            // nothing but zeros; its first 24 bytes are all that is looked at.)
            None => *self.header.insert(if have[16..24] == [0; 8] { 32 } else { 24 }),
        };
        let closing_at_once = self.image.is_none() && have.len() >= 24 && u32_at(have, 0) == CMD_FORCE_CLOSE;
        if have.len() < size && !closing_at_once {
            return Ok(None);
        }
        let raw = u32_at(have, 0);
        let (cmd, flags) =
            if matches!(raw, CMD_CLOSE | CMD_FORCE_CLOSE) { (raw, 0) } else { (raw & 0xffff, raw >> 16) };
        let (pages, vaddr, image) = match size {
            _ if closing_at_once => (0, 0, 0),
            24 => (u64::from(u32_at(have, 4)), u64_at(have, 8), u64_at(have, 16)),
            _ => (u64_at(have, 8), u64_at(have, 16), u64_at(have, 24)),
        };
        self.start += size.min(have.len());
        match cmd {
            CMD_OPEN | CMD_OPEN2 => {
                if self.image.take().is_some() {
                    // The image before is complete; the same header is read again for its own sake.
                    self.start -= size;
                    return Ok(Some(Step::Event(PageEvent::Close)));
                }
                let (kind, id) = decode_image(image)?;
                self.image = Some(image);
                if cmd == CMD_OPEN2 {
                    self.state = State::Replying(Reply::Parent);
                }
                Ok(Some(Step::Event(PageEvent::Open { kind, id })))
            }
            CMD_PARENT => Ok(Some(Step::Reply(Reply::ParentInt))),
            CMD_ADD | CMD_ADD_FLAGS | CMD_HOLE => {
                let flags = match cmd {
                    CMD_ADD => PE_PRESENT,
                    CMD_HOLE => PE_PARENT,
                    _ => flags,
                };
                ensure!(
                    self.image == Some(image),
                    "CRIU sends pages of image {image:#x}, which is not the open one"
                );
                let left = pages.checked_mul(self.page_size).filter(|n| *n > 0 && *n <= RUN_CAP);
                let left = left.with_context(|| format!("CRIU sends an impossible run of {pages} pages"))?;
                ensure!(
                    vaddr.is_multiple_of(self.page_size) && vaddr.checked_add(left).is_some(),
                    "CRIU sends pages at an impossible address {vaddr:#x}"
                );
                if flags & PE_PRESENT == 0 {
                    return Ok(Some(Step::Event(PageEvent::Hole { vaddr, pages, flags })));
                }
                self.state = State::Data { vaddr, left, flags };
                Ok(self.data(vaddr, left, flags))
            }
            CMD_CLOSE | CMD_FORCE_CLOSE => {
                if self.image.take().is_some() {
                    self.state = State::Replying(Reply::Status);
                    return Ok(Some(Step::Event(PageEvent::Close)));
                }
                Ok(Some(Step::Reply(Reply::Status)))
            }
            _ => bail!("CRIU sends an unknown page server command {raw:#x}"),
        }
    }

    fn discard(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

fn decode_image(image: u64) -> Result<(ImageKind, u64)> {
    let kind = match image & 0xff {
        TYPE_PID => ImageKind::Pid,
        TYPE_SHMEM => ImageKind::Shmem,
        other => bail!("CRIU opens a memory image of unknown type {other}"),
    };
    Ok((kind, image >> 8))
}

/// The socket's end of a page server for one dump.
pub struct PageServer {
    socket: OwnedFd,
    parser: Parser,
    /// The first failure; from then on everything that CRIU sends is thrown away and it is told at its end.
    failed: Option<Error>,
    /// The protocol was left: CRIU has been cut off from answers.
    broken: bool,
    ended: bool,
    bytes: u64,
    /// What CRIU is told about parent images: all clean pages are in them.
    pub parent: bool,
}

impl PageServer {
    /// A server, and the socket to give to CRIU.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .context("making the page server's socket pair")?;
        // Deep enough that CRIU and we seldom wait for each other; without CAP_NET_ADMIN the system's limit has to do.
        if setsockopt(&theirs, sockopt::SndBufForce, &(2 * BUFFER)).is_err() {
            let _ = setsockopt(&theirs, sockopt::SndBuf, &(2 * BUFFER));
        }
        let parser = Parser::new(page_size());
        Ok((
            Self { socket: ours, parser, failed: None, broken: false, ended: false, bytes: 0, parent: false },
            theirs,
        ))
    }

    /// Reads once and passes on what is complete. To be called when the socket is readable.
    pub fn serve(&mut self, sink: &mut PageSink<'_>) {
        match recv(self.socket.as_raw_fd(), self.parser.space(), MsgFlags::empty()) {
            Err(Errno::EINTR) => return,
            Ok(n) if n > 0 => self.parser.filled(n),
            end => {
                self.ended = true;
                if let Err(e) = end {
                    self.fail(Error::from(e).context("reading pages from CRIU"));
                }
                return;
            }
        }
        if self.broken {
            return self.parser.discard();
        }
        loop {
            let failure = match self.parser.step() {
                Ok(None) => return,
                Ok(Some(Step::Event(event))) => {
                    if let PageEvent::Pages { bytes, .. } = event {
                        self.bytes += bytes.len() as u64;
                    }
                    // After a failure the rest of the dump is drained: CRIU is never stopped in the middle.
                    match self.failed {
                        None => sink(event).err(),
                        Some(_) => None,
                    }
                }
                Ok(Some(Step::Reply(reply))) => {
                    let status = i32::from(self.failed.is_some());
                    self.ended |= reply == Reply::Status;
                    let sent = match reply {
                        Reply::Parent => {
                            send(self.socket.as_raw_fd(), &[self.parent.into()], MsgFlags::MSG_NOSIGNAL)
                        }
                        Reply::ParentInt => send(
                            self.socket.as_raw_fd(),
                            &i32::from(self.parent).to_ne_bytes(),
                            MsgFlags::MSG_NOSIGNAL,
                        ),
                        // Minus one on failure, CRIU's own value.
                        Reply::Status => {
                            send(self.socket.as_raw_fd(), &(-status).to_ne_bytes(), MsgFlags::MSG_NOSIGNAL)
                        }
                    };
                    sent.err().map(|e| Error::from(e).context("answering CRIU's page transfer"))
                }
                Err(e) => {
                    // Out of step: CRIU reads EOF where it wants an answer, fails and resumes the tasks, while we go on reading.
                    self.broken = true;
                    let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
                    self.parser.discard();
                    self.fail(e);
                    return;
                }
            };
            if let Some(e) = failure {
                self.fail(e);
            }
        }
    }

    /// Nothing came for a while: tells the sink, unless it has failed already.
    pub fn idle(&mut self, sink: &mut PageSink<'_>) {
        if self.failed.is_none()
            && let Err(e) = sink(PageEvent::Idle)
        {
            self.fail(e);
        }
    }

    /// Something went wrong beside: the rest is drained, and CRIU told at its end.
    pub fn fail(&mut self, e: Error) {
        self.failed.get_or_insert(e);
    }

    /// CRIU has closed its end, or said that everything was sent.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Bytes of pages received.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first failure, if there was one.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }
}

impl AsFd for PageServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// This machine's page size, bytes.
pub fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let n = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(n).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

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
            assert_eq!(
                run(&header(wide, CMD_FORCE_CLOSE, 0, 0, 0), 64).unwrap(),
                [Seen::Reply(Reply::Status)]
            );
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
            (
                [open.clone(), header(true, add(4), 1, u64::MAX - 4095, 1 << 8 | 1)].concat(),
                "impossible address",
            ),
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
}
