//! A blocking connection (or file) that sends and receives frames, with a deadline by silence.
//!
//! The data plane runs in a thread of its own, so plain blocking I/O serves: deadlines are the socket's own
//! timeouts, which follow progress (silence for N seconds ends a phase, never the total duration). The side that
//! works without sending says [`Wire::alive`] now and then.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec::{self, CodecError, Kind};
use super::protocol::Failure;

/// The connection to the peer is lost: broken, closed or silent.
#[derive(Debug)]
pub struct Lost(String);

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lost {}

/// A handshake's error: about certificates, or a connection that was lost.
fn handshake(error: io::Error) -> anyhow::Error {
    match error.get_ref().is_some_and(|e| e.is::<rustls::Error>()) {
        true => error.into(),
        false => Lost(format!("the connection to the peer broke: {error}")).into(),
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
}

impl Transport for StreamOwned<ClientConnection, TcpStream> {
    fn finish(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()?;
        self.sock.shutdown(Shutdown::Write)
    }
}

impl Transport for StreamOwned<ServerConnection, TcpStream> {
    fn finish(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()?;
        self.sock.shutdown(Shutdown::Write)
    }
}

impl Transport for std::os::unix::net::UnixStream {
    fn finish(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Frames over a [`Transport`].
pub struct Wire {
    io: io::BufWriter<Box<dyn Transport>>,
    payload: Vec<u8>,
    silence: Duration,
    last_sent: Instant,
    sent: u64,
    received: u64,
}

impl Wire {
    /// Takes over a transport whose own timeouts are `silence`.
    pub fn new(io: Box<dyn Transport>, silence: Duration) -> Wire {
        let io = io::BufWriter::with_capacity(64 << 10, io);
        Wire { io, payload: Vec::new(), silence, last_sent: Instant::now(), sent: 0, received: 0 }
    }

    /// TLS 1.3 as the client; returns the peer's certificate chain (verified) beside the connection.
    ///
    /// # Errors
    /// The handshake failed (another CA, no certificate, wrong name) or timed out.
    pub fn connect(tcp: TcpStream, config: Arc<ClientConfig>, name: &str, silence: Duration) -> Result<Wire> {
        timeouts(&tcp, silence)?;
        let name = ServerName::try_from(name.to_owned()).context("server name")?;
        let mut tls = StreamOwned::new(ClientConnection::new(config, name)?, tcp);
        while tls.conn.is_handshaking() {
            tls.conn
                .complete_io(&mut tls.sock)
                .map_err(handshake)
                .context("TLS handshake with the destination")?;
        }
        Ok(Wire::new(Box::new(tls), silence))
    }

    /// TLS 1.3 as the server. The peer's certificate is given to `check` before anything else happens.
    ///
    /// # Errors
    /// The handshake failed (another CA, no certificate), timed out, or `check` refused the peer.
    pub fn accept(
        tcp: TcpStream,
        config: Arc<ServerConfig>,
        silence: Duration,
        check: impl FnOnce(&ServerConnection) -> Result<()>,
    ) -> Result<Wire> {
        timeouts(&tcp, silence)?;
        let mut tls = StreamOwned::new(ServerConnection::new(config)?, tcp);
        while tls.conn.is_handshaking() {
            tls.conn
                .complete_io(&mut tls.sock)
                .map_err(handshake)
                .context("TLS handshake with the source")?;
        }
        check(&tls.conn)?;
        Ok(Wire::new(Box::new(tls), silence))
    }

    /// Sends what is buffered.
    pub fn flush(&mut self) -> Result<()> {
        self.io.flush().map_err(|e| self.lost(e))
    }

    /// A sign of life, if nothing was sent for a fifth of the deadline.
    pub fn alive(&mut self) -> Result<()> {
        if self.last_sent.elapsed() > self.silence / 5 {
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
            let kind = codec::read(self.io.get_mut(), &mut self.payload).map_err(|e| match e {
                CodecError::Io(e) => self.lost(e),
                CodecError::Truncated { .. } => Lost(format!("the peer closed the connection: {e}")).into(),
                e => anyhow!("the peer sent something that is no frame: {e}"),
            })?;
            self.received += (codec::HEADER_LEN + self.payload.len()) as u64;
            if kind != Kind::Heartbeat {
                return Ok(kind);
            }
        }
    }

    /// The payload of the frame that [`Wire::recv`] returned last.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The payload read as JSON.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M> {
        serde_json::from_slice(&self.payload).context("a message of the peer")
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
        let said = self.json(Kind::Failed, failure).and_then(|()| self.flush());
        if said.is_ok() && self.io.get_mut().finish().is_ok() {
            // closing with unread bytes would reset the connection, and the peer would never see the reason
            let (until, mut waste) = (Instant::now() + Duration::from_secs(5), vec![0; 64 << 10]);
            while Instant::now() < until && matches!(self.io.get_mut().read(&mut waste), Ok(1..)) {}
        }
    }

    /// After a failed send: the peer's own reason, if it said one before it hung up.
    pub fn reason(&mut self) -> Option<Failure> {
        while let Ok(kind) = codec::read(self.io.get_mut(), &mut self.payload) {
            if kind == Kind::Failed {
                return self.message().ok();
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
        codec::write(&mut self.io, kind, parts).map_err(|e| self.lost(e))?;
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
mod tests {
    use super::*;
    use crate::migrate::protocol::{Commit, Running};
    use std::os::unix::net::UnixStream;

    fn pair(silence: Duration) -> (Wire, Wire) {
        let (a, b) = UnixStream::pair().unwrap();
        for s in [&a, &b] {
            s.set_read_timeout(Some(silence)).unwrap();
        }
        (Wire::new(Box::new(a), silence), Wire::new(Box::new(b), silence))
    }

    #[test]
    fn heartbeats_are_invisible() {
        let (mut a, mut b) = pair(Duration::from_secs(5));
        a.frame(Kind::Heartbeat, &[]).unwrap();
        a.json(Kind::Commit, &Commit {}).unwrap();
        a.flush().unwrap();
        b.expect::<Commit>(Kind::Commit).unwrap();
    }

    #[test]
    fn silence_is_named() {
        let (_a, mut b) = pair(Duration::from_millis(50));
        let e = b.expect::<Running>(Kind::Running).unwrap_err();
        assert!(e.to_string().contains("silent"), "{e}");
    }

    #[test]
    fn the_peers_reason_becomes_the_error_also_when_we_were_still_sending() {
        let (mut a, mut b) = pair(Duration::from_secs(5));
        let why = Failure { phase: "restore".into(), message: "no room".into(), ..Failure::default() };
        let sent = why.clone();
        let t = std::thread::spawn(move || b.fail(&sent));
        let mut sends = (0..100_000).map(|_| a.frame(Kind::FileData, &[&[0; 4096]]));
        let failed = sends.any(|r| r.is_err());
        assert!(a.reason() == Some(why) || !failed);
        drop(a);
        t.join().unwrap();
    }

    #[test]
    fn a_failure_in_place_of_an_answer_is_an_error() {
        let (mut a, mut b) = pair(Duration::from_secs(5));
        let why = Failure { phase: "restore".into(), message: "criu said no".into(), ..Failure::default() };
        a.json(Kind::Failed, &why).unwrap();
        a.flush().unwrap();
        let e = b.expect::<Running>(Kind::Running).unwrap_err();
        assert_eq!(e.downcast_ref::<Failure>(), Some(&why));
    }
}
