//! The stream of container events. containerd 1.7 has one queue for all who listen and keeps it while nobody does: only one at a time
//! may listen, and what others left is skipped.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::oneshot;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use super::answers::Event;
use crate::bed::{Bed, Node, wait_for};

/// Collects events until it is dropped.
pub struct Events {
    seen: Arc<Mutex<Vec<Event>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Events {
    /// Listens to node a's containerd.
    pub fn listen(bed: &Bed) -> Result<Events> {
        let socket = bed.path(Node::A, "/run/containerd/containerd.sock")?;
        let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
        let (stop, mut stopped) = oneshot::channel();
        let into = Arc::clone(&seen);
        let listen = async move {
            let channel = containerd_client::connect(&socket).await.context("containerd")?;
            let mut grpc = Grpc::new(channel);
            grpc.ready().await?;
            let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/GetContainerEvents");
            let call =
                grpc.server_streaming(tonic::Request::new(()), path, ProstCodec::<(), Event>::default());
            // its head comes with the first event only
            let mut stream = tokio::select! {
                stream = call => stream?.into_inner(),
                _ = &mut stopped => return Ok(()),
            };
            loop {
                tokio::select! {
                    event = stream.message() => match event? {
                        Some(event) => into.lock().expect("no panic").push(event),
                        None => return Ok(()),
                    },
                    _ = &mut stopped => return Ok(()),
                }
            }
        };
        let thread = std::thread::Builder::new().name("cri-events".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(listen)
        })?;
        Ok(Events { seen, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits until there are as many of these containers (or sandboxes), and returns them in the order in which they came.
    pub fn of(&self, ids: &[&str], wanted: usize) -> Result<Vec<Event>> {
        let found = || -> Vec<Event> {
            let seen = self.seen.lock().expect("no panic");
            seen.iter().filter(|e| ids.contains(&e.container_id.as_str())).cloned().collect()
        };
        let what = format!("{wanted} events");
        wait_for(Duration::from_secs(10), &what, || Ok(found().len() >= wanted)).with_context(|| {
            format!("there are {:?}", found().iter().map(|e| e.container_event_type).collect::<Vec<_>>())
        })?;
        Ok(found())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("listening to events: {error:#}");
        }
    }
}
