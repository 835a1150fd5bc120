//! Exec, Attach and PortForward: the CRI answers with a URL, and behind it is a web socket with numbered channels (subprotocol
//! v4.channel.k8s.io, which containerd 1.7 and 2.1 both speak beside SPDY). The first byte of a message is its channel.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use tungstenite::{ClientRequestBuilder, Message, WebSocket};

use super::answers::Url;
use super::client::{Cri, Part};
use crate::bed::{Bed, Node, patient};

/// Channels of exec and attach.
pub const STDIN: u8 = 0;
/// What it writes to stdout; a terminal's only one.
pub const STDOUT: u8 = 1;
/// What it writes to stderr.
pub const STDERR: u8 = 2;
/// What became of the command, as a JSON object of kind Status.
pub const STATUS: u8 = 3;
/// The size of the terminal.
pub const RESIZE: u8 = 4;

const LIMIT: Duration = Duration::from_secs(15);

/// An open stream, and what came so far.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    came: BTreeMap<u8, Vec<u8>>,
}

impl Stream {
    /// Asks for a stream (method Exec, Attach or PortForward) and opens it.
    pub fn open(cri: &Cri<'_>, method: &str, question: impl Part) -> Result<Stream> {
        let answer: Url = cri.ask(method, question)?;
        let uri: tungstenite::http::Uri = answer.url.replacen("http://", "ws://", 1).parse()?;
        let address = uri.authority().context("no address")?.to_string();
        let tcp = in_network(cri.bed, Node::A, || Ok(TcpStream::connect(&address)?))
            .with_context(|| answer.url.clone())?;
        tcp.set_read_timeout(Some(patient(LIMIT)))?;
        let request = ClientRequestBuilder::new(uri).with_sub_protocol("v4.channel.k8s.io");
        let (socket, _) =
            tungstenite::client(request, tcp).map_err(|e| anyhow::anyhow!("{}: {e}", answer.url))?;
        Ok(Stream { socket, came: BTreeMap::new() })
    }

    /// Sends bytes on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        Ok(self.socket.send(Message::binary([&[channel], bytes].concat()))?)
    }

    /// The next message into its channel; false at the end.
    fn receive(&mut self) -> Result<bool> {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                let (channel, bytes) = bytes.split_first().context("a message without a channel")?;
                self.came.entry(*channel).or_default().extend_from_slice(bytes);
                Ok(true)
            }
            Ok(Message::Close(_)) => Ok(false),
            Ok(_) => Ok(true),
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::Protocol(_)) => Ok(false),
            Err(tungstenite::Error::Io(e)) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(false),
            Err(e) => bail!("{e}; so far: {}", self.shown()),
        }
    }

    fn shown(&self) -> String {
        let channel = |(c, b): (&u8, &Vec<u8>)| format!("{c}: {:?}", String::from_utf8_lossy(b));
        self.came.iter().map(channel).collect::<Vec<_>>().join(", ")
    }

    /// What came on a channel.
    pub fn came(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.came.get(&channel).map_or(&[], Vec::as_slice)).into_owned()
    }

    /// Reads until a channel holds `text`.
    pub fn wait_for(&mut self, channel: u8, text: &str) -> Result<()> {
        let start = Instant::now();
        while !self.came(channel).contains(text) {
            ensure!(start.elapsed() < patient(LIMIT), "no {text:?} in time: {}", self.shown());
            ensure!(self.receive()?, "ended before {text:?}: {}", self.shown());
        }
        Ok(())
    }

    /// Reads to the end.
    pub fn end(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.receive()? {
            ensure!(start.elapsed() < patient(LIMIT), "no end in time: {}", self.shown());
        }
        Ok(())
    }
}

/// Does something in a node's network. A socket stays in the network in which it was made, whoever holds it.
pub fn in_network<T: Send>(bed: &Bed, node: Node, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = File::open(format!("/proc/{}/ns/net", bed.pid(node)?))?;
    std::thread::scope(|scope| {
        // a thread of its own: setns is for the thread that calls it
        let working = scope.spawn(|| -> Result<T> {
            setns(&netns, CloneFlags::CLONE_NEWNET).context("setns")?;
            work()
        });
        working.join().map_err(|_| anyhow::anyhow!("the thread in the node's network panicked"))?
    })
}
