//! The writable layer of a container that does not run, from agent to agent. (That of a running one goes from shim to
//! shim.)

use anyhow::{Context, Result, bail};
use containerd_client::types::Mount;
use tokio::sync::mpsc;

use super::{
    link::{Frame, Link},
    message::Message,
};
use crate::rootfs::{
    Apply, CaptureOptions, Entry, MountSpec, Sink, Stats, WritableLayer, apply::Nodes, capture,
};

/// The writable layer of a snapshot with these mounts.
pub fn of_mounts(mounts: &[Mount]) -> Result<WritableLayer> {
    let specs: Vec<_> = mounts
        .iter()
        .map(|m| MountSpec { kind: &m.r#type, source: &m.source, options: &m.options })
        .collect();
    WritableLayer::from_mounts(&specs, None)
}

/// Sends a layer: its entries and data, in between [`Message::Layer`] and [`Message::LayerEnd`].
pub async fn send(link: &Link, layer: WritableLayer) -> Result<Stats> {
    link.say(Message::Layer).await?;
    let mut sink = LinkSink(link.sender());
    let captured = tokio::task::spawn_blocking(move || {
        // a frame of layer data holds its offset too
        let options = CaptureOptions { chunk: 512 << 10, ..CaptureOptions::for_layer(&layer) };
        capture(&layer.dir, &options, &mut sink)
    });
    let stats = captured.await.context("the thread that reads the layer")??;
    link.say(Message::LayerEnd).await?;
    Ok(stats)
}

struct LinkSink(mpsc::Sender<Frame>);

impl LinkSink {
    fn send(&self, frame: Frame) -> Result<()> {
        match self.0.blocking_send(frame) {
            Ok(()) => Ok(()),
            Err(_) => bail!("the connection to the peer is lost"),
        }
    }
}

impl Sink for LinkSink {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        self.send(Frame::Entry(bytes))
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut frame = Vec::with_capacity(8 + bytes.len());
        frame.extend_from_slice(&offset.to_le_bytes());
        frame.extend_from_slice(bytes);
        self.send(Frame::LayerData(frame))
    }
}

/// Takes a layer from a peer; of devices only these `nodes`.
///
/// # Errors
/// The connection ended or the source gave up; what was sent cannot be applied. What was applied so far stays in the
/// directory, which the caller removes with its snapshot.
pub async fn receive(link: &mut Link, layer: WritableLayer, nodes: Nodes) -> Result<Stats> {
    match link.hear().await? {
        Message::Layer => {}
        Message::Cancel { reason } => bail!("the source gave up: {reason}"),
        other => bail!("the peer sent {} in place of a layer", name(&other)),
    }
    let (to, mut frames) = mpsc::channel::<Frame>(4);
    let apply = tokio::task::spawn_blocking(move || -> Result<Stats> {
        let mut apply = Apply::for_layer(&layer)?.only_devices(nodes);
        while let Some(frame) = frames.blocking_recv() {
            match frame {
                Frame::Entry(bytes) => apply.entry(&Entry::decode(&bytes)?)?,
                Frame::LayerData(bytes) => {
                    let (offset, data) =
                        bytes.split_first_chunk::<8>().context("layer data without offset")?;
                    apply.data(u64::from_le_bytes(*offset), data)?;
                }
                _ => bail!("the peer mixed other frames into a layer"),
            }
        }
        apply.finish()
    });
    let ended = loop {
        match link.frame().await {
            Ok(Frame::Message(message)) => match *message {
                Message::LayerEnd => break Ok(()),
                Message::Cancel { reason } => {
                    break Err(anyhow::anyhow!("the source gave up: {reason}"));
                }
                other => {
                    break Err(anyhow::anyhow!("the peer sent {} inside a layer", name(&other)));
                }
            },
            Ok(frame) => {
                if to.send(frame).await.is_err() {
                    break Ok(()); // its error is the thread's result
                }
            }
            Err(error) => break Err(error),
        }
    };
    drop(to);
    let applied = apply.await.context("the thread that writes the layer")?;
    ended?;
    applied
}

/// A message's name, without what it holds.
pub fn name(message: &Message) -> String {
    let text = format!("{message:?}");
    let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
    text[..end].to_string()
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::{policy::Policy, rootfs::LayerKind};

    #[tokio::test]
    async fn a_layer_crosses_a_link() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let long = Duration::from_secs(10);
        let (a, mut b) = (Link::new(a, long), Link::new(b, long));
        b.allow(crate::agent::link::MAX_MESSAGE);
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/large"), vec![5; 3 << 20]).unwrap();
        fs::write(from.join("small"), "x").unwrap();
        let kind = LayerKind::Overlay { userxattr: true };
        let (source, target) = (WritableLayer { dir: from, kind }, WritableLayer { dir: to.clone(), kind });
        let (sent, received) = tokio::join!(
            send(&a, source),
            receive(&mut b, target, Policy::default().nodes(&serde_json::Value::Null))
        );
        assert_eq!(sent.unwrap().entries, received.unwrap().entries);
        assert_eq!(fs::read(to.join("sub/large")).unwrap(), vec![5; 3 << 20]);
    }

    #[tokio::test]
    async fn a_layer_cut_short_is_an_error() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let long = Duration::from_secs(10);
        let (a, mut b) = (Link::new(a, long), Link::new(b, long));
        let dir = tempfile::tempdir().unwrap();
        let kind = LayerKind::Overlay { userxattr: true };
        a.say(Message::Layer).await.unwrap();
        a.say(Message::LayerEnd).await.unwrap();
        let target = WritableLayer { dir: dir.path().into(), kind };
        assert!(
            receive(&mut b, target, Policy::default().nodes(&serde_json::Value::Null))
                .await
                .unwrap_err()
                .to_string()
                .contains("cut short")
        );
    }
}
