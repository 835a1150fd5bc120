//! containerd's events.

use anyhow::{Context, Result};
use containerd_client::{
    events::ContainerDelete,
    services::v1::{SubscribeRequest, events_client::EventsClient},
    tonic::Streaming,
    types::Envelope,
};
use prost::Message;

use super::client::{Asked, CallError, Containerd};

/// Containers that are deleted, in all namespaces.
#[derive(Debug)]
pub struct Deletions(Streaming<Envelope>);

impl Containerd {
    /// Subscribes to deletions of containers.
    pub async fn deletions(&self) -> Result<Deletions> {
        let request = SubscribeRequest { filters: vec!["topic==\"/containers/delete\"".into()] };
        let answer = EventsClient::new(self.channel()).subscribe(request).await;
        Ok(Deletions(answer.asked(|| "subscribing to events".into())?))
    }
}

impl Deletions {
    /// The next deleted container's namespace and id; `None` when containerd ends the stream.
    pub async fn next(&mut self) -> Result<Option<(String, String)>> {
        while let Some(envelope) = self.0.message().await.map_err(CallError::from).context("events")? {
            let event = envelope.event.unwrap_or_default();
            if let Ok(deleted) = ContainerDelete::decode(&event.value[..]) {
                return Ok(Some((envelope.namespace, deleted.id)));
            }
        }
        Ok(None)
    }
}
