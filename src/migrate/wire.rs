//! A blocking connection (or file) that sends and receives frames, with a deadline by silence.
//!
//! The data plane runs in a thread of its own, so plain blocking I/O serves: deadlines are the socket's own
//! timeouts, which follow progress (silence for N seconds ends a phase, never the total duration). The side that
//! works without sending says [`Wire::alive`] now and then.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState, ServerConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec::{self, CodecError, Decoder, Kind};
use super::protocol::Failure;
use super::tls_io::TlsIo;
use crate::tls::config::trust_problem;

/// The shortest silence that a side may go by ([`crate::agent::config::Config::silence`]).
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);

/// The connection to the peer is lost: broken, closed or silent.
#[derive(Debug)]
pub struct Lost(String);

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lost {}

/// How long a handshake may take in all, however its bytes come.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// A handshake's error: about certificates, or a connection that was lost.
fn handshake(error: io::Error) -> anyhow::Error {
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(tls) => match trust_problem(tls) {
            Some(problem) => anyhow::Error::from(error).context(problem),
            None => error.into(),
        },
        None => Lost(format!("the connection to the peer broke: {error}")).into(),
    }
}

/// Where frames go: a connection or a checkpoint file.
pub trait FrameSink {
    /// Sends one frame whose payload is the concatenation of `parts`.
    fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<()>;

    /// Sends `message` as a JSON frame.
    fn json<M: Serialize>(&mut self, kind: Kind, message: &M) -> Result<()>
    where
        Self: Sized,
    {
        self.frame(kind, &[&serde_json::to_vec(message)?])
    }
}

/// Bytes both ways, and an orderly end.
pub trait Transport: Read + Write + Send {
    /// Says that nothing more will be sent (TLS close_notify, TCP FIN).
    fn finish(&mut self) -> io::Result<()>;

    /// Whether it encrypts, notices every changed byte, and collects small writes by itself.
    fn protects(&self) -> bool {
        false
    }

    /// Reads what is there; `WouldBlock` if nothing is.
    fn try_read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The descriptor to poll; -1 if there is none.
    fn fd(&self) -> RawFd {
        -1
    }

    /// See [`Wire::deadline`].
    fn deadline(&mut self, _at: Option<Instant>) -> io::Result<()> {
        Ok(())
    }

    /// See [`Wire::low_latency`].
    fn low_latency(&mut self, _on: bool) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for UnixStream {
    fn finish(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use nix::sys::socket::{MsgFlags, recv};
        Ok(recv(self.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT)?)
    }

    fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }
}

/// Frames over a [`Transport`].
pub struct Wire {
    io: io::BufWriter<Box<dyn Transport>>,
    decoder: Decoder,
    protected: bool,
    silence: Duration,
    last_sent: Instant,
    sent: u64,
    received: u64,
}

impl Wire {
    /// Takes over a transport whose own timeouts are `silence`.
    pub fn new(io: Box<dyn Transport>, silence: Duration) -> Wire {
        let protected = io.protects();
        let room = if protected { 0 } else { 64 << 10 };
        let io = io::BufWriter::with_capacity(room, io);
        let decoder = Decoder::new(protected);
        Wire { io, decoder, protected, silence, last_sent: Instant::now(), sent: 0, received: 0 }
    }

    /// TLS 1.3 as the client.
    ///
    /// # Errors
    /// The handshake failed (another CA, no certificate, wrong name) or was not over within [`HANDSHAKE_LIMIT`].
    pub fn connect(tcp: TcpStream, config: Arc<ClientConfig>, name: &str, silence: Duration) -> Result<Wire> {
        timeouts(&tcp, silence)?;
        let name = ServerName::try_from(name.to_owned()).context("server name")?;
        let tls = TlsIo::connect(tcp, config, name, silence, Instant::now() + HANDSHAKE_LIMIT)
            .map_err(handshake)
            .context("TLS handshake with the destination")?;
        let mut wire = Wire::new(Box::new(tls), silence);
        wire.deadline(None)?;
        Ok(wire)
    }

    /// TLS 1.3 as the server. What the handshake says of the peer (its certificate) is given to `check` before anything
    /// else happens. The deadline stays until it is changed: a peer that was let into the handshake is not yet welcome.
    ///
    /// # Errors
    /// The handshake failed (another CA, no certificate), was not over by the deadline, or `check` refused the peer.
    pub fn accept(
        tcp: TcpStream,
        config: Arc<ServerConfig>,
        silence: Duration,
        deadline: Instant,
        check: impl FnOnce(&CommonState) -> Result<()>,
    ) -> Result<Wire> {
        timeouts(&tcp, silence)?;
        let tls = TlsIo::accept(tcp, config, silence, deadline)
            .map_err(handshake)
            .context("TLS handshake with the source")?;
        check(tls.common())?;
        Ok(Wire::new(Box::new(tls), silence))
    }

    /// Nothing is waited for any longer than this, whatever comes; `None`: silence alone ends the connection.
    pub fn deadline(&mut self, at: Option<Instant>) -> Result<()> {
        self.io.get_mut().deadline(at).context("socket options")
    }

    /// Sends what is buffered.
    pub fn flush(&mut self) -> Result<()> {
        self.io.flush().map_err(|e| self.lost(e))
    }

    /// A sign of life, if nothing was sent for a fifth of the deadline. The peer may go by one of its own: the shortest counts.
    pub fn alive(&mut self) -> Result<()> {
        if self.last_sent.elapsed() > self.silence.min(SHORTEST_SILENCE) / 5 {
            self.frame(Kind::Heartbeat, &[])?;
            self.flush()?;
        }
        Ok(())
    }

    /// Flushes, then waits for the next frame that is no heartbeat.
    ///
    /// # Errors
    /// The peer was silent too long, the connection broke, or the bytes are no frame.
    pub fn recv(&mut self) -> Result<Kind> {
        self.flush()?;
        loop {
            let io = self.io.get_mut();
            let kind = self.decoder.next(&mut |buf| io.read(buf)).map_err(|e| self.broken(e))?;
            if self.arrived(kind) {
                return Ok(kind);
            }
        }
    }

    /// The next frame that is no heartbeat, if one is there as a whole; never waits, and flushes nothing. Parts of a frame are
    /// kept for the next call. Bytes that were received are not seen by a poll of [`Wire::fd`]: call this until it says
    /// none, then poll. Silence is the caller's to notice.
    ///
    /// # Errors
    /// As [`Wire::recv`], but for silence. A checkpoint file cannot do this.
    pub fn try_recv(&mut self) -> Result<Option<Kind>> {
        loop {
            let io = self.io.get_mut();
            match self.decoder.next(&mut |buf| io.try_read(buf)) {
                Ok(kind) if self.arrived(kind) => return Ok(Some(kind)),
                Ok(_) => {}
                Err(CodecError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(self.broken(e)),
            }
        }
    }

    /// The descriptor to poll for input; -1 for a checkpoint file.
    pub fn fd(&self) -> RawFd {
        self.io.get_ref().fd()
    }

    /// On: little of what is sent waits in the socket, so that what is sent next (the answer to a page fault) does not stand
    /// in line behind megabytes. A sender then wakes up more often: off for bulk.
    pub fn low_latency(&mut self, on: bool) {
        if let Err(e) = self.io.get_mut().low_latency(on) {
            log::warn!("the connection's send buffer stays as it is: {e}");
        }
    }

    /// Counts a frame; whether it is one that the caller wants to see.
    fn arrived(&mut self, kind: Kind) -> bool {
        self.received += (codec::HEADER_LEN + self.decoder.payload().len()) as u64;
        kind != Kind::Heartbeat
    }

    fn broken(&self, e: CodecError) -> anyhow::Error {
        match e {
            CodecError::Io(e) => self.lost(e),
            CodecError::Truncated { .. } => Lost(format!("the peer closed the connection: {e}")).into(),
            e => anyhow!("the peer sent something that is no frame: {e}"),
        }
    }

    /// What follows the last frame, to the end: how many bytes. There is no frame after it; only for a file.
    pub fn rest(&mut self) -> io::Result<u64> {
        io::copy(self.io.get_mut(), &mut io::sink())
    }

    /// The payload of the frame that [`Wire::recv`] or [`Wire::try_recv`] returned last.
    pub fn payload(&self) -> &[u8] {
        self.decoder.payload()
    }

    /// The same, to keep (for another thread); `spare` is memory to receive into, best that of an earlier payload.
    pub fn take_payload(&mut self, spare: Vec<u8>) -> Vec<u8> {
        self.decoder.take(spare)
    }

    /// The payload read as JSON.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M> {
        serde_json::from_slice(self.payload()).context("a message of the peer")
    }

    /// Waits for a frame of this kind; a [`Failure`] of the peer becomes this call's error.
    pub fn expect<M: DeserializeOwned>(&mut self, kind: Kind) -> Result<M> {
        match self.recv()? {
            k if k == kind => self.message(),
            Kind::Failed => Err(self.message::<Failure>()?.into()),
            k => bail!("the peer sent {k:?} where {kind:?} was due"),
        }
    }

    /// Says why, then waits (a few seconds at most) until the peer has read it.
    pub fn fail(&mut self, failure: &Failure) {
        let until = Instant::now() + Duration::from_secs(5);
        let said = self.deadline(Some(until)).and_then(|()| self.json(Kind::Failed, failure));
        let said = said.and_then(|()| self.flush());
        if said.is_ok() && self.io.get_mut().finish().is_ok() {
            // closing with unread bytes would reset the connection, and the peer would never see the reason
            let mut waste = vec![0; 64 << 10];
            while Instant::now() < until && matches!(self.io.get_mut().read(&mut waste), Ok(1..)) {}
        }
    }

    /// After a failed send: the peer's own reason, if it said one before it hung up.
    pub fn reason(&mut self) -> Option<Failure> {
        let io = self.io.get_mut();
        while let Ok(kind) = self.decoder.next(&mut |buf| io.read(buf)) {
            if kind == Kind::Failed {
                return serde_json::from_slice(self.decoder.payload()).ok();
            }
        }
        None
    }

    /// The orderly end of the connection.
    pub fn close(&mut self) -> Result<()> {
        self.flush()?;
        self.io.get_mut().finish().context("closing the connection")
    }

    /// Bytes of frames sent and received so far (before encryption).
    pub fn bytes(&self) -> (u64, u64) {
        (self.sent, self.received)
    }

    fn lost(&self, e: io::Error) -> anyhow::Error {
        // the server's verdict on a certificate comes after the client's end of the handshake
        if let Some(problem) = e.get_ref().and_then(|e| e.downcast_ref()).and_then(trust_problem) {
            return Lost(problem).into();
        }
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Lost(format!("the peer was silent for {} s", self.silence.as_secs())).into()
            }
            // no connection ends like this, only a checkpoint file
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                anyhow!("writing the checkpoint file: {e}")
            }
            _ => Lost(format!("the connection to the peer broke: {e}")).into(),
        }
    }
}

impl FrameSink for Wire {
    fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<()> {
        codec::write(&mut self.io, kind, parts, self.protected).map_err(|e| self.lost(e))?;
        self.last_sent = Instant::now();
        self.sent += codec::HEADER_LEN as u64 + parts.iter().map(|p| p.len() as u64).sum::<u64>();
        Ok(())
    }
}

fn timeouts(tcp: &TcpStream, silence: Duration) -> Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(silence))?;
    tcp.set_write_timeout(Some(silence))?;
    // rustls must not see a non-blocking socket that an async runtime left behind
    tcp.set_nonblocking(false).context("socket options")
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
