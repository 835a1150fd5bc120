//! One connection that speaks redis' protocol (RESP 2: https://redis.io/docs/latest/develop/reference/protocol-spec/).
//! It is opened once; there is no way to open it again.

use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use transship_testtools::signals;

/// What redis answers.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// `+OK`
    Simple,
    /// `:42`
    Integer(i64),
    /// `$5 hello`; nothing for an absent key
    Bulk(Option<Vec<u8>>),
}

pub struct Connection {
    stream: TcpStream,
    local: String,
    timeout: Duration,
    buffer: Vec<u8>,
    at: usize,
}

/// An answer that does not come after we have been asked to stop is waited for this long.
const PATIENCE_AFTER_STOP: Duration = Duration::from_secs(10);

impl Connection {
    /// `timeout`: how long a reply may take before the connection counts as dead.
    pub fn open(address: &str, timeout: Duration) -> io::Result<Self> {
        let address = address.to_socket_addrs()?.next().ok_or_else(|| Error::other("no address"))?;
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        // short, so that a request to stop is seen
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let local = stream.local_addr()?.to_string();
        Ok(Self { stream, local, timeout, buffer: Vec::new(), at: 0 })
    }

    /// Our own address and port.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// Sends bytes made by [`command`].
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Waits for the next reply. An error means that the connection is over.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).ok_or_else(|| Error::other("empty reply"))?;
        let number = || rest.parse::<i64>().map_err(|e| Error::other(format!("reply {line:?}: {e}")));
        match kind {
            "+" => Ok(Reply::Simple),
            ":" => Ok(Reply::Integer(number()?)),
            "$" => match number()? {
                -1 => Ok(Reply::Bulk(None)),
                n => {
                    let n = usize::try_from(n).map_err(Error::other)?;
                    self.need(n + 2)?;
                    let bulk = self.buffer[self.at..self.at + n].to_vec();
                    self.at += n + 2;
                    Ok(Reply::Bulk(Some(bulk)))
                }
            },
            _ => Err(Error::other(format!("redis says {line:?}"))),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(n) = self.buffer[self.at..].windows(2).position(|w| w == b"\r\n") {
                let line = String::from_utf8_lossy(&self.buffer[self.at..self.at + n]).into_owned();
                self.at += n + 2;
                return Ok(line);
            }
            self.need(self.buffer.len() - self.at + 1)?;
        }
    }

    /// Reads until `n` bytes lie in the buffer.
    fn need(&mut self, n: usize) -> io::Result<()> {
        let start = Instant::now();
        if self.at > 1 << 20 || self.at == self.buffer.len() {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        let mut chunk = [0; 65536];
        while self.buffer.len() - self.at < n {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    return Err(Error::new(ErrorKind::UnexpectedEof, "the server closed the connection"));
                }
                Ok(got) => self.buffer.extend_from_slice(&chunk[..got]),
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    let limit = if signals::stops() > 0 {
                        self.timeout.min(PATIENCE_AFTER_STOP)
                    } else {
                        self.timeout
                    };
                    if start.elapsed() > limit {
                        return Err(Error::new(ErrorKind::TimedOut, format!("no reply for {limit:?}")));
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// A command as it goes over the wire.
pub fn command(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        bytes.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        bytes.extend_from_slice(part);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}
