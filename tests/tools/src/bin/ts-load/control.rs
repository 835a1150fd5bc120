//! Commands over TCP, one a connection: a line comes, a line of JSON goes. Polled between two steps of the work, so that the
//! workload stays one thread; a listening socket and no more is open while it is moved.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::Value;

pub struct Control(Option<TcpListener>);

impl Control {
    /// Listens; port 0: no commands.
    pub fn open(port: u16) -> Result<Self, String> {
        if port == 0 {
            return Ok(Self(None));
        }
        let open = || {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
            listener.set_nonblocking(true)?;
            std::io::Result::Ok(listener)
        };
        Ok(Self(Some(open().map_err(|e| format!("port {port}: {e}"))?)))
    }

    /// Answers a command, if there is one; says whether there was.
    pub fn poll(&self, answer: impl FnOnce(&str) -> Value) -> bool {
        let Some(listener) = &self.0 else { return false };
        match listener.accept() {
            // a client that goes away half-way is its own trouble
            Ok((stream, _)) => {
                let _ = serve(stream, answer);
                true
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => false,
            Err(_) => false,
        }
    }
}

fn serve(stream: TcpStream, answer: impl FnOnce(&str) -> Value) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    (&stream).write_all(format!("{}\n", answer(line.trim())).as_bytes())
}

/// The other side: sends `command`, returns the answer.
pub fn ask(address: &str, command: &str) -> Result<String, String> {
    let run = || {
        let stream = TcpStream::connect(address)?;
        // a check of many GiB takes its time
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        std::io::Result::Ok(line.trim().to_owned())
    };
    run().map_err(|e| format!("{address}: {e}"))
}
