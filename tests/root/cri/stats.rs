//! Statistics of containers and pods. Field numbers are those of the CRI's api.proto.

use std::collections::BTreeMap;

use prost::Message;
use serde::Serialize;

use super::config::{ContainerMetadata, SandboxMetadata};

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Number {
    #[prost(uint64, tag = "1")]
    pub value: u64,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Cpu {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub usage_core_nano_seconds: Option<Number>,
    #[prost(message, optional, tag = "3")]
    pub usage_nano_cores: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Memory {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub working_set_bytes: Option<Number>,
    #[prost(message, optional, tag = "3")]
    pub available_bytes: Option<Number>,
    #[prost(message, optional, tag = "4")]
    pub usage_bytes: Option<Number>,
    #[prost(message, optional, tag = "5")]
    pub rss_bytes: Option<Number>,
    #[prost(message, optional, tag = "6")]
    pub page_faults: Option<Number>,
    #[prost(message, optional, tag = "7")]
    pub major_page_faults: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Swap {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub swap_available_bytes: Option<Number>,
    #[prost(message, optional, tag = "3")]
    pub swap_usage_bytes: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Filesystem {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "3")]
    pub used_bytes: Option<Number>,
    #[prost(message, optional, tag = "4")]
    pub inodes_used: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ContainerAttributes {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<ContainerMetadata>,
    #[prost(btree_map = "string, string", tag = "3")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "4")]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ContainerStats {
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<ContainerAttributes>,
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<Cpu>,
    #[prost(message, optional, tag = "3")]
    pub memory: Option<Memory>,
    #[prost(message, optional, tag = "4")]
    pub writable_layer: Option<Filesystem>,
    #[prost(message, optional, tag = "5")]
    pub swap: Option<Swap>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct OneContainerStats {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<ContainerStats>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ManyContainerStats {
    #[prost(message, repeated, tag = "1")]
    pub stats: Vec<ContainerStats>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Interface {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub rx_bytes: Option<Number>,
    #[prost(message, optional, tag = "3")]
    pub rx_errors: Option<Number>,
    #[prost(message, optional, tag = "4")]
    pub tx_bytes: Option<Number>,
    #[prost(message, optional, tag = "5")]
    pub tx_errors: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct NetworkUsage {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub default_interface: Option<Interface>,
    #[prost(message, repeated, tag = "3")]
    pub interfaces: Vec<Interface>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct Processes {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub process_count: Option<Number>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct LinuxPodStats {
    #[prost(message, optional, tag = "1")]
    pub cpu: Option<Cpu>,
    #[prost(message, optional, tag = "2")]
    pub memory: Option<Memory>,
    #[prost(message, optional, tag = "3")]
    pub network: Option<NetworkUsage>,
    #[prost(message, optional, tag = "4")]
    pub process: Option<Processes>,
    #[prost(message, repeated, tag = "5")]
    pub containers: Vec<ContainerStats>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct PodAttributes {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<SandboxMetadata>,
    #[prost(btree_map = "string, string", tag = "3")]
    pub labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "4")]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct PodStats {
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<PodAttributes>,
    #[prost(message, optional, tag = "2")]
    pub linux: Option<LinuxPodStats>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct OnePodStats {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<PodStats>,
}

#[derive(Clone, PartialEq, Eq, Message, Serialize)]
pub struct ManyPodStats {
    #[prost(message, repeated, tag = "1")]
    pub stats: Vec<PodStats>,
}
