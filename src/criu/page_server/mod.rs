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

mod parser;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Error, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, setsockopt, shutdown, socketpair,
    sockopt,
};

pub use parser::{Parser, Reply, Step};

/// Bytes that wait at most in our memory; events carry up to this much.
pub const BUFFER: usize = 1 << 20;

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
