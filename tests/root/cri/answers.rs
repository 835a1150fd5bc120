//! What is answered. Field numbers are those of the CRI's api.proto; everything Linux has is here, because everything is compared.

use std::collections::BTreeMap;

use prost::Message;
use serde::Serialize;

use super::config::{ContainerMetadata, ImageSpec, NamespaceOption, Resources, SandboxMetadata};

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct PodIp {
    #[prost(string, tag = "1")]
    pub ip: String,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Network {
    #[prost(string, tag = "1")]
    pub ip: String,
    #[prost(message, repeated, tag = "2")]
    pub additional_ips: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Namespaces {
    #[prost(message, optional, tag = "2")]
    pub options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct LinuxStatus {
    #[prost(message, optional, tag = "1")]
    pub namespaces: Option<Namespaces>,
}

/// State 0 is ready, 1 is not.
#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Sandbox {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<SandboxMetadata>,
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(int64, tag = "4")]
    pub created_at: i64,
    #[prost(message, optional, tag = "5")]
    pub network: Option<Network>,
    #[prost(message, optional, tag = "6")]
    pub linux: Option<LinuxStatus>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "8")]
    pub annotations: BTreeMap<String, String>,
    #[prost(string, tag = "9")]
    pub runtime_handler: String,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct SandboxStatus {
    #[prost(message, optional, tag = "1")]
    pub status: Option<Sandbox>,
    #[prost(btree_map = "string, string", tag = "2")]
    pub info: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    pub containers_statuses: Vec<Container>,
    #[prost(int64, tag = "4")]
    pub timestamp: i64,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ListedSandbox {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<SandboxMetadata>,
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(int64, tag = "4")]
    pub created_at: i64,
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub annotations: BTreeMap<String, String>,
    #[prost(string, tag = "7")]
    pub runtime_handler: String,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Sandboxes {
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<ListedSandbox>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    #[prost(int32, tag = "5")]
    pub propagation: i32,
    #[prost(bool, tag = "8")]
    pub recursive_read_only: bool,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ContainerResources {
    #[prost(message, optional, tag = "1")]
    pub linux: Option<Resources>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct LinuxUser {
    #[prost(int64, tag = "1")]
    pub uid: i64,
    #[prost(int64, tag = "2")]
    pub gid: i64,
    #[prost(int64, repeated, tag = "3")]
    pub supplemental_groups: Vec<i64>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct User {
    #[prost(message, optional, tag = "1")]
    pub linux: Option<LinuxUser>,
}

/// State 0 is created, 1 running, 2 exited, 3 unknown.
#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Container {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<ContainerMetadata>,
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(int64, tag = "4")]
    pub created_at: i64,
    #[prost(int64, tag = "5")]
    pub started_at: i64,
    #[prost(int64, tag = "6")]
    pub finished_at: i64,
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    #[prost(message, optional, tag = "8")]
    pub image: Option<ImageSpec>,
    #[prost(string, tag = "9")]
    pub image_ref: String,
    #[prost(string, tag = "10")]
    pub reason: String,
    #[prost(string, tag = "11")]
    pub message: String,
    #[prost(btree_map = "string, string", tag = "12")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "13")]
    pub annotations: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "14")]
    pub mounts: Vec<Mount>,
    #[prost(string, tag = "15")]
    pub log_path: String,
    #[prost(message, optional, tag = "16")]
    pub resources: Option<ContainerResources>,
    #[prost(string, tag = "17")]
    pub image_id: String,
    #[prost(message, optional, tag = "18")]
    pub user: Option<User>,
    #[prost(int32, tag = "19")]
    pub stop_signal: i32,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ContainerStatus {
    #[prost(message, optional, tag = "1")]
    pub status: Option<Container>,
    #[prost(btree_map = "string, string", tag = "2")]
    pub info: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ListedContainer {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub pod_sandbox_id: String,
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "4")]
    pub image: Option<ImageSpec>,
    #[prost(string, tag = "5")]
    pub image_ref: String,
    #[prost(int32, tag = "6")]
    pub state: i32,
    #[prost(int64, tag = "7")]
    pub created_at: i64,
    #[prost(btree_map = "string, string", tag = "8")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "9")]
    pub annotations: BTreeMap<String, String>,
    #[prost(string, tag = "10")]
    pub image_id: String,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Containers {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<ListedContainer>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ExecOutput {
    #[prost(bytes = "vec", tag = "1")]
    #[serde(serialize_with = "text")]
    pub stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    #[serde(serialize_with = "text")]
    pub stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub exit_code: i32,
}

fn text<S: serde::Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&String::from_utf8_lossy(bytes).escape_debug())
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Url {
    #[prost(string, tag = "1")]
    pub url: String,
}

/// Types: 0 created, 1 started, 2 stopped, 3 deleted.
#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Event {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(int32, tag = "2")]
    pub container_event_type: i32,
    #[prost(int64, tag = "3")]
    pub created_at: i64,
    #[prost(message, optional, tag = "4")]
    pub pod_sandbox_status: Option<Sandbox>,
    #[prost(message, repeated, tag = "5")]
    pub containers_statuses: Vec<Container>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Features {
    #[prost(bool, tag = "1")]
    pub recursive_read_only_mounts: bool,
    #[prost(bool, tag = "2")]
    pub user_namespaces: bool,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Handler {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub features: Option<Features>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Node {
    #[prost(message, repeated, tag = "3")]
    pub runtime_handlers: Vec<Handler>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Image {
    #[prost(string, tag = "1")]
    pub id: String,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ImageStatus {
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
}
