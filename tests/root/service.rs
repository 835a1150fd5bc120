//! containerd's Task service in a node, called as its own clients do: for what ctr offers for runc's runtime only, or not at all.

use anyhow::{Context, Result};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{CheckpointTaskRequest, UpdateTaskRequest};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::Channel;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use prost_types::Any;

use crate::bed::{Bed, Node};

fn call<T>(bed: &Bed, node: Node, ask: impl AsyncFnOnce(TasksClient<Channel>) -> Result<T>) -> Result<T> {
    let socket = bed.path(node, "/run/containerd/containerd.sock")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = containerd_client::connect(&socket).await.context("containerd")?;
        ask(TasksClient::new(channel)).await
    })
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "default".parse().expect("a header"));
    request
}

/// `ctr task checkpoint [--exit] [--image-path DIR]` as ctr asks for it of a task of runc's runtime.
pub fn checkpoint(bed: &Bed, node: Node, id: &str, exit: bool, image_path: &str) -> Result<()> {
    let options = CheckpointOptions { exit, image_path: image_path.into(), ..Default::default() };
    let options =
        Any { type_url: "containerd.runc.v1.CheckpointOptions".into(), value: options.write_to_bytes()? };
    let message =
        CheckpointTaskRequest { container_id: id.into(), options: Some(options), ..Default::default() };
    call(bed, node, async |mut tasks| {
        tasks.checkpoint(request(message)).await?;
        Ok(())
    })
}

/// New limits for a task: OCI's LinuxResources as JSON.
pub fn update(bed: &Bed, node: Node, id: &str, resources: &str) -> Result<()> {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: resources.into(),
    };
    let message =
        UpdateTaskRequest { container_id: id.into(), resources: Some(resources), ..Default::default() };
    call(bed, node, async |mut tasks| {
        tasks.update(request(message)).await?;
        Ok(())
    })
}
