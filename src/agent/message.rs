//! What two agents say to each other. Data only.
//!
//! ```text
//! source's agent                              destination's agent
//!   Hello (versions, node, what is      ->    may it? (admission)
//!     to be moved, ticket)              <-    Hello | Refused
//!   Offer                               ->    preflight
//!                                       <-    Refused | Need (blobs it lacks)
//!   Blob, its bytes, ...                ->    lease, image, snapshot, network namespace, container, task
//!                                       <-    Ready (migration, its secret)
//!   (the shims move the container over a connection of their own; or, cold: Layer, its entries, LayerEnd)
//!                                       <-    Started | Failed (everything is undone)
//!   Cancel, at any time before the end  ->
//! ```
//!
//! Messages are JSON; unknown fields are skipped and missing ones have defaults, so that a field can be added without
//! a new protocol version.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::host::HostFacts;
use crate::{
    containerd::{
        image::{Blob, ImageRecord},
        record::Record,
    },
    migrate::{protocol::Failure, shown, tuning::OnPostCopyFailure},
    net::NetConfig,
};

/// Oldest and newest version of this protocol that this build speaks.
pub const VERSIONS: (u32, u32) = (2, 2);

/// One message between two agents.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(tag = "says", rename_all = "snake_case")]
pub enum Message {
    /// The first of each side.
    Hello(Hello),
    /// A container to be moved.
    Offer(Box<Offer>),
    /// The destination lacks these blobs (digests of the offer, in its order).
    Need {
        /// Digests.
        digests: Vec<String>,
    },
    /// A blob's bytes follow as data frames, `size` of them.
    Blob {
        /// Its digest.
        digest: String,
        /// Its size in bytes.
        size: u64,
    },
    /// What the destination does, for the operator.
    Progress {
        /// `blobs`, `unpack`, `layer`.
        #[serde(deserialize_with = "shown::line")]
        what: String,
        /// So much of it.
        done: u64,
        /// Of so much.
        total: u64,
    },
    /// Something the operator should know.
    Warning {
        /// One sentence.
        #[serde(deserialize_with = "shown::line")]
        message: String,
    },
    /// The destination does not want the container; nothing was made there.
    Refused(Refusal),
    /// Everything is prepared; the shims may talk.
    Ready(Ready),
    /// The writable layer of a container that does not run: entries and data follow as frames of their own kinds.
    Layer,
    /// The end of the writable layer.
    LayerEnd,
    /// The source gives up (before the commit).
    Cancel {
        /// Why.
        #[serde(deserialize_with = "shown::line")]
        reason: String,
    },
    /// The container is the destination's; it runs there, unless it was moved cold.
    Started(Started),
    /// The destination gave up before the commit.
    Failed {
        /// Why.
        failure: Failure,
        /// What could not be undone there; empty: nothing was left.
        #[serde(deserialize_with = "shown::lines")]
        left: Vec<String>,
    },
    /// In place of an offer: what became of this migration, whose answer was lost?
    Ask {
        /// The migration.
        migration: String,
    },
    /// The answer to [`Message::Ask`].
    Fate {
        /// What became of it.
        fate: super::outcome::Fate,
    },
    /// Nothing to say, but still there. Never reaches the receiver's logic.
    Alive,
}

/// See [`Message::Hello`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Hello {
    /// Oldest protocol version spoken.
    pub oldest: u32,
    /// Newest protocol version spoken.
    pub newest: u32,
    /// The software's version.
    pub software: String,
    /// The node's name.
    pub node: String,
    /// What it wants to move to the other node. Without it the peer may ask, and not offer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moving: Option<MoveAsked>,
}

/// See [`Hello::moving`].
#[derive(Serialize, Deserialize, Clone, Default, PartialEq, Eq)]
#[serde(default)]
pub struct MoveAsked {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The ticket of the destination's operator; empty: none.
    pub ticket: String,
}

impl std::fmt::Debug for MoveAsked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MoveAsked({:?}/{:?})", self.namespace, self.container) // the ticket must not reach a log
    }
}

/// A container to be moved.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Offer {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's record.
    pub record: Record,
    /// The image it was made of.
    pub image: ImageRecord,
    /// The image's blobs, children before parents.
    pub blobs: Vec<Blob>,
    /// The snapshot on which its writable layer lies.
    pub chain: String,
    /// Its network; `None` for a cold move (its network namespace is then made by who starts it).
    pub net: Option<NetConfig>,
    /// Which kinds its stdio streams are, as its shim says.
    pub stdio_kinds: serde_json::Value,
    /// Its standard input, output and error as given to containerd.
    pub stdio: [String; 3],
    /// It has a terminal.
    pub terminal: bool,
    /// About how much memory has to be moved, in bytes.
    pub memory: u64,
    /// Of that, shared memory.
    pub shared_memory: u64,
    /// Bytes of private memory that will be given to the processes page by page, once each has all of its own; 0 where memory is to
    /// be restored from images, or where the source does not say.
    pub paged_memory: u64,
    /// Bytes of the writable layer.
    pub layer: u64,
    /// The node it runs on.
    pub host: HostFacts,
    /// The OCI runtime under it, for instance `runc`.
    pub runtime: String,
    /// Record, image and writable layer only.
    pub cold: bool,
    /// The operator does not want CPU features compared.
    pub ignore_cpu: bool,
    /// Seconds of silence that end a phase; 0: the destination's own limit.
    pub silence_seconds: u64,
    /// Largest open-but-deleted file, in bytes; 0: the destination's own limit.
    pub ghost_limit: u64,
    /// What is to be done if the source is lost while memory still follows (post-copy).
    pub on_post_copy_failure: OnPostCopyFailure,
}

/// The most blobs in an offer: what an image may have ([`crate::containerd::image`]), and its documents.
const MAX_BLOBS: usize = 1100;

impl Offer {
    /// The offer's own measure, before anything of it is looked up.
    ///
    /// # Errors
    /// It is too much.
    pub fn check_size(&self, max_image_bytes: u64) -> Result<(), Refusal> {
        let no = |message: String, advice: &str| {
            Err(Refusal { code: "size".into(), message, advice: advice.into() })
        };
        if self.blobs.len() > MAX_BLOBS {
            return no(
                format!("its image has {} blobs, at most {MAX_BLOBS} are taken", self.blobs.len()),
                "",
            );
        }
        // what does not fit into the sum is too much as well
        let total = self.blobs.iter().try_fold(0u64, |sum, blob| sum.checked_add(blob.size));
        match total {
            Some(total) if total <= max_image_bytes => Ok(()),
            _ => no(
                format!("its image has more than the {max_image_bytes} bytes that this node takes"),
                "raise `max_image_bytes` in this node's agent.toml",
            ),
        }
    }
}

/// Why a destination does not want a container.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Refusal {
    /// A word for programs: `version`, `name`, `memory`, `room`, `cpu`, `mounts`, ...
    #[serde(deserialize_with = "shown::line")]
    pub code: String,
    /// What is wrong, one sentence.
    #[serde(deserialize_with = "shown::line")]
    pub message: String,
    /// What to do about it.
    #[serde(deserialize_with = "shown::line")]
    pub advice: String,
}

/// See [`Message::Ready`].
#[derive(Serialize, Deserialize, Clone, Default)]
#[serde(default)]
pub struct Ready {
    /// The migration.
    #[serde(deserialize_with = "shown::line")]
    pub migration: String,
    /// The migration's secret, which the source's shim shows to the destination's; hexadecimal.
    pub ticket: String,
    /// Where the output will go.
    #[serde(deserialize_with = "shown::line")]
    pub stdio: String,
    /// Bytes of blobs that were sent.
    pub blob_bytes: u64,
    /// Where the container's network namespace was made.
    pub netns: Option<PathBuf>,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ready({})", self.migration) // the ticket must not reach a log
    }
}

/// See [`Message::Started`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Started {
    /// The init's pid on the destination; 0 for a cold move.
    pub pid: u32,
    /// What the operator should know.
    #[serde(deserialize_with = "shown::lines")]
    pub warnings: Vec<String>,
    /// Bytes of memory that are still on the source (post-copy).
    pub left: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_that_is_too_much_is_refused_by_its_numbers() {
        let offer = |sizes: &[u64]| Offer {
            blobs: sizes.iter().map(|size| Blob { size: *size, ..Blob::default() }).collect(),
            ..Offer::default()
        };
        offer(&[]).check_size(0).unwrap();
        offer(&[60, 40]).check_size(100).unwrap();
        offer(&[60, 41]).check_size(100).unwrap_err();
        offer(&[u64::MAX, 2]).check_size(u64::MAX - 1).unwrap_err();
        let many = offer(&vec![0; MAX_BLOBS + 1]).check_size(100).unwrap_err();
        assert!(many.code == "size" && many.message.contains("1101"));
    }

    #[test]
    fn a_ticket_is_in_no_log_and_in_the_message() {
        let asked = MoveAsked { namespace: "n".into(), container: "c".into(), ticket: "SECRET".into() };
        let hello = Hello { moving: Some(asked), ..Hello::default() };
        assert!(!format!("{hello:?}").contains("SECRET"));
        assert!(serde_json::to_string(&hello).unwrap().contains("SECRET"));
        assert!(!serde_json::to_string(&Hello::default()).unwrap().contains("moving"));
    }
}
