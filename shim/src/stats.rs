//! stub
use containerd_shim_protos::protobuf::well_known_types::any::Any;
pub fn collect(_pid: u32) -> anyhow::Result<Any> { anyhow::bail!("stub") }
