//! The standard streams of a container's process: what containerd asked for (FIFOs, files, a logging program, a terminal)
//! on one side, the pipes or the pty that the process holds on the other, and the copying between them.
//!
//! | file | what lives there |
//! |---|---|
//! | `uri` | what a stdio string of containerd means (pure) |
//! | `fd` | pipes, FIFOs, looking into a pipe without reading it |
//! | `ends` | where bytes come from and where they go |
//! | `pump` | one direction of one stream: a task that copies, pauses and goes on |
//! | `flow` | its state between two steps, and the moving of bytes |
//! | `held` | what a migration takes out of a paused pump and puts into one |
//! | `logger` | the program behind `binary://` |
//! | `process` | [`ProcessIo`]: the streams of one process; opening, closing, draining |
//! | `migrate` | the same streams when the container moves: quiesce, carry, preload |
//!
//! The pty itself (console socket, window size, input queue) is in [`crate::console`]. Nothing here knows runc or containerd's
//! API; a child that has to be started is started through [`Context::spawn`], because one reaper waits for all children.
//!
//! Memory: no thread and no buffer per stream. One scratch buffer per thread serves every stream, bytes are kept only
//! where a sink does not take them. Only writes to regular files leave the event loop (`spawn_blocking`), because a slow disk
//! would hold up every other container of the pod.

mod ends;
mod fd;
mod flow;
mod held;
mod logger;
mod migrate;
mod process;
mod pump;
pub(crate) mod uri;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_migrate;

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

pub use logger::{Spawn, Spawned};
pub use migrate::Carry;
pub use process::ProcessIo;

/// What containerd asks for: URIs or FIFO paths as they are in `CreateTaskRequest` and `ExecProcessRequest`; empty means none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioConfig {
    /// FIFO (or file) that is read.
    pub stdin: String,
    /// FIFO path, `file://`, `binary://` or `binary-v2://`. A `binary` URI serves stderr as well.
    pub stdout: String,
    /// FIFO path or `file://`.
    pub stderr: String,
    /// The process wants a terminal; stderr is then unused.
    pub terminal: bool,
}

/// The descriptors that runc passes on to the process. `None` means `/dev/null`. Drop it as soon as runc has returned, or the
/// streams never end.
#[derive(Debug, Default)]
pub struct ChildStdio {
    /// Read end of a pipe.
    pub stdin: Option<OwnedFd>,
    /// Write end of a pipe.
    pub stdout: Option<OwnedFd>,
    /// Write end of a pipe.
    pub stderr: Option<OwnedFd>,
}

/// What a stream is for the process itself. CRIU restores the descriptor by its kind, so a destination has to offer the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `/dev/null`.
    #[default]
    Null,
    /// An anonymous pipe.
    Pipe,
    /// The slave of a pty.
    Tty,
}

/// The kinds of the three streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioKinds {
    /// Descriptor 0.
    #[serde(default)]
    pub stdin: Kind,
    /// Descriptor 1.
    #[serde(default)]
    pub stdout: Kind,
    /// Descriptor 2.
    #[serde(default)]
    pub stderr: Kind,
}

impl StdioKinds {
    /// All three on one pty.
    pub const TTY: StdioKinds = StdioKinds { stdin: Kind::Tty, stdout: Kind::Tty, stderr: Kind::Tty };

    /// Whether the process has a terminal: its streams are then opened by [`ProcessIo::open_console`].
    pub fn terminal(&self) -> bool {
        self.stdout == Kind::Tty
    }
}

/// Where and for whom streams are opened.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// containerd's namespace, told to a logging program.
    pub namespace: &'a str,
    /// The container's id (the exec's for an exec), told to a logging program.
    pub id: &'a str,
    /// Owner of the pipes: the runtime options' IoUid and IoGid.
    pub owner: Option<(u32, u32)>,
    /// Starts a logging program under the shim's reaper.
    pub spawn: &'a Spawn,
    /// True on the destination of a migration: nothing is copied until [`ProcessIo::resume`].
    pub held: bool,
}
