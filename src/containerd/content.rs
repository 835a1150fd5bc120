//! Blobs in containerd's content store.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use containerd_client::{
    services::v1::{
        AbortRequest, Info, InfoRequest, ReadContentRequest, ReadContentResponse, UpdateRequest, WriteAction,
        WriteContentRequest, WriteContentResponse, content_client::ContentClient,
    },
    tonic::{Streaming, transport::Channel},
};
use prost_types::FieldMask;
use tokio::sync::mpsc;

use super::client::{Asked, CallError, MAX_MESSAGE, Namespace, found, gone, is_already_exists};

/// Checks that a digest is one of SHA-256: containerd makes file names of it.
pub fn check_digest(digest: &str) -> Result<()> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    let fine = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    ensure!(fine, "{digest:?} is no SHA-256 digest");
    Ok(())
}

impl Namespace {
    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// A blob's size and labels; `None` if the namespace does not have it.
    pub async fn blob_info(&self, digest: &str) -> Result<Option<(u64, BTreeMap<String, String>)>> {
        let request = self.request(InfoRequest { digest: digest.into() });
        let answer = self.content().info(request).await.asked(|| format!("looking for blob {digest}"));
        let info = found(answer)?.and_then(|a| a.info);
        Ok(info.map(|i| (i.size.max(0) as u64, i.labels.into_iter().collect())))
    }

    /// Reads a blob from its beginning, a piece at a time.
    pub async fn blob_reader(&self, digest: &str) -> Result<Reader> {
        let request = self.request(ReadContentRequest { digest: digest.into(), offset: 0, size: 0 });
        let stream = self.content().read(request).await.asked(|| format!("reading blob {digest}"))?;
        Ok(Reader { stream, digest: digest.into() })
    }

    /// A small blob, whole.
    ///
    /// # Errors
    /// It does not exist, or is larger than `limit` bytes.
    pub async fn blob(&self, digest: &str, limit: usize) -> Result<Vec<u8>> {
        let mut reader = self.blob_reader(digest).await?;
        let mut blob = Vec::new();
        while let Some(piece) = reader.next().await? {
            ensure!(blob.len() + piece.len() <= limit, "blob {digest} is larger than {limit} bytes");
            blob.extend_from_slice(&piece);
        }
        Ok(blob)
    }

    /// Begins to write a blob; `None`: it is there already. `reference` names the attempt and must be unique.
    pub async fn blob_writer(&self, reference: &str, digest: &str, size: u64) -> Result<Option<Writer>> {
        check_digest(digest)?;
        let (to, rest) = mpsc::channel::<WriteContentRequest>(1);
        let first = WriteContentRequest {
            action: WriteAction::Stat as i32,
            r#ref: reference.into(),
            total: i64::try_from(size).context("a blob's size")?,
            expected: digest.into(),
            ..Default::default()
        };
        to.send(first.clone()).await.context("a fresh channel")?;
        let requests = futures_util::stream::unfold(rest, |mut rest| async {
            let next = rest.recv().await?;
            Some((next, rest))
        });
        let what = || format!("writing blob {digest}");
        let opened = async {
            let answers = self.content().write(self.request(requests)).await.asked(what)?;
            let mut writer = Writer { to, answers, template: first, offset: 0, size, digest: digest.into() };
            writer.answer().await?;
            Ok::<_, anyhow::Error>(writer)
        };
        match opened.await {
            Ok(writer) => Ok(Some(writer)),
            Err(error) if is_already_exists(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Forgets an attempt to write a blob; fine if there is none.
    pub async fn blob_abort(&self, reference: &str) -> Result<()> {
        let request = self.request(AbortRequest { r#ref: reference.into() });
        gone(self.content().abort(request).await.asked(|| format!("abandoning blob {reference}")))
    }

    /// Adds labels to a blob, or replaces them.
    pub async fn blob_label(&self, digest: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        let info = Info {
            digest: digest.into(),
            labels: labels.clone().into_iter().collect::<HashMap<_, _>>(),
            ..Default::default()
        };
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let answer = self.content().update(self.request(request)).await;
        answer.asked(|| format!("labelling blob {digest}"))?;
        Ok(())
    }
}

/// A blob being read.
#[derive(Debug)]
pub struct Reader {
    stream: Streaming<ReadContentResponse>,
    digest: String,
}

impl Reader {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let piece = self.stream.message().await.map_err(CallError::from);
        Ok(piece.with_context(|| format!("reading blob {}", self.digest))?.map(|p| p.data))
    }
}

/// A blob being written. Dropped before [`Writer::commit`], containerd keeps the attempt until it is abandoned.
#[derive(Debug)]
pub struct Writer {
    to: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    template: WriteContentRequest,
    offset: u64,
    size: u64,
    digest: String,
}

impl Writer {
    /// Appends a piece.
    ///
    /// # Errors
    /// More was written than announced, or containerd failed.
    pub async fn write(&mut self, data: Vec<u8>) -> Result<()> {
        let end = self.offset + data.len() as u64;
        ensure!(end <= self.size, "blob {}: more than the announced {} bytes came", self.digest, self.size);
        let request = WriteContentRequest {
            action: WriteAction::Write as i32,
            offset: self.offset as i64,
            data,
            ..self.template.clone()
        };
        self.offset = end;
        self.send(request).await
    }

    /// Ends the blob; containerd compares size and digest.
    pub async fn commit(mut self, labels: BTreeMap<String, String>) -> Result<()> {
        ensure!(
            self.offset == self.size,
            "blob {}: {} of {} bytes came",
            self.digest,
            self.offset,
            self.size
        );
        let request = WriteContentRequest {
            action: WriteAction::Commit as i32,
            offset: self.offset as i64,
            labels: labels.into_iter().collect(),
            ..self.template.clone()
        };
        match self.send(request).await {
            Err(error) if is_already_exists(&error) => Ok(()), // another wrote it meanwhile
            other => other,
        }
    }

    async fn send(&mut self, request: WriteContentRequest) -> Result<()> {
        if self.to.send(request).await.is_err() {
            // containerd ended the stream; its reason is the answer
            self.answer().await?;
            anyhow::bail!("writing blob {}: containerd ended the stream", self.digest);
        }
        self.answer().await
    }

    async fn answer(&mut self) -> Result<()> {
        let answer = self.answers.message().await.map_err(CallError::from);
        let answer = answer.with_context(|| format!("writing blob {}", self.digest))?;
        ensure!(answer.is_some(), "writing blob {}: containerd ended the stream", self.digest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests() {
        check_digest(&format!("sha256:{}", "0af".repeat(21) + "0")).unwrap();
        for bad in ["", "sha256:", "sha256:../../etc/passwd", "md5:00"] {
            assert!(check_digest(bad).is_err(), "{bad}");
        }
        assert!(check_digest(&format!("sha256:{}", "A".repeat(64))).is_err());
    }
}
