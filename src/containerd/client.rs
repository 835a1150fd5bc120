//! The connection to containerd, the headers that each call carries, and errors that say what was asked.

use std::{fmt, path::Path};

use anyhow::{Context, Result};
use containerd_client::{
    services::v1::{
        ListNamespacesRequest, namespaces_client::NamespacesClient, version_client::VersionClient,
    },
    tonic::{
        Code, Request, Response, Status,
        metadata::{Ascii, MetadataValue},
        transport::Channel,
    },
};

/// Where containerd listens by default.
pub const DEFAULT_SOCKET: &str = "/run/containerd/containerd.sock";

/// The largest answer accepted, in bytes; containerd's own limit. tonic's default of 4 MiB is less than a long list.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// A connection to containerd; clones share it.
#[derive(Clone, Debug)]
pub struct Containerd {
    channel: Channel,
}

impl Containerd {
    /// Connects to the socket.
    ///
    /// # Errors
    /// Nothing listens there.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let channel = containerd_client::connect(socket).await.map_err(|error| {
            // tonic says only "transport error"; what went wrong is its source
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            anyhow::anyhow!("containerd at {}: {}", socket.display(), cause.unwrap_or(error.to_string()))
        })?;
        Ok(Containerd { channel })
    }

    /// containerd's version, as it says it.
    pub async fn version(&self) -> Result<String> {
        let answer = VersionClient::new(self.channel.clone()).version(()).await;
        Ok(answer.asked(|| "containerd's version".into())?.version)
    }

    /// The namespaces there are.
    pub async fn namespaces(&self) -> Result<Vec<String>> {
        let request = ListNamespacesRequest { filter: String::new() };
        let answer = NamespacesClient::new(self.channel.clone()).list(request).await;
        let list = answer.asked(|| "listing namespaces".into())?.namespaces;
        Ok(list.into_iter().map(|n| n.name).collect())
    }

    /// Calls in one namespace.
    ///
    /// # Errors
    /// The name cannot be sent in a header.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        let header = name.parse().with_context(|| format!("{name:?} is no namespace"))?;
        Ok(Namespace { channel: self.channel.clone(), name: name.to_string(), header, lease: None })
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

/// Calls in one namespace, perhaps under a lease: what they make is then kept as long as the lease is.
#[derive(Clone, Debug)]
pub struct Namespace {
    pub(crate) channel: Channel,
    name: String,
    header: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Namespace {
    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same namespace, under a lease.
    ///
    /// # Errors
    /// The id cannot be sent in a header.
    pub fn under_lease(&self, id: &str) -> Result<Namespace> {
        let lease = id.parse().with_context(|| format!("{id:?} is no lease"))?;
        Ok(Namespace { lease: Some(lease), ..self.clone() })
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.header.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }
}

/// What containerd answered in place of a result.
#[derive(Clone, Debug)]
pub struct CallError {
    /// gRPC's code.
    pub code: Code,
    /// containerd's words.
    pub message: String,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() { write!(f, "{:?}", self.code) } else { f.write_str(&self.message) }
    }
}

impl std::error::Error for CallError {}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        CallError { code: status.code(), message: status.message().to_string() }
    }
}

/// containerd's code, if the error is an answer of containerd.
pub fn code(error: &anyhow::Error) -> Option<Code> {
    error.downcast_ref::<CallError>().map(|e| e.code)
}

/// Did containerd say that something does not exist?
pub fn is_not_found(error: &anyhow::Error) -> bool {
    code(error) == Some(Code::NotFound)
}

/// Did containerd say that something exists already?
pub fn is_already_exists(error: &anyhow::Error) -> bool {
    code(error) == Some(Code::AlreadyExists)
}

/// An answer with what was asked as the error's context.
pub(crate) trait Asked<T> {
    fn asked(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Asked<T> for Result<Response<T>, Status> {
    fn asked(self, what: impl FnOnce() -> String) -> Result<T> {
        match self {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(anyhow::Error::new(CallError::from(status)).context(what())),
        }
    }
}

/// `None` where containerd says that it does not exist.
pub(crate) fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_not_found(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Success also where containerd says that it does not exist: what is to be gone is gone.
pub(crate) fn gone(result: Result<()>) -> Result<()> {
    found(result).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_contexts() {
        let answer: Result<Response<()>, Status> = Err(Status::not_found("container \"x\": not found"));
        let error = answer.asked(|| "reading x".into()).context("outer").unwrap_err();
        assert!(is_not_found(&error) && !is_already_exists(&error));
        assert_eq!(format!("{error:#}"), "outer: reading x: container \"x\": not found");
        assert!(gone(Err(error)).is_ok());
        assert!(gone(Err(anyhow::anyhow!("else"))).is_err());
    }

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = Containerd::connect(Path::new("/nonexistent.sock")).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent.sock"), "{error}");
    }
}
