//! The connection between two agents: frames over TLS, with caps, keep-alives and an end by silence.
//!
//! ```text
//! | length u32 LE | kind u8 | payload |        kind: 0 message (JSON), 1 data, 2 layer entry, 3 layer data
//! ```
//!
//! Reading and writing are tasks of their own behind bounded channels, so that receiving can be given up and taken up
//! again at any time, and so that each side says `Alive` whatever its logic is busy with. What arrives late is silence:
//! a side that hears nothing for the limit ends the connection.
//!
//! What a peer may make us hold depends on how far it has come ([`Link::allow`]): at first short messages only.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use super::message::Message;

/// The largest message of a peer that has only just connected, in bytes; frames of other kinds are not taken from it.
pub const MAX_GREETING: usize = 64 << 10;
/// The largest message of a peer that may move a container, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// The largest offer, in bytes: a container's whole record and the names of its image's blobs. As JSON in memory it is some times
/// as much.
pub const MAX_OFFER: usize = 4 << 20;
/// The largest data frame, in bytes.
pub const MAX_DATA: usize = 1 << 20;
/// So often each side speaks at least, whatever it has been told of silence: the other may go by a limit of its own, of which the
/// smallest is one second.
const ALIVE: Duration = Duration::from_millis(250);
/// Room for the offset in front of a layer's data.
const DATA_HEAD: usize = 64;

/// A frame's payload by kind.
#[derive(Debug)]
pub enum Frame {
    /// A message.
    Message(Box<Message>),
    /// A piece of a blob.
    Data(Vec<u8>),
    /// An entry of a writable layer, encoded by [`crate::rootfs`].
    Entry(Vec<u8>),
    /// Its offset (u64 LE) and a piece of a file of a writable layer.
    LayerData(Vec<u8>),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Frame::Message(_) => 0,
            Frame::Data(_) => 1,
            Frame::Entry(_) => 2,
            Frame::LayerData(_) => 3,
        }
    }

    /// The largest payload of a kind where messages may be so large; `None`: there is no such kind, or not yet.
    fn cap(kind: u8, message: usize) -> Option<usize> {
        match kind {
            0 => Some(message),
            _ if message <= MAX_GREETING => None,
            1 | 3 => Some(MAX_DATA + DATA_HEAD),
            2 => Some(MAX_DATA),
            _ => None,
        }
    }
}

/// The connection's end in one side's hands. Dropped, the connection is cut.
#[derive(Debug)]
pub struct Link {
    out: mpsc::Sender<Frame>,
    incoming: mpsc::Receiver<Result<Frame>>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    /// The largest message that is taken.
    most: Arc<AtomicUsize>,
    over: bool,
}

impl Link {
    /// Starts to speak over a stream. `silence`: after so long without a byte from the peer the connection is over. Messages
    /// up to [`MAX_GREETING`] are taken.
    pub fn new<S>(stream: S, silence: Duration) -> Link
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(stream);
        let (out, outgoing) = mpsc::channel(4);
        let (to, incoming) = mpsc::channel(4);
        let writer = tokio::spawn(write_all(write, outgoing, ALIVE.min(silence / 4)));
        let cut = writer.abort_handle();
        let most = Arc::new(AtomicUsize::new(MAX_GREETING));
        let limit = most.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = read_all(read, &to, silence, &limit).await {
                let _ = to.send(Err(error)).await;
            }
            // a peer that no longer reads would keep the writer for good
            cut.abort();
        });
        Link { out, incoming, reader, writer, most, over: false }
    }

    /// Messages up to so many bytes are taken from here on, and frames of all kinds if that is more than [`MAX_GREETING`].
    pub fn allow(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn say(&self, message: Message) -> Result<()> {
        self.send(Frame::Message(Box::new(message))).await
    }

    /// Sends a frame.
    pub async fn send(&self, frame: Frame) -> Result<()> {
        match self.out.send(frame).await {
            Ok(()) => Ok(()),
            Err(_) => bail!("the connection to the peer is lost"),
        }
    }

    /// For sending from elsewhere, for instance a blocking thread.
    pub fn sender(&self) -> mpsc::Sender<Frame> {
        self.out.clone()
    }

    /// The next frame; can be given up and called again.
    ///
    /// # Errors
    /// The connection is over: closed, silent, or not understood. Once over it stays so.
    pub async fn frame(&mut self) -> Result<Frame> {
        if self.over {
            // for callers that watch the connection beside something else: it does not end twice
            std::future::pending::<()>().await;
        }
        match self.incoming.recv().await {
            Some(Ok(frame)) => Ok(frame),
            Some(Err(error)) => {
                self.over = true;
                Err(error)
            }
            None => {
                self.over = true;
                bail!("the peer closed the connection")
            }
        }
    }

    /// Whether [`Link::frame`] has failed.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// The next message.
    ///
    /// # Errors
    /// As [`Link::frame`], or a frame of another kind came.
    pub async fn hear(&mut self) -> Result<Message> {
        match self.frame().await? {
            Frame::Message(message) => Ok(*message),
            other => bail!("the peer sent a frame of kind {} in place of a message", other.kind()),
        }
    }

    /// Sends what is queued and closes this side.
    pub async fn close(mut self) {
        let (none, _) = mpsc::channel(1);
        self.out = none;
        let _ = timeout(Duration::from_secs(5), &mut self.writer).await;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

async fn write_all(mut to: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Frame>, idle: Duration) {
    loop {
        let frame = match timeout(idle, frames.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(_) => Frame::Message(Box::new(Message::Alive)),
        };
        if let Err(error) = write(&mut to, &frame).await {
            log::debug!("writing to a peer: {error}");
            return;
        }
    }
    let _ = to.shutdown().await;
}

pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let json;
    let payload = match frame {
        Frame::Message(message) => {
            json = serde_json::to_vec(message)?;
            &json
        }
        Frame::Data(bytes) | Frame::Entry(bytes) | Frame::LayerData(bytes) => bytes,
    };
    if Frame::cap(frame.kind(), MAX_OFFER).is_none_or(|cap| payload.len() > cap) {
        return Err(io::Error::other(format!("a frame of {} bytes is too large to send", payload.len())));
    }
    let mut head = [0; 5];
    head[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    head[4] = frame.kind();
    to.write_all(&head).await?;
    to.write_all(payload).await?;
    to.flush().await
}

async fn read_all(
    mut from: impl AsyncRead + Unpin,
    to: &mpsc::Sender<Result<Frame>>,
    silence: Duration,
    most: &AtomicUsize,
) -> Result<()> {
    loop {
        match read(&mut from, silence, most).await? {
            None => return Ok(()),
            Some(Frame::Message(message)) if matches!(*message, Message::Alive) => {}
            Some(frame) => {
                if to.send(Ok(frame)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// `None` at a clean end between two frames.
pub(super) async fn read(
    from: &mut (impl AsyncRead + Unpin),
    silence: Duration,
    most: &AtomicUsize,
) -> Result<Option<Frame>> {
    let mut head = [0; 5];
    if !fill(from, &mut head, silence).await? {
        return Ok(None);
    }
    let (length, kind) = (u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize, head[4]);
    let Some(cap) = Frame::cap(kind, most.load(Ordering::Relaxed)) else {
        bail!("the peer sent a frame of kind {kind}, which is unknown or not due")
    };
    if length > cap {
        bail!("the peer announced a frame of {length} bytes; at most {cap} are allowed");
    }
    let mut payload = vec![0; length];
    if length > 0 && !fill(from, &mut payload, silence).await? {
        bail!("the connection ended inside a frame");
    }
    Ok(Some(match kind {
        0 => Frame::Message(serde_json::from_slice(&payload).context("a message of the peer")?),
        1 => Frame::Data(payload),
        2 => Frame::Entry(payload),
        _ => Frame::LayerData(payload),
    }))
}

/// Fills the buffer; `false` if the stream ended before its first byte.
async fn fill(from: &mut (impl AsyncRead + Unpin), buffer: &mut [u8], silence: Duration) -> Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match timeout(silence, from.read(&mut buffer[filled..])).await {
            Err(_) => bail!("the peer was silent for {} s", silence.as_secs_f32()),
            // peers that die do not say goodbye to TLS
            Ok(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof && filled == 0 => return Ok(false),
            Ok(Err(e)) => return Err(e).context("reading from the peer"),
            Ok(Ok(0)) if filled == 0 => return Ok(false),
            Ok(Ok(0)) => bail!("the connection ended inside a frame"),
            Ok(Ok(n)) => filled += n,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::message::Hello;

    const LONG: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn frames_arrive_in_order_and_the_end_is_seen() {
        let (a, b) = tokio::io::duplex(1000);
        let (a, mut b) = (Link::new(a, LONG), Link::new(b, LONG));
        b.allow(MAX_MESSAGE);
        a.say(Message::Hello(Hello { node: "a".into(), ..Default::default() })).await.unwrap();
        let sender = a.sender();
        let feed = tokio::spawn(async move {
            for _ in 0..3 {
                sender.send(Frame::Data(vec![7; 300_000])).await.unwrap();
            }
        });
        assert!(matches!(b.hear().await.unwrap(), Message::Hello(h) if h.node == "a"));
        for _ in 0..3 {
            assert!(matches!(b.frame().await.unwrap(), Frame::Data(d) if d.len() == 300_000));
        }
        feed.await.unwrap();
        a.close().await;
        assert!(b.frame().await.unwrap_err().to_string().contains("closed"));
        assert!(b.is_over());
    }

    #[tokio::test]
    async fn a_huge_or_unknown_frame_is_refused_unread() {
        for head in [[0xff, 0xff, 0xff, 0x7f, 0], [0, 0, 0x20, 0, 1], [1, 0, 0, 0, 9]] {
            let (mut a, b) = tokio::io::duplex(100);
            let mut b = Link::new(b, LONG);
            b.allow(MAX_MESSAGE);
            a.write_all(&head).await.unwrap();
            assert!(b.frame().await.unwrap_err().to_string().contains("frame"), "{head:?}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_was_not_let_in_yet_may_say_little() {
        let within = |length: u32, kind: u8| {
            let l = length.to_le_bytes();
            [l[0], l[1], l[2], l[3], kind]
        };
        for head in [within(MAX_GREETING as u32 + 1, 0), within(1, 1), within(1, 2), within(1, 3)] {
            let (mut a, b) = tokio::io::duplex(100);
            let mut b = Link::new(b, LONG);
            a.write_all(&head).await.unwrap();
            assert!(b.frame().await.unwrap_err().to_string().contains("frame"), "{head:?}");
        }
        // the same lengths are fine later, and what is long enough never is
        let (a, b) = tokio::io::duplex(100);
        let (a, mut b) = (Link::new(a, LONG), Link::new(b, LONG));
        b.allow(MAX_MESSAGE);
        let text = |length| Message::Warning { message: "x".repeat(length) };
        a.say(text(MAX_GREETING)).await.unwrap();
        assert!(matches!(b.hear().await.unwrap(), Message::Warning { .. }));
        a.say(text(MAX_MESSAGE)).await.unwrap();
        assert!(b.hear().await.unwrap_err().to_string().contains("at most"));
    }

    #[tokio::test]
    async fn silence_ends_it_and_keep_alives_prevent_that() {
        let (_a, b) = tokio::io::duplex(100);
        let mut b = Link::new(b, Duration::from_millis(40));
        assert!(b.frame().await.unwrap_err().to_string().contains("silent"));
        let (a, b) = tokio::io::duplex(100);
        let silence = Duration::from_millis(200);
        let (_a, mut b) = (Link::new(a, silence), Link::new(b, silence));
        assert!(timeout(Duration::from_millis(700), b.frame()).await.is_err(), "still connected");
        // each goes by its own configuration, or by what was asked for one migration
        let (a, b) = tokio::io::duplex(100);
        let (_a, mut b) = (Link::new(a, Duration::from_secs(600)), Link::new(b, Duration::from_secs(1)));
        assert!(timeout(Duration::from_millis(2500), b.frame()).await.is_err(), "still connected");
    }

    #[tokio::test]
    async fn a_stream_cut_inside_a_frame_is_an_error() {
        let (mut a, b) = tokio::io::duplex(100);
        let mut b = Link::new(b, LONG);
        b.allow(MAX_MESSAGE);
        a.write_all(&[10, 0, 0, 0, 1, 5]).await.unwrap();
        drop(a);
        assert!(b.frame().await.unwrap_err().to_string().contains("inside"));
    }
}
