//! A TLS connection as bytes: rustls' unbuffered interface over a blocking TCP socket, made for bulk data.
//!
//! rustls' own stream reads a few kilobytes in each system call and sends record by record. Here a read takes whatever the
//! socket has, up to a quarter of a megabyte, and is decrypted where it lies; what is sent is encrypted in full records and
//! handed to the socket in pieces of that size. Frames are [`super::wire`]'s business, certificates [`crate::tls`]'s.
//! Here: the buffers and the socket; what rustls wants done next is told by [`step`].

mod step;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, CommonState, ServerConfig};

use super::wire::Transport;
use step::{Ask, Step, settle};

/// Plain bytes of a full record.
const RECORD: usize = 16 << 10;
/// Bytes that are encrypted before they are sent: they stay in the second-level cache.
const PIECE: usize = 8 * RECORD;
/// Bytes that are received at once.
const RECEIVE: usize = 256 << 10;
/// A record with its header and padding.
const MAX_RECORD: usize = RECORD + 512;
/// Bytes that are received and kept while we are sending, so that two sides that both send do not wait for each other.
const HELD: usize = 4 << 20;
/// What is said of a connection that had its deadline.
const OUT_OF_TIME: &str = "it took too long";
/// With low latency: bytes in the socket that TCP has not sent yet.
const LOW_WATER: libc::c_int = 64 << 10;

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// A connection after its handshake.
pub(super) struct TlsIo {
    side: Side,
    tcp: TcpStream,
    silence: Duration,
    /// Received and not yet decrypted: `incoming[start..end]`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// Decrypted and not yet read: `plain[plain_at..]`.
    plain: Vec<u8>,
    plain_at: usize,
    /// Not yet encrypted, less than a record.
    pending: Vec<u8>,
    /// Encrypted and not yet sent: `out[..out_len]`.
    out: Vec<u8>,
    out_len: usize,
    ended: bool,
    /// Until when everything has to be over, whatever comes.
    deadline: Option<Instant>,
    /// TCP's end, with or without TLS'.
    eof: bool,
}

impl TlsIo {
    /// Handshake as the client; the socket's timeouts are `silence`. All of it must be over by `deadline`, which stays until it is
    /// changed ([`Transport::deadline`]).
    pub(super) fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        silence: Duration,
        deadline: Instant,
    ) -> io::Result<TlsIo> {
        let conn = UnbufferedClientConnection::new(config, name).map_err(tls)?;
        TlsIo::shake(Side::Client(Box::new(conn)), tcp, silence, deadline)
    }

    /// Handshake as the server, in the same way.
    pub(super) fn accept(
        tcp: TcpStream,
        config: Arc<ServerConfig>,
        silence: Duration,
        deadline: Instant,
    ) -> io::Result<TlsIo> {
        let conn = UnbufferedServerConnection::new(config).map_err(tls)?;
        TlsIo::shake(Side::Server(Box::new(conn)), tcp, silence, deadline)
    }

    fn shake(side: Side, tcp: TcpStream, silence: Duration, deadline: Instant) -> io::Result<TlsIo> {
        let mut io = TlsIo {
            side,
            tcp,
            silence,
            incoming: vec![0; RECEIVE],
            start: 0,
            end: 0,
            plain: Vec::new(),
            plain_at: 0,
            pending: Vec::with_capacity(RECORD),
            out: vec![0; PIECE + PIECE / 8],
            out_len: 0,
            ended: false,
            deadline: Some(deadline),
            eof: false,
        };
        while io.common().is_handshaking() {
            match io.step(Ask::Nothing, &mut [], &mut 0) {
                Ok(Step::Transmit) => io.send_out()?,
                Ok(Step::Blocked) => io.fill(true)?,
                Ok(Step::Progress | Step::Open) => {}
                Ok(Step::Ended | Step::Over) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(e) => {
                    io.say_why();
                    return Err(e);
                }
            }
        }
        // the client's last message is made with the handshake's end, and goes now
        while matches!(io.step(Ask::Nothing, &mut [], &mut 0)?, Step::Transmit | Step::Progress) {
            io.send_out()?;
        }
        io.send_out()?;
        Ok(io)
    }

    /// What the handshake agreed on, and whom with.
    pub(super) fn common(&self) -> &CommonState {
        match &self.side {
            Side::Client(c) => c,
            Side::Server(c) => c,
        }
    }

    /// The alert that belongs to an error, if it can be sent.
    fn say_why(&mut self) {
        self.out_len = 0;
        for _ in 0..4 {
            if self.step(Ask::Nothing, &mut [], &mut 0).is_err() {
                break;
            }
        }
        self.send_out().ok();
    }

    /// Deals with what was received, up to the next thing that the caller must know. Plain bytes go to `dst[got..]`, and what
    /// does not fit there to `plain`.
    fn step(&mut self, ask: Ask<'_>, dst: &mut [u8], got: &mut usize) -> io::Result<Step> {
        let TlsIo { side, incoming, start, end, plain, out, out_len, .. } = self;
        let bytes = &mut incoming[*start..*end];
        let mut take = |payload: &[u8]| {
            let n = payload.len().min(dst.len() - *got);
            dst[*got..*got + n].copy_from_slice(&payload[..n]);
            *got += n;
            plain.extend_from_slice(&payload[n..]);
        };
        let (discard, step) = match side {
            Side::Client(c) => settle(c.process_tls_records(bytes), ask, out, out_len, &mut take),
            Side::Server(c) => settle(c.process_tls_records(bytes), ask, out, out_len, &mut take),
        };
        *start += discard;
        let step = step.map_err(tls)?;
        self.ended |= matches!(step, Step::Ended | Step::Over);
        Ok(step)
    }

    /// How long the next wait may be.
    fn patience(&self) -> io::Result<Duration> {
        let Some(deadline) = self.deadline else { return Ok(self.silence) };
        match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::Error::new(io::ErrorKind::TimedOut, OUT_OF_TIME)),
            left => Ok(left.min(self.silence)),
        }
    }

    /// Receives what the socket has; if nothing, waits for it or says `WouldBlock`.
    fn fill(&mut self, wait: bool) -> io::Result<()> {
        if self.eof {
            // rustls' word for a connection that was cut without a close_notify
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.incoming.truncate(RECEIVE);
        } else if self.incoming.len() - self.end < MAX_RECORD {
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let want = self.end + MAX_RECORD;
            self.incoming.resize(self.incoming.len().max(want), 0);
        }
        if wait && self.deadline.is_some() {
            let patience = self.patience()?;
            self.tcp.set_read_timeout(Some(patience))?;
        }
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        let n = loop {
            match recv(self.tcp.as_raw_fd(), &mut self.incoming[self.end..], flags) {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        self.eof = n == 0;
        self.end += n;
        Ok(())
    }

    fn receive(&mut self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        if self.plain_at < self.plain.len() {
            let n = buf.len().min(self.plain.len() - self.plain_at);
            buf[..n].copy_from_slice(&self.plain[self.plain_at..self.plain_at + n]);
            self.plain_at += n;
            return Ok(n);
        }
        self.plain.clear();
        self.plain_at = 0;
        let mut got = 0;
        while got < buf.len() && !self.ended {
            match self.step(Ask::Nothing, buf, &mut got)? {
                Step::Progress => {}
                // a key update of the peer wants an answer
                Step::Transmit => self.send_out()?,
                Step::Open | Step::Blocked if got > 0 => break,
                Step::Open | Step::Blocked => self.fill(wait)?,
                Step::Ended | Step::Over => {}
            }
        }
        Ok(got)
    }

    /// Encrypts what is asked, behind what stands in `out`.
    fn encrypt(&mut self, ask: Ask<'_>) -> io::Result<()> {
        loop {
            match self.step(ask, &mut [], &mut 0)? {
                Step::Open => return Ok(()),
                Step::Progress => {}
                Step::Transmit => self.send_out()?,
                // we may still send when the peer has said its last word
                Step::Ended => {}
                Step::Over => return Err(io::ErrorKind::BrokenPipe.into()),
                Step::Blocked => return Err(io::Error::other("the handshake is not over")),
            }
        }
    }

    fn encrypt_pending(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        let result = self.encrypt(Ask::Encrypt(&pending));
        self.pending = pending;
        self.pending.clear();
        result
    }

    /// Hands everything that is encrypted to the socket. While that waits, what the peer sends is taken in.
    fn send_out(&mut self) -> io::Result<()> {
        let mut at = 0;
        while at < self.out_len {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.tcp.as_raw_fd(), &self.out[at..self.out_len], flags) {
                Ok(n) => at += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait_for_room()?,
                Err(e) => return Err(e.into()),
            }
        }
        self.out_len = 0;
        Ok(())
    }

    fn wait_for_room(&mut self) -> io::Result<()> {
        let held = self.end - self.start + self.plain.len() - self.plain_at;
        let hold = held < HELD && !self.eof;
        let reading = if hold { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(self.tcp.as_fd(), PollFlags::POLLOUT | reading)];
        match poll(&mut fds, PollTimeout::try_from(self.patience()?).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = fds[0].revents().unwrap_or(PollFlags::empty());
        if hold && ready.contains(PollFlags::POLLIN) {
            if self.incoming.len() - self.end < MAX_RECORD && self.start < MAX_RECORD {
                self.incoming.resize(self.incoming.len() + RECEIVE, 0);
            }
            match self.fill(false) {
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

fn tls(e: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

impl Read for TlsIo {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf, true)
    }
}

impl Write for TlsIo {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // full records, as long as there is enough: small writes join, and only the ends of large ones are copied
        let (mut at, room) = (0, RECORD - self.pending.len());
        if !self.pending.is_empty() || buf.len() < RECORD {
            at = buf.len().min(room);
            self.pending.extend_from_slice(&buf[..at]);
            if self.pending.len() == RECORD {
                self.encrypt_pending()?;
            }
        }
        while buf.len() - at >= RECORD {
            let n = (buf.len() - at).min(PIECE) / RECORD * RECORD;
            self.encrypt(Ask::Encrypt(&buf[at..at + n]))?;
            at += n;
            if self.out_len >= PIECE {
                self.send_out()?;
            }
        }
        self.pending.extend_from_slice(&buf[at..]);
        if self.out_len >= PIECE {
            self.send_out()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encrypt_pending()?;
        self.send_out()
    }
}

impl Transport for TlsIo {
    fn finish(&mut self) -> io::Result<()> {
        self.encrypt_pending()?;
        self.encrypt(Ask::Close)?;
        self.send_out()?;
        self.tcp.shutdown(Shutdown::Write)
    }

    fn protects(&self) -> bool {
        true
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf, false)
    }

    fn fd(&self) -> RawFd {
        self.tcp.as_raw_fd()
    }

    fn deadline(&mut self, at: Option<Instant>) -> io::Result<()> {
        self.deadline = at;
        if at.is_none() {
            self.tcp.set_read_timeout(Some(self.silence))?;
        }
        Ok(())
    }

    fn low_latency(&mut self, on: bool) -> io::Result<()> {
        // 0: what the system says (tcp_notsent_lowat), which is no limit
        let bytes: libc::c_int = if on { LOW_WATER } else { 0 };
        // SAFETY: the descriptor is open, and the value is an int that lives through the call.
        let rc = unsafe {
            libc::setsockopt(
                self.tcp.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_NOTSENT_LOWAT,
                (&raw const bytes).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
