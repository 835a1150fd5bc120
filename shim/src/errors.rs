//! Errors of the Task API: what went wrong and which status code containerd gets for it.
//!
//! containerd and its clients act on the code (`NotFound` on a kill means "already gone"), so every place that knows better than
//! "unknown" says so with the constructors here. The texts end like containerd's own error values ("...: not found").

use std::{error::Error, fmt, io};

use containerd_shim_protos::ttrpc::{self, Code};
use nix::errno::Errno;

/// Result of everything that a Task API call may end with.
pub type TaskResult<T> = Result<T, TaskError>;

/// An error with the status code that containerd sees.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskError {
    code: Code,
    message: String,
}

impl TaskError {
    fn with(code: Code, message: impl fmt::Display, suffix: &str) -> Self {
        Self { code, message: format!("{message}: {suffix}") }
    }

    /// The container, process or cgroup is not (or no longer) there.
    pub fn not_found(message: impl fmt::Display) -> Self {
        Self::with(Code::NOT_FOUND, message, "not found")
    }

    /// The id is taken.
    pub fn already_exists(message: impl fmt::Display) -> Self {
        Self::with(Code::ALREADY_EXISTS, message, "already exists")
    }

    /// The request is fine, but not in the state the container is in.
    pub fn failed_precondition(message: impl fmt::Display) -> Self {
        Self::with(Code::FAILED_PRECONDITION, message, "failed precondition")
    }

    /// The request itself is wrong.
    pub fn invalid_argument(message: impl fmt::Display) -> Self {
        Self::with(Code::INVALID_ARGUMENT, message, "invalid argument")
    }

    /// Everything else; containerd's Go shim answers `Unknown` for a plain error as well.
    pub fn unknown(message: impl fmt::Display) -> Self {
        Self { code: Code::UNKNOWN, message: message.to_string() }
    }

    /// The status code.
    pub fn code(&self) -> Code {
        self.code
    }
}

/// An error and its causes in a row; those of the system in [`system_words`].
pub fn words(e: &anyhow::Error) -> String {
    let one = |cause: &(dyn Error + 'static)| {
        let number = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        let number = number.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied());
        number.map_or_else(|| cause.to_string(), system_words)
    };
    e.chain().map(one).collect::<Vec<_>>().join(": ")
}

/// The system's words for an error as containerd's other parts write them: in small letters, without the number.
pub fn system_words(e: Errno) -> String {
    let mut words = e.desc().to_owned();
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    words
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for TaskError {}

impl From<anyhow::Error> for TaskError {
    fn from(e: anyhow::Error) -> Self {
        match e.downcast::<TaskError>() {
            Ok(e) => e,
            Err(e) => Self::unknown(words(&e)),
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(e: TaskError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(e.code, e.message))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_task_error_keeps_its_code_through_anyhow() {
        let e = TaskError::from(anyhow::Error::from(TaskError::not_found("process already finished")));
        assert_eq!(e.code(), Code::NOT_FOUND);
        assert_eq!(e.to_string(), "process already finished: not found");
    }

    #[test]
    fn the_systems_words_are_gos() {
        assert_eq!(system_words(Errno::EINVAL), "invalid argument");
        let error = anyhow::Error::from(io::Error::from_raw_os_error(libc::ENOENT)).context("opening x");
        assert_eq!(words(&error), "opening x: no such file or directory");
        assert_eq!(words(&anyhow::Error::from(Errno::EBUSY).context("a")), "a: device or resource busy");
    }

    #[test]
    fn other_errors_are_unknown_and_keep_their_causes() {
        let e: anyhow::Result<()> = Err(anyhow::anyhow!("no such file")).context("open the pid file");
        let e = TaskError::from(e.unwrap_err());
        assert_eq!((e.code(), e.to_string().as_str()), (Code::UNKNOWN, "open the pid file: no such file"));
    }
}
