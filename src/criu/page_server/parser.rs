//! The protocol without the socket. Pure: bytes in, events and replies out.

use anyhow::{Context, Result, bail, ensure};

use super::{BUFFER, ImageKind, PE_PARENT, PE_PRESENT, PageEvent};

/// An event is held back until it has at least this much (or its run is complete), so that pages travel in large pieces.
pub(super) const WORTHWHILE: usize = 256 << 10;
/// No single run of pages is larger than this (a quarter of the x86-64 user address space).
const RUN_CAP: u64 = 1 << 45;

const CMD_OPEN: u32 = 3;
const CMD_ADD: u32 = 1;
const CMD_HOLE: u32 = 2;
pub(super) const CMD_OPEN2: u32 = 4;
const CMD_PARENT: u32 = 5;
pub(super) const CMD_ADD_FLAGS: u32 = 6;
const CMD_CLOSE: u32 = 0x1023;
pub(super) const CMD_FORCE_CLOSE: u32 = 0x1024;

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

    pub(super) fn discard(&mut self) {
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
