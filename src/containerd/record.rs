//! Container records: what containerd keeps of a container that need not run, in the form in which they travel.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result};
use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest, ListContainersRequest,
    container::Runtime, containers_client::ContainersClient,
};
use prost_types::Any;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::client::{Asked, MAX_MESSAGE, Namespace, found, gone};

/// A protobuf `Any`, opaque here.
#[derive(Serialize, Deserialize, Clone, Default, PartialEq, Eq)]
pub struct Opaque {
    /// The type's name.
    pub type_url: String,
    /// The message's bytes; hexadecimal in JSON.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub value: Vec<u8>,
}

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opaque({}, {} bytes)", self.type_url, self.value.len()) // CRI keeps a container's environment in one
    }
}

fn to_hex<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&bytes.iter().map(|b| format!("{b:02x}")).collect::<String>())
}

fn from_hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.as_bytes();
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    if !digits.len().is_multiple_of(2) {
        return Err(serde::de::Error::custom("an odd number of hexadecimal digits"));
    }
    digits
        .chunks(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect::<Option<_>>()
        .ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
}

impl From<Any> for Opaque {
    fn from(any: Any) -> Self {
        Opaque { type_url: any.type_url, value: any.value }
    }
}

impl From<Opaque> for Any {
    fn from(opaque: Opaque) -> Self {
        Any { type_url: opaque.type_url, value: opaque.value }
    }
}

/// A container's record.
#[derive(Serialize, Deserialize, Clone, Default, PartialEq)]
#[serde(default)]
pub struct Record {
    /// The container's id.
    pub id: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The name of the image it was made of; may be empty.
    pub image: String,
    /// The runtime, for instance `io.containerd.transship.v2`.
    pub runtime: String,
    /// The runtime's options.
    pub runtime_options: Option<Opaque>,
    /// The OCI spec; `null` if there is none.
    pub spec: serde_json::Value,
    /// The type under which the spec is kept.
    pub spec_type: String,
    /// The snapshotter that holds its writable layer.
    pub snapshotter: String,
    /// The writable layer's key there.
    pub snapshot_key: String,
    /// What others keep with it.
    pub extensions: BTreeMap<String, Opaque>,
    /// The sandbox it belongs to; empty outside of a pod.
    pub sandbox: String,
    /// When this record was made, seconds and nanoseconds: tells it from another one of the same id. Only what containerd says of its own.
    #[serde(skip)]
    pub created: Option<(i64, i32)>,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Record({} of {})", self.id, self.image) // the spec has the environment and the arguments
    }
}

impl TryFrom<Container> for Record {
    type Error = anyhow::Error;

    fn try_from(container: Container) -> Result<Record> {
        let spec = container.spec.unwrap_or_default();
        let runtime = container.runtime.unwrap_or_default();
        Ok(Record {
            spec: if spec.value.is_empty() {
                serde_json::Value::Null
            } else {
                serde_json::from_slice(&spec.value)
                    .with_context(|| format!("the spec of container {}", container.id))?
            },
            spec_type: spec.type_url,
            created: container.created_at.map(|at| (at.seconds, at.nanos)),
            id: container.id,
            labels: container.labels.into_iter().collect(),
            image: container.image,
            runtime: runtime.name,
            runtime_options: runtime.options.map(Opaque::from),
            snapshotter: container.snapshotter,
            snapshot_key: container.snapshot_key,
            extensions: container.extensions.into_iter().map(|(k, v)| (k, v.into())).collect(),
            sandbox: container.sandbox,
        })
    }
}

impl From<Record> for Container {
    fn from(record: Record) -> Container {
        let spec = Any { type_url: record.spec_type, value: record.spec.to_string().into_bytes() };
        Container {
            id: record.id,
            labels: record.labels.into_iter().collect(),
            image: record.image,
            runtime: Some(Runtime { name: record.runtime, options: record.runtime_options.map(Any::from) }),
            spec: (!record.spec.is_null()).then_some(spec),
            snapshotter: record.snapshotter,
            snapshot_key: record.snapshot_key,
            extensions: record.extensions.into_iter().map(|(k, v)| (k, v.into())).collect(),
            sandbox: record.sandbox,
            ..Default::default()
        }
    }
}

impl Namespace {
    fn containers(&self) -> ContainersClient<containerd_client::tonic::transport::Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A container's record; `None` if there is no such container.
    pub async fn container(&self, id: &str) -> Result<Option<Record>> {
        let request = self.request(GetContainerRequest { id: id.to_string() });
        let answer = self.containers().get(request).await.asked(|| format!("reading container {id}"));
        found(answer)?.and_then(|a| a.container).map(Record::try_from).transpose()
    }

    /// All container records.
    pub async fn container_list(&self) -> Result<Vec<Record>> {
        let request = self.request(ListContainersRequest { filters: Vec::new() });
        let answer = self.containers().list(request).await.asked(|| "listing containers".into())?;
        answer.containers.into_iter().map(Record::try_from).collect()
    }

    /// Makes a container's record.
    pub async fn container_create(&self, record: Record) -> Result<()> {
        let id = record.id.clone();
        let request = self.request(CreateContainerRequest { container: Some(record.into()) });
        self.containers().create(request).await.asked(|| format!("creating container {id}"))?;
        Ok(())
    }

    /// Deletes a container's record; fine if there is none.
    pub async fn container_delete(&self, id: &str) -> Result<()> {
        let request = self.request(DeleteContainerRequest { id: id.to_string() });
        gone(self.containers().delete(request).await.asked(|| format!("deleting container {id}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_travel_unchanged() {
        let container = Container {
            id: "c".into(),
            labels: [("a".to_string(), "b".to_string())].into(),
            image: "docker.io/library/redis:7".into(),
            runtime: Some(Runtime {
                name: "io.containerd.transship.v2".into(),
                options: Some(Any { type_url: "t".into(), value: vec![0, 255, 16] }),
            }),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: br#"{"ociVersion":"1.1.0","process":{"rlimits":[{"hard":18446744073709551615}]}}"#
                    .to_vec(),
            }),
            snapshotter: "overlayfs".into(),
            snapshot_key: "c".into(),
            ..Default::default()
        };
        let record = Record::try_from(container.clone()).unwrap();
        let json = serde_json::to_string(&record).unwrap();
        let back: Record = serde_json::from_str(&json).unwrap();
        assert_eq!(back, record);
        assert_eq!(Container::from(back), container);
        assert!(serde_json::from_str::<Opaque>(r#"{"type_url":"","value":"0"}"#).is_err());
        assert!(serde_json::from_str::<Opaque>(r#"{"type_url":"","value":"zz"}"#).is_err());
    }
}
