//! The agent's unix socket, for the command line: requests, events, reports and exit codes.
//!
//! One request a connection. Each message is a frame: its length as u32 little endian, then that many bytes of JSON.
//! The client sends one [`Request`]; the agent answers with [`Event`]s, of which the last is [`Event::Done`] or
//! [`Event::Failed`]. Unknown fields are skipped on both sides, so either may be newer than the other.
//! A client that hangs up does not stop what it asked for: a migration is never ended by a closed terminal.
//!
//! Only types, framing and the blocking [`Client`] live here; what the agent does about a request is in `server`.

use std::{
    fmt,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::migrate::{report::Round, tuning::Asked};

/// Where the agent listens for the command line, unless its config says otherwise. Mode 0600: root only.
pub const DEFAULT_SOCKET: &str = "/run/transship/agent.sock";

/// The largest frame either side accepts, in bytes; a longer announced length ends the connection unread.
pub const MAX_FRAME: usize = 4 << 20;

/// What the command line asks of the agent.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Move a container to another node.
    Migrate(MigrateRequest),
    /// Write a container's state to a file.
    Checkpoint(CheckpointRequest),
    /// The same, encrypted. A request of its own: an agent that does not know it refuses it, where it would skip a field.
    CheckpointEncrypted {
        /// What is written, and where.
        checkpoint: CheckpointRequest,
        /// For whom.
        to: EncryptTo,
    },
    /// Make a container of such a file.
    Restore(RestoreRequest),
    /// List the containers that run under transship.
    Ps(PsRequest),
    /// Decide a migration whose outcome this node could not learn.
    Resolve(ResolveRequest),
    /// Allow another node to move one container here.
    Ticket(TicketRequest),
    /// List the tickets that were given out.
    Tickets,
    /// Take a ticket back.
    WithdrawTicket {
        /// Its number.
        id: String,
    },
    /// What runs here.
    Version,
}

/// See [`Request::Migrate`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct MigrateRequest {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// A ticket of the destination's operator; empty: none.
    pub ticket: String,
    /// The destination's agent, `HOST` or `HOST:PORT`; IPv6 addresses in brackets when a port follows.
    pub to: String,
    /// Also move a container that does not run: record, image and writable layer, without memory.
    pub cold: bool,
    /// Do not compare CPU features (the container may die of an illegal instruction after the move).
    pub ignore_cpu: bool,
    /// End a phase after this many seconds without progress; 0 takes the agent's default.
    pub silence_seconds: u64,
    /// Largest open-but-deleted file that is carried along, in bytes; 0 takes the agent's default.
    pub ghost_limit: u64,
    /// How memory moves; what is not said takes the agent's default.
    pub tuning: Asked,
}

/// See [`Request::Ticket`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct TicketRequest {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The node that may move it here, as in its certificate.
    pub from: String,
    /// For how long.
    pub valid_seconds: u64,
}

/// See [`Request::Checkpoint`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct CheckpointRequest {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// Absolute path of the file to write; it must not exist. It is created with mode 0600.
    pub output: PathBuf,
    /// Leave the container running (true) or stop it once the file is complete (false).
    pub leave_running: bool,
}

/// See [`Request::CheckpointEncrypted`].
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum EncryptTo {
    /// Public keys of age's.
    Recipients(Vec<String>),
    /// Absolute path of a file whose first line is a passphrase.
    PassphraseFile(PathBuf),
}

/// See [`Request::Restore`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct RestoreRequest {
    /// containerd's namespace; empty: that of the file.
    pub namespace: String,
    /// Absolute path of the checkpoint file.
    pub file: PathBuf,
    /// The new container's id; empty: that of the file.
    pub container: String,
    /// Do not compare CPU features.
    pub ignore_cpu: bool,
    /// Absolute path of the file with the identity, or the passphrase, of an encrypted one.
    pub keys: Option<PathBuf>,
}

/// See [`Request::Ps`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct PsRequest {
    /// Only this namespace; empty: all.
    pub namespace: String,
}

/// See [`Request::Resolve`].
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ResolveRequest {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// What is to become of the copy that is frozen here.
    pub decision: Decision,
}

/// What the operator decides about a frozen container whose migration lost its answer.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// It does not run on the other node (the operator made sure): thaw it here.
    RunHere,
    /// It runs on the other node: kill and delete it here.
    Moved,
}

/// One message of the agent's answer.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins: `preflight`, `prepare`, `transfer`, `freeze`, `commit`, `running`, `post-copy`, `cleanup` and what the
    /// shims call theirs; they may be as many as the shims like.
    Phase {
        /// The phase's name.
        name: String,
        /// Milliseconds since the request arrived.
        at_ms: u64,
    },
    /// How far something is.
    Progress {
        /// What is counted: `blobs`, `memory`, `layer`, `following` (post-copy), ...
        what: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all as far as known.
        total: Option<u64>,
    },
    /// A round of copying begins; its progress is said to be of `memory`.
    Round {
        /// Counted from 1.
        n: u32,
        /// Bytes in it, as far as known.
        #[serde(default)]
        total: Option<u64>,
    },
    /// A round ended.
    RoundDone {
        /// What it did.
        round: Round,
    },
    /// Something the operator should know, though the work goes on.
    Warning {
        /// One sentence.
        message: String,
    },
    /// The work is done; nothing follows.
    Done {
        /// What came of it.
        reply: Reply,
    },
    /// The work failed; nothing follows.
    Failed {
        /// Why, and in what state everything is now.
        error: ErrorReport,
    },
}

/// The successful end of a request.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Of [`Request::Migrate`].
    Migrated(Box<Report>),
    /// Of [`Request::Checkpoint`].
    Checkpointed(CheckpointReport),
    /// Of [`Request::Restore`].
    Restored(RestoreReport),
    /// Of [`Request::Ps`].
    Ps {
        /// One entry a container, ordered by namespace and id.
        containers: Vec<PsEntry>,
    },
    /// Of [`Request::Resolve`].
    Resolved {
        /// What was done, one sentence.
        message: String,
    },
    /// Of [`Request::Ticket`].
    Ticket(TicketReport),
    /// Of [`Request::Tickets`].
    Tickets {
        /// Those that are known, also some that are good no more.
        tickets: Vec<TicketEntry>,
    },
    /// Of [`Request::WithdrawTicket`].
    TicketWithdrawn(TicketEntry),
    /// Of [`Request::Version`].
    Version(VersionReport),
}

/// A migration that succeeded. Times in milliseconds, sizes in bytes.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct Report {
    /// The migration's id, as in both nodes' logs.
    pub migration: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// Name of the node it left.
    pub from: String,
    /// Name of the node it runs on now.
    pub to: String,
    /// Moved without memory, because it did not run.
    pub cold: bool,
    /// From the request to the end of the clean-up.
    pub total_ms: f64,
    /// How long no task of it ran, as the shims measured it.
    pub freeze_ms: f64,
    /// Everything the shim sent: memory, layer, images, stdio.
    pub bytes_sent: u64,
    /// Image blobs that the destination lacked.
    pub blob_bytes: u64,
    /// The phases in order, with their lengths.
    pub phases: Vec<PhaseTime>,
    /// The init's pid on the destination.
    pub pid: u32,
    /// Where the container's output goes on the destination, as the URI given to containerd.
    pub stdio: String,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// The source shim's own report, unabridged; absent for a cold move.
    pub shim: Option<serde_json::Value>,
}

/// One phase of a [`Report`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct PhaseTime {
    /// As in [`Event::Phase`].
    pub name: String,
    /// Its length in milliseconds.
    pub ms: f64,
}

/// A ticket that was given out.
#[derive(Serialize, Deserialize, Clone, Default, PartialEq)]
#[serde(default)]
pub struct TicketReport {
    /// Its text, for `transship migrate --ticket` on the source.
    pub ticket: String,
    /// Its number, as in the agent's log.
    pub id: String,
    /// The node that it lets a container move to.
    pub node: String,
    /// The node that it was given to.
    pub from: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// For how long it is good.
    pub valid_seconds: u64,
}

impl fmt::Debug for TicketReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TicketReport({} for {}/{} from {})", self.id, self.namespace, self.container, self.from)
    }
}

/// A ticket that was given out, without its secret.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct TicketEntry {
    /// Its number.
    pub id: String,
    /// The node that it was given to.
    pub from: String,
    /// `NAMESPACE/ID` of the container.
    pub container: String,
    /// For how many seconds it is still good.
    pub seconds_left: u64,
    /// `good`, `in use` (a move is being prepared with it), `used`, `withdrawn` or `expired`.
    pub state: String,
}

/// A checkpoint that was written.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct CheckpointReport {
    /// The container's id.
    pub container: String,
    /// The file.
    pub output: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// How long no task ran, in milliseconds.
    pub freeze_ms: f64,
    /// The container still runs.
    pub running: bool,
    /// The file is encrypted.
    pub encrypted: bool,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// A container that was made of a checkpoint file.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct RestoreReport {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The init's pid.
    pub pid: u32,
    /// Time taken, in milliseconds.
    pub total_ms: f64,
    /// Where its output goes.
    pub stdio: String,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// One container under transship.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct PsEntry {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The image's name.
    pub image: String,
    /// `created`, `running`, `paused`, `stopped`, `none` (no task), `migrating-out`, `migrating-in`, `post-copy`
    /// (it runs elsewhere, memory of it is still here), `undecided`, `lost`, `no-shim`.
    pub state: String,
    /// The init's pid; 0 without a task.
    pub pid: u32,
    /// More about the state: the migration's phase and peer, or what to do about it.
    pub detail: String,
    /// The node it last came from; empty if it was made here.
    pub from: String,
}

/// What runs on this node.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct VersionReport {
    /// This node's name, as in its certificate.
    pub node: String,
    /// The agent's version.
    pub agent: String,
    /// Oldest and newest protocol version it speaks with other agents.
    pub protocol: (u32, u32),
    /// containerd's version; empty if it did not answer.
    pub containerd: String,
    /// CRIU's version; empty if it was not found.
    pub criu: String,
    /// runc's version; empty if it was not found.
    pub runc: String,
    /// The kernel's release.
    pub kernel: String,
}

/// Why a request failed, and what everything is in now.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ErrorReport {
    /// Also the command's exit status.
    pub code: ExitCode,
    /// What failed, with its causes; for a dump this includes CRIU's own first error line.
    pub message: String,
    /// The node on which it failed.
    #[serde(default)]
    pub node: String,
    /// The phase in which it failed, as in [`Event::Phase`].
    #[serde(default)]
    pub phase: String,
    /// In what state everything is now, for instance "redis runs on node-a as before; nothing was left on node-b".
    #[serde(default)]
    pub state: String,
    /// What to do about it; empty when there is nothing more to say.
    #[serde(default)]
    pub advice: String,
}

impl ErrorReport {
    /// A report with only code and message; the rest is filled in by who knows it.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        ErrorReport {
            code,
            message: message.into(),
            node: String::new(),
            phase: String::new(),
            state: String::new(),
            advice: String::new(),
        }
    }

    /// With the state in which everything is.
    pub fn state(mut self, state: impl Into<String>) -> Self {
        self.state = state.into();
        self
    }

    /// With advice.
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }
}

impl fmt::Display for ErrorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.node.is_empty() {
            write!(f, " (on {}", self.node)?;
            if !self.phase.is_empty() {
                write!(f, ", phase {}", self.phase)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for ErrorReport {}

/// The exit statuses of the command line; documented in its help and kept stable.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum ExitCode {
    /// It worked.
    Ok = 0,
    /// Anything without a number of its own.
    Failed = 1,
    /// Wrong arguments or a bad configuration.
    Usage = 2,
    /// No such container.
    NotFound = 3,
    /// The container does not run (`--cold` moves it all the same).
    NotRunning = 4,
    /// The destination refused: no room, CPU features, a container of that name, policy, protocol version.
    Refused = 5,
    /// The peer could not be reached, or the connection to it was lost before the commit.
    Unreachable = 6,
    /// The dump failed; the container runs on as before.
    DumpFailed = 7,
    /// The restore failed; the container runs on where it was.
    RestoreFailed = 8,
    /// The answer was lost after the commit: the source is frozen until `transship resolve` or the peer's answer.
    Undecided = 9,
    /// The agent on this node does not answer on its socket.
    NoAgent = 10,
    /// The peer's certificate, or ours in its eyes, is not of the same CA, expired or of another name.
    Untrusted = 11,
    /// A checkpoint file is corrupt, truncated or of an unknown version.
    BadFile = 12,
    /// The container is busy with another migration or checkpoint.
    Busy = 13,
    /// `doctor` found something that prevents a migration.
    Unfit = 14,
    /// Source or link were lost in post-copy, and memory with them: killed, or run on at the source, as chosen.
    Lost = 15,
}

impl ExitCode {
    /// Every code with what it means, for the help.
    pub const ALL: [(ExitCode, &'static str); 16] = [
        (ExitCode::Ok, "success"),
        (ExitCode::Failed, "failed for a reason without a number of its own"),
        (ExitCode::Usage, "wrong arguments or bad configuration"),
        (ExitCode::NotFound, "no such container"),
        (ExitCode::NotRunning, "the container does not run (migrate --cold moves it all the same)"),
        (ExitCode::Refused, "refused by the destination: room, CPU, name, policy, version"),
        (ExitCode::Unreachable, "the peer could not be reached, or was lost before the commit"),
        (ExitCode::DumpFailed, "the dump failed; the container runs on"),
        (ExitCode::RestoreFailed, "the restore failed; the container runs on where it was"),
        (ExitCode::Undecided, "the answer was lost after the commit; see transship ps and transship resolve"),
        (ExitCode::NoAgent, "the agent on this node does not answer"),
        (ExitCode::Untrusted, "a certificate was not accepted"),
        (ExitCode::BadFile, "the checkpoint file is corrupt, truncated or of an unknown version"),
        (ExitCode::Busy, "the container is busy with another migration or checkpoint"),
        (ExitCode::Unfit, "doctor found something that prevents a migration"),
        (
            ExitCode::Lost,
            "memory was lost after the commit (post-copy); --on-post-copy-failure decided what became of the container",
        ),
    ];

    /// The number given to `exit`.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// Writes one frame.
pub fn write_frame(out: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    out.write_all(&encode(message)?)?;
    out.flush()
}

/// A frame's bytes: length and JSON.
///
/// # Errors
/// The message is larger than [`MAX_FRAME`].
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    check_length(length)?;
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

/// Reads one frame.
///
/// # Errors
/// The stream ends, the length is over [`MAX_FRAME`] (nothing is allocated then), or the JSON does not fit the type.
pub fn read_frame<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    check_length(length)?;
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

pub(crate) fn check_length(length: usize) -> io::Result<()> {
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is over the limit of {MAX_FRAME}"),
        ));
    }
    Ok(())
}

/// The command line's end of the socket; blocking.
#[derive(Debug)]
pub struct Client(UnixStream);

impl Client {
    /// Connects to the agent.
    ///
    /// # Errors
    /// [`ExitCode::NoAgent`] with what to do about it.
    pub fn connect(socket: &Path) -> Result<Client, ErrorReport> {
        UnixStream::connect(socket).map(Client).map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => "run as root",
                _ => "start it (systemctl start transship-agent, or `transship agent`) or name its socket with --socket",
            };
            ErrorReport::new(ExitCode::NoAgent, format!("the agent at {}: {error}", socket.display()))
                .advice(advice)
        })
    }

    /// Sends the request and follows it to its end. `on_event` sees phases, progress and warnings as they come, but
    /// neither `Done` nor `Failed`: these are the result.
    pub fn call(mut self, request: &Request, mut on_event: impl FnMut(&Event)) -> Result<Reply, ErrorReport> {
        let lost = |error: io::Error| {
            ErrorReport::new(ExitCode::NoAgent, format!("the agent went away before it answered: {error}"))
                .advice("see its log, and `transship ps` for the container's state")
        };
        write_frame(&mut self.0, request).map_err(lost)?;
        loop {
            match read_frame::<Event>(&mut self.0).map_err(lost)? {
                Event::Done { reply } => return Ok(reply),
                Event::Failed { error } => return Err(error),
                event => on_event(&event),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip() {
        let request = Request::Migrate(MigrateRequest {
            namespace: "default".into(),
            container: "redis".into(),
            to: "node-b".into(),
            ..Default::default()
        });
        let bytes = encode(&request).unwrap();
        assert_eq!(read_frame::<Request>(&mut &bytes[..]).unwrap(), request);
        for event in [
            Event::Phase { name: "freeze".into(), at_ms: 7 },
            Event::Done { reply: Reply::Migrated(Box::default()) },
            Event::Done { reply: Reply::Ps { containers: vec![PsEntry::default()] } },
            Event::Failed { error: ErrorReport::new(ExitCode::NotRunning, "x") },
        ] {
            assert_eq!(read_frame::<Event>(&mut &encode(&event).unwrap()[..]).unwrap(), event);
        }
    }

    #[test]
    fn unknown_and_missing_fields_are_fine() {
        let body = br#"{"request":"migrate","container":"c","to":"b","from-the-future":1}"#;
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(body);
        let Request::Migrate(request) = read_frame(&mut &frame[..]).unwrap() else { panic!() };
        assert_eq!((request.container.as_str(), request.cold), ("c", false));
    }

    #[test]
    fn a_huge_length_is_refused_before_allocation() {
        let error = read_frame::<Request>(&mut &u32::MAX.to_le_bytes()[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn exit_codes_are_dense_and_complete() {
        for (number, (code, _)) in ExitCode::ALL.iter().enumerate() {
            assert_eq!(code.code() as usize, number);
        }
    }
}
