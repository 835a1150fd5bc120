//! The calls of the CRI, each as kubelet makes it.

use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use super::answers::ImageStatus;
use super::config::{self, ImageSpec};
use crate::bed::{Bed, Node, patient, wait_for};

/// No call of a scenario takes longer; kubelet's own limit is two minutes.
const LIMIT: Duration = Duration::from_secs(30);

/// What a call came to: its answer, or the status with which it was refused.
pub type Answer<T> = Result<T, Status>;

/// A connection to the containerd of node a.
pub struct Cri<'a> {
    /// The nodes.
    pub bed: &'a Bed,
    runtime: Runtime,
    channel: Channel,
}

/// A message that can be sent or received.
pub trait Part: Message + Default + 'static {}
impl<M: Message + Default + 'static> Part for M {}

impl<'a> Cri<'a> {
    /// Connects.
    pub fn connect(bed: &'a Bed) -> Result<Cri<'a>> {
        let socket = bed.path(Node::A, "/run/containerd/containerd.sock")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(containerd_client::connect(&socket)).context("containerd")?;
        Ok(Cri { bed, runtime, channel })
    }

    /// A call of the RuntimeService.
    pub fn ask<Q: Part, A: Part>(&self, method: &str, question: Q) -> Answer<A> {
        self.call(&format!("/runtime.v1.RuntimeService/{method}"), question)
    }

    fn call<Q: Part, A: Part>(&self, path: &str, question: Q) -> Answer<A> {
        let path = PathAndQuery::try_from(path).map_err(|e| Status::internal(e.to_string()))?;
        let mut request = Request::new(question);
        request.set_timeout(patient(LIMIT));
        self.runtime.block_on(async {
            let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(32 << 20);
            grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
            let answer = grpc.unary(request, path, ProstCodec::<Q, A>::default()).await;
            answer.map(tonic::Response::into_inner)
        })
    }

    /// A call that is answered by nothing but success.
    pub fn tell(&self, method: &str, question: impl Part) -> Answer<()> {
        self.ask(method, question)
    }

    /// Waits until the images that were imported for pods have reached the CRI's own store, which hears of them by events.
    pub fn expect_images(&self) -> Result<()> {
        for image in ["pause", "busybox", "probe"] {
            let question = config::ImageStatus {
                image: Some(ImageSpec { image: format!("localhost/{image}:1"), ..Default::default() }),
            };
            wait_for(Duration::from_secs(10), &format!("image {image} in the CRI"), || {
                let path = "/runtime.v1.ImageService/ImageStatus";
                let answer: ImageStatus = self.call(path, question.clone())?;
                Ok(answer.image.is_some_and(|i| !i.id.is_empty()))
            })?;
        }
        Ok(())
    }
}
