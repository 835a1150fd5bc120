//! The unix socket between the node's agent and a shim: one per container, root only.
//!
//! A request is one message, with descriptors passed along (the peer's connection, a checkpoint file); the shim
//! answers with a stream of [`Event`]s that ends with `Inspected`, `Done` or `Failed`. The bulk of a migration never
//! goes through here.
//!
//! | file | what lives there |
//! |---|---|
//! | `mod.rs` | the messages and where the sockets are |
//! | [`transport`] | length-prefixed JSON with SCM_RIGHTS, blocking |
//! | [`client`] | the agent's side |

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::migrate::protocol::Failure;
use crate::migrate::report::{Report, Round};
use crate::migrate::seal::SealTo;
use crate::migrate::tuning::{OnPostCopyFailure, Tuning};
use crate::net::NetConfig;
use crate::policy::Policy;

pub mod client;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod transport;

/// Everything transship keeps while it runs; on a tmpfs.
pub const RUN_DIR: &str = "/run/transship";

/// The control socket of a container's shim.
pub fn socket_path(namespace: &str, id: &str) -> PathBuf {
    let hash = Sha256::digest(format!("{namespace}/{id}"));
    let hex: String = hash[..16].iter().map(|b| format!("{b:02x}")).collect();
    Path::new(RUN_DIR).join("shim").join(hex + ".sock")
}

/// The marker that tells the shim that the next Create of this container is an incoming one.
pub fn incoming_marker(namespace: &str, id: &str) -> PathBuf {
    Path::new(RUN_DIR).join("incoming").join(namespace).join(format!("{id}.json"))
}

/// What the agent asks of a shim.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// What is this container? Answered by one [`Event::Inspected`].
    Inspect,
    /// Move the container to the peer at the other end of the descriptor passed along (a TCP connection on which
    /// nothing was sent yet).
    Send(SendRequest),
    /// Take the container from the peer at the other end of the descriptor passed along (a TCP connection from which
    /// nothing was read yet), if it is the source: then [`Event::Admitted`] comes first. If not, the answer is `Failed`, nothing was
    /// touched, and the same can be asked again with another connection; several may be asked at once, one is admitted.
    /// The container was created as an incoming one.
    Receive(ReceiveRequest),
    /// Write a checkpoint into the descriptor passed along (a file open for writing). A second one, if the file is to be
    /// encrypted with a passphrase, holds that.
    Checkpoint(CheckpointRequest),
    /// Restore from the descriptor passed along (a checkpoint file). A second one, if it is encrypted, holds the identities
    /// or the passphrase. The container was created as an incoming one.
    Restore(ReceiveRequest),
    /// Give up the migration that runs, if it has not been committed. Answered by `Done` or `Failed`.
    Abort,
    /// End an undecided migration on the source (see [`MigrationState::Undecided`]).
    Resolve {
        /// What the container's fate is.
        decision: Decision,
    },
}

/// The fate of a container whose migration was committed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It runs on the destination: the frozen copy here is killed.
    Moved,
    /// It does not run on the destination and never will: the frozen copy here runs on.
    Stay,
}

/// The node's certificate as PEM texts, so that a shim needs no access to the files.
#[derive(Clone, Serialize, Deserialize)]
pub struct TlsMaterial {
    /// The CA that signs every node.
    pub ca: String,
    /// This node's certificate chain.
    pub cert: String,
    /// This node's key; wiped from memory when it is dropped.
    pub key: Zeroizing<String>,
    /// The CAs' lists of revoked certificates, if there are any.
    #[serde(default)]
    pub crl: Option<String>,
}

impl std::fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsMaterial(..)") // the key must not reach a log
    }
}

/// Limits that both directions of a migration share; from the agent's config.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Silence of the peer that ends a phase, in seconds.
    pub silence_s: u64,
    /// The largest open-but-deleted file that is moved, in bytes.
    pub ghost_limit: u32,
    /// CRIU, if not the one in PATH.
    #[serde(default)]
    pub criu: Option<PathBuf>,
    /// Bytes of memory pages that a destination takes; more is refused while it arrives.
    #[serde(default = "no_cap")]
    pub memory_cap: u64,
    /// How many containers may stand still on the source at the same time; 0: any number.
    #[serde(default)]
    pub max_frozen: u32,
    /// Where images live; on a tmpfs. Each migration has a directory of its own in it.
    pub images_dir: PathBuf,
    /// What a container that arrives may be.
    #[serde(default)]
    pub policy: Policy,
}

fn no_cap() -> u64 {
    u64::MAX
}

/// See [`Request::Send`].
#[derive(Clone, Serialize, Deserialize)]
pub struct SendRequest {
    /// The migration, as the destination's agent named it.
    pub migration_id: String,
    /// The one-time ticket that goes with it.
    pub ticket: String,
    /// This node's name, for reports and errors.
    pub node: String,
    /// The destination's name: its certificate must say so.
    pub peer: String,
    /// Where the destination's agent is, for who asks it what became of the migration.
    #[serde(default)]
    pub address: String,
    /// What the operator chose.
    #[serde(default)]
    pub tuning: Tuning,
    /// This node's certificate.
    pub tls: TlsMaterial,
    /// Limits.
    pub limits: Limits,
}

impl std::fmt::Debug for SendRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SendRequest({} to {})", self.migration_id, self.peer) // the ticket must not reach a log
    }
}

/// See [`Request::Receive`] and [`Request::Restore`] (which needs no ticket, peer or certificate).
#[derive(Clone, Serialize, Deserialize)]
pub struct ReceiveRequest {
    /// The migration.
    pub migration_id: String,
    /// The ticket that the source must show.
    #[serde(default)]
    pub ticket: String,
    /// This node's name, for reports and errors.
    pub node: String,
    /// The source's name: its certificate must say so.
    #[serde(default)]
    pub peer: String,
    /// This node's certificate.
    #[serde(default)]
    pub tls: Option<TlsMaterial>,
    /// Limits.
    pub limits: Limits,
    /// The network namespace that was built for the container (fenced), if it has one of its own.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// What to announce once the tasks run.
    #[serde(default)]
    pub net: Option<NetConfig>,
    /// What is to be done if the source is lost while memory still follows.
    #[serde(default)]
    pub on_post_copy_failure: OnPostCopyFailure,
}

impl std::fmt::Debug for ReceiveRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReceiveRequest({} from {})", self.migration_id, self.peer) // the ticket must not reach a log
    }
}

/// See [`Request::Checkpoint`].
#[derive(Clone, Serialize, Deserialize)]
pub struct CheckpointRequest {
    /// A name for this checkpoint; the images directory uses it.
    pub migration_id: String,
    /// This node's name.
    pub node: String,
    /// Kill the container once its checkpoint is complete; otherwise it runs on.
    pub stop: bool,
    /// What the agent needs to make the container anew.
    pub container: serde_json::Value,
    /// Limits.
    pub limits: Limits,
    /// Encrypt the file.
    #[serde(default)]
    pub seal: Option<SealTo>,
}

impl std::fmt::Debug for CheckpointRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CheckpointRequest({})", self.migration_id) // the container's spec must not reach a log
    }
}

/// What a shim answers, in order; the last one is `Inspected`, `Done` or `Failed`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The answer to [`Request::Inspect`].
    Inspected(Inspected),
    /// The peer of a [`Request::Receive`] has shown the source's certificate and the ticket: the migration begins.
    Admitted,
    /// A phase began.
    Phase {
        /// Its name, as in [`crate::migrate::report::Phase`].
        phase: String,
    },
    /// How far the phase or the round is.
    Progress {
        /// Bytes of it done; where no total is known, bytes sent or received since the start of the migration.
        bytes: u64,
        /// Bytes of it in all, as far as known.
        #[serde(default)]
        total: Option<u64>,
    },
    /// A round of copying begins, the container running.
    Round {
        /// Counted from 1.
        n: u32,
        /// Bytes of memory in it, as far as known; its [`Event::Progress`] counts against them.
        #[serde(default)]
        total: Option<u64>,
    },
    /// A round ended.
    RoundDone {
        /// What it did.
        round: Round,
    },
    /// The container runs on the destination; this much of its memory has followed.
    PostCopy {
        /// Bytes that have followed.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Something worth telling that is no failure.
    Warning {
        /// A sentence.
        message: String,
    },
    /// After the commit the answer was lost: the container here stays frozen until it is resolved.
    Undecided {
        /// What was lost.
        message: String,
    },
    /// The request was carried out.
    Done {
        /// What was measured (empty where nothing was).
        report: Report,
    },
    /// The request failed; `running` says what the container here does now.
    Failed {
        /// Why.
        failure: Failure,
        /// `running`, `frozen`, `stopped` or `removed`: the state of the container on this side.
        state: String,
    },
}

impl Event {
    /// Whether nothing follows this event.
    pub fn is_last(&self) -> bool {
        matches!(self, Event::Inspected(_) | Event::Done { .. } | Event::Failed { .. })
    }
}

/// What a shim knows of its container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inspected {
    /// The shim's version.
    pub version: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// `created`, `running`, `paused`, `stopped` or `incoming`.
    pub status: String,
    /// The init's pid on this node, 0 where there is none.
    pub pid: u32,
    /// The bundle.
    pub bundle: PathBuf,
    /// Which kinds its stdio streams are (the shim's own type; opaque to the agent, passed through).
    #[serde(default)]
    pub stdio: serde_json::Value,
    /// The runtime binary in use, e.g. `runc`.
    #[serde(default)]
    pub runtime: String,
    /// Live exec sessions: they cannot be moved.
    #[serde(default)]
    pub execs: Vec<String>,
    /// It knows [`CheckpointRequest::seal`]: an older shim would write the file as it is.
    #[serde(default)]
    pub seals: bool,
    /// What a migration does here.
    #[serde(default)]
    pub migration: MigrationState,
}

/// Where a container stands between two nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MigrationState {
    /// Not moving.
    #[default]
    Idle,
    /// It is being sent away.
    Sending {
        /// The migration.
        migration_id: String,
    },
    /// It is arriving.
    Receiving {
        /// The migration.
        migration_id: String,
    },
    /// The commit was sent and no answer came: frozen here until it is known what became of it there.
    Undecided {
        /// The migration.
        migration_id: String,
        /// The destination.
        peer: String,
        /// Where its agent is.
        #[serde(default)]
        address: String,
    },
    /// It runs on another node; what is left here is being removed.
    Moved {
        /// The migration.
        migration_id: String,
    },
    /// It arrived here by this migration.
    Arrived {
        /// The migration.
        migration_id: String,
    },
    /// It runs here, and memory of it is still on the source (post-copy, destination). It cannot be moved again until it is
    /// [`MigrationState::Arrived`].
    Filling {
        /// The migration.
        migration_id: String,
        /// The source.
        peer: String,
        /// Bytes that are still there.
        left: u64,
    },
    /// It runs on the destination, and memory of it is still here (post-copy, source): frozen and needed.
    Feeding {
        /// The migration.
        migration_id: String,
        /// The destination.
        peer: String,
        /// Bytes that are still here.
        left: u64,
    },
    /// Memory that was still on the source was lost in the post-copy: the container was killed here.
    Lost {
        /// The migration.
        migration_id: String,
        /// The other node.
        peer: String,
        /// Bytes that were lost.
        bytes: u64,
        /// What was chosen for this case: nothing more, or that the source runs it on from its freeze.
        choice: OnPostCopyFailure,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_are_short_whatever_the_names() {
        let p = socket_path(&"n".repeat(76), &"i".repeat(200));
        assert!(p.as_os_str().len() < 100);
        assert_ne!(socket_path("a", "b/c"), socket_path("a", "b"));
    }

    #[test]
    fn the_marker_is_per_namespace() {
        assert_eq!(incoming_marker("k8s.io", "c1"), Path::new("/run/transship/incoming/k8s.io/c1.json"));
    }

    #[test]
    fn the_key_never_shows_in_debug_output() {
        let m =
            TlsMaterial { ca: "ca".into(), cert: "c".into(), key: "SECRET".to_string().into(), crl: None };
        assert!(!format!("{m:?}").contains("SECRET"));
    }

    #[test]
    fn no_message_shows_a_secret_in_debug_output() {
        let limits: Limits = serde_json::from_value(serde_json::json!({
            "silence_s": 1, "ghost_limit": 1, "images_dir": "/i"
        }))
        .unwrap();
        let secret = "SECRET".to_string();
        let spec = serde_json::json!({ "process": { "env": ["PASSWORD=SECRET"] } });
        let tls = TlsMaterial { ca: "ca".into(), cert: "c".into(), key: secret.clone().into(), crl: None };
        let send: SendRequest = serde_json::from_value(serde_json::json!({
            "migration_id": "m", "ticket": secret, "node": "a", "peer": "b", "tls": tls, "limits": limits
        }))
        .unwrap();
        let receive: ReceiveRequest = serde_json::from_value(serde_json::json!({
            "migration_id": "m", "ticket": secret, "node": "a", "tls": tls, "limits": limits
        }))
        .unwrap();
        let checkpoint: CheckpointRequest = serde_json::from_value(serde_json::json!({
            "migration_id": "m", "node": "a", "stop": false, "container": spec, "limits": limits
        }))
        .unwrap();
        let hello: crate::migrate::protocol::Hello = serde_json::from_value(serde_json::json!({
            "oldest": 1, "newest": 1, "migration_id": "m", "ticket": secret
        }))
        .unwrap();
        let manifest = crate::migrate::protocol::Manifest { container: spec.clone(), ..Default::default() };
        let value = b"SECRET".to_vec();
        let extension = crate::containerd::record::Opaque { type_url: "x".into(), value };
        let record = crate::containerd::record::Record {
            spec,
            extensions: [("x".to_string(), extension)].into(),
            ..Default::default()
        };
        let offer = crate::agent::message::Offer { record, ..Default::default() };
        let ready = crate::agent::message::Ready { ticket: secret, ..Default::default() };
        let shown = format!(
            "{:?} {:?} {:?} {hello:?} {manifest:?} {:?} {ready:?}",
            Request::Send(send),
            Request::Receive(receive),
            Request::Checkpoint(checkpoint),
            crate::agent::message::Message::Offer(Box::new(offer)),
        );
        // as text, and as Debug shows bytes
        assert!(!shown.contains("SECRET") && !shown.contains("83, 69, 67"), "{shown}");
    }

    #[test]
    fn events_survive_json() {
        let e = Event::Failed { failure: Failure::default(), state: "running".into() };
        let back: Event = serde_json::from_str(&serde_json::to_string(&e).unwrap()).unwrap();
        assert!(back.is_last());
        let i = Event::Inspected(Inspected { migration: MigrationState::Idle, ..Default::default() });
        let back: Event = serde_json::from_str(&serde_json::to_string(&i).unwrap()).unwrap();
        assert!(matches!(back, Event::Inspected(x) if x.migration == MigrationState::Idle));
    }
}
