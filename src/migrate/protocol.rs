//! The messages of a migration and the choice of a version. Pure: no I/O here.
//!
//! Messages are JSON (unknown fields are skipped, missing ones have defaults), bulk data is raw
//! ([`super::stream`]). What changes the meaning of a stream raises [`VERSION`].

use serde::{Deserialize, Serialize};

use super::shown;

/// The newest protocol that this build speaks.
pub const VERSION: u32 = 4;
/// The first protocol in which memory travels while the container runs.
pub const LIVE: u32 = 2;
/// The first one in which the content of tmpfs files does so as well.
pub const TMPFS: u32 = 3;
/// The first one in which a long list of pages is sent as bits.
pub const BITS: u32 = 4;
/// The format of a checkpoint file: the newest protocol that changed what is in one.
pub const FORMAT: u32 = 2;
/// The oldest protocol that this build still speaks.
pub const OLDEST: u32 = 1;
/// ALPN of a connection between two shims.
pub const ALPN_DATA: &[u8] = b"transship-data/1";
/// ALPN of a connection between two agents.
pub const ALPN_CONTROL: &[u8] = b"transship-control/1";

/// The newest version that both sides speak.
///
/// # Errors
/// A sentence that names both ranges, for the operator.
pub fn select(mine: (u32, u32), theirs: (u32, u32)) -> Result<u32, String> {
    let newest = mine.1.min(theirs.1);
    if newest >= mine.0.max(theirs.0) {
        return Ok(newest);
    }
    Err(format!(
        "no common protocol version: this node speaks {} to {}, the peer {} to {}; install the same transship on both",
        mine.0, mine.1, theirs.0, theirs.1
    ))
}

/// The name that the source asks for in TLS (SNI) so that the destination's agent knows, before any handshake,
/// which shim the connection is for. No secret: the ticket is inside.
pub fn server_name(migration_id: &str) -> String {
    format!("{migration_id}.migration.transship")
}

/// The migration that such a name is for: 1 to 63 characters of `[a-z0-9-]` in front of the fixed suffix.
pub fn migration_of(server_name: &str) -> Option<&str> {
    let id = server_name.strip_suffix(".migration.transship")?;
    let fine = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=63).contains(&id.len()).then_some(())?;
    id.bytes().all(fine).then_some(id)
}

/// The source's first message to the destination's shim.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol that the source speaks.
    pub oldest: u32,
    /// Newest protocol that the source speaks.
    pub newest: u32,
    /// The migration, as in the ticket.
    pub migration_id: String,
    /// The one-time ticket that the destination's agent gave for it.
    pub ticket: String,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hello({})", self.migration_id) // the ticket must not reach a log
    }
}

/// The destination's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol that is spoken from here on.
    pub version: u32,
}

/// What the stream holds; in a checkpoint file the agents' part lets the container be made anew.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the stream's format.
    pub version: u32,
    /// CRIU that makes the dump, as `major.minor.sublevel`.
    #[serde(default)]
    pub criu: String,
    /// The shim's stdio kinds (opaque here).
    #[serde(default)]
    pub stdio: serde_json::Value,
    /// What the agent needs to make the container (opaque here; empty between shims).
    #[serde(default)]
    pub container: serde_json::Value,
    /// Memory and layer come in rounds before the freeze; otherwise all of it comes once, in the freeze.
    #[serde(default)]
    pub live: bool,
    /// CRIU dumps inside the container's network namespace, and has to restore inside its counterpart.
    #[serde(default)]
    pub in_netns: bool,
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Manifest(version {}, CRIU {})", self.version, self.criu) // the container's spec must not reach a log
    }
}

/// A round of copying begins (the container runs).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Counted from 1.
    pub n: u32,
    /// Bytes of memory that it will bring, about.
    #[serde(default)]
    pub bytes: u64,
}

/// The source is about to freeze: the destination makes everything ready that it can.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prepare {}

/// The destination waits for the rest with everything else done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ready {}

/// Every page is in its place on the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// What the tasks waited for.
    #[serde(default)]
    pub faults: super::report::Faults,
    /// The most that the page store held, bytes.
    #[serde(default)]
    pub store_peak_bytes: u64,
    /// Bytes placed in the background.
    #[serde(default)]
    pub fill_bytes: u64,
    /// Milliseconds from the tasks' first instruction until every page was in its place.
    #[serde(default)]
    pub fill_ms: f64,
}

/// The source's tasks stand still from here on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    /// Processes in the frozen cgroup.
    #[serde(default)]
    pub processes: usize,
}

/// An image file of CRIU begins; its bytes follow until the next frame of another kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileHeader {
    /// A plain file name: no `/`, not `.` or `..`.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
}

impl FileHeader {
    /// Whether the name can be created in the images directory without leaving it.
    pub fn is_safe(&self) -> bool {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.' | b'@' | b':' | b'+');
        (1..=255).contains(&self.name.len())
            && self.name.bytes().all(plain)
            && !matches!(self.name.as_str(), "." | ".." | "parent")
    }
}

/// Everything was sent; the destination compares what it counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// Image files.
    pub files: u64,
    /// Bytes of image files.
    pub file_bytes: u64,
    /// Pages with content.
    pub pages: u64,
    /// Bytes of pages.
    pub page_bytes: u64,
    /// Entries of the writable layer.
    pub layer_entries: u64,
    /// Bytes of the writable layer's content.
    pub layer_bytes: u64,
    /// Bytes of content of tmpfs files.
    #[serde(default)]
    pub tmpfs_bytes: u64,
}

/// The tasks exist on the destination, complete, and have not run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    /// The destination's phases so far.
    #[serde(default)]
    pub phases: Vec<super::report::Phase>,
}

/// The container is the destination's from here on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Commit {}

/// The tasks run on the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// Milliseconds between the moment the tasks were let go and this message.
    #[serde(default)]
    pub since_ms: f64,
    /// The destination's phases.
    #[serde(default)]
    pub phases: Vec<super::report::Phase>,
    /// Milliseconds from the arrival of [`Final`] until the tasks were let go.
    #[serde(default)]
    pub took_ms: f64,
    /// What that was spent on, from the arrival of [`Final`].
    #[serde(default)]
    pub items: Vec<super::report::Item>,
}

/// Why a side gave up. Before the commit this ends the migration with the source running.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The phase in which it happened.
    #[serde(deserialize_with = "shown::line")]
    pub phase: String,
    /// The node on which it happened.
    #[serde(default, deserialize_with = "shown::line")]
    pub node: String,
    /// What failed, with its causes, in one line.
    #[serde(deserialize_with = "shown::line")]
    pub message: String,
    /// What to do about it.
    #[serde(default, deserialize_with = "shown::line")]
    pub advice: String,
    /// It is the connection between the two that failed: the other side may know a better reason.
    #[serde(default)]
    pub lost: bool,
    /// It happened on the destination when the tasks may have run there: the source must not run them without its operator's word.
    #[serde(default)]
    pub ran: bool,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (phase {}", self.message, self.phase)?;
        if !self.node.is_empty() {
            write!(f, ", node {}", self.node)?;
        }
        write!(f, ")")?;
        if !self.advice.is_empty() {
            write!(f, "; {}", self.advice)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(select((1, 3), (2, 5)), Ok(3));
        assert_eq!(select((2, 5), (1, 3)), Ok(3));
        assert_eq!(select((1, 1), (1, 1)), Ok(1));
        let e = select((1, 1), (2, 3)).unwrap_err();
        assert!(e.contains("speaks 1 to 1") && e.contains("2 to 3"), "{e}");
    }

    #[test]
    fn what_an_older_peer_does_not_know_is_not_asked_of_it() {
        assert_eq!(select((OLDEST, VERSION), (1, 2)), Ok(2));
        // its counts are ours when nothing was sent that it does not count
        let theirs: Final = serde_json::from_str(
            r#"{"files":1,"file_bytes":2,"pages":3,"page_bytes":4,"layer_entries":5,"layer_bytes":6}"#,
        )
        .unwrap();
        let ours = Final { files: 1, file_bytes: 2, pages: 3, page_bytes: 4, layer_entries: 5, ..theirs };
        assert_eq!(ours.tmpfs_bytes, 0);
    }

    #[test]
    fn server_names_carry_the_migration_and_nothing_else() {
        assert_eq!(migration_of(&server_name("m-0123abc")), Some("m-0123abc"));
        for bad in [
            "",
            "x",
            ".migration.transship",
            "A.migration.transship",
            "a/b.migration.transship",
            "a.transship",
        ] {
            assert_eq!(migration_of(bad), None, "{bad}");
        }
        assert_eq!(migration_of(&server_name(&"a".repeat(64))), None);
    }

    #[test]
    fn file_names_cannot_leave_the_images_directory() {
        let safe = |n: &str| FileHeader { name: n.into(), size: 0 }.is_safe();
        assert!(safe("core-1.img") && safe("tmpfs-dev-53.tar.gz.img") && safe("descriptors.json"));
        for bad in ["", ".", "..", "parent", "a/b", "/etc/passwd", "a\0", "a\n"] {
            assert!(!safe(bad), "{bad:?}");
        }
    }

    #[test]
    fn unknown_fields_are_skipped_and_missing_ones_have_defaults() {
        let r: Running = serde_json::from_str(r#"{"since_ms": 2.5, "colour": "blue"}"#).unwrap();
        assert_eq!(r.since_ms, 2.5);
        assert!(r.phases.is_empty());
    }
}
