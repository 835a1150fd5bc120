//! The states of a process in the shim and what may be asked of it in each: a pure table, no I/O.
//!
//! ```text
//!                 start                    exit
//!   Created ----------------> Running ----------------> Stopped --delete--> Deleted
//!   CreatedCheckpoint -restore-^  |  ^                     ^
//!   Incoming ----adopt--------/   pause resume             |
//!                                 v  |        exit         |
//!                                Paused -------------------/
//! ```
//! Created, CreatedCheckpoint and Incoming can also be deleted. Execs know only Created, Running, Stopped and Deleted.
//! The wording of the refusals is that of containerd's Go shim, so that clients which look at it see no difference.

use crate::errors::TaskError;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Created by `runc create` (init), or only described (exec): its program does not run yet.
    Created,
    /// Created from a checkpoint: nothing exists yet, start restores it.
    CreatedCheckpoint,
    /// The destination of a migration that is not complete: nothing runs here yet.
    Incoming,
    /// The program runs.
    Running,
    /// Its cgroup is frozen.
    Paused,
    /// The program has ended, its exit status is known.
    Stopped,
    /// Deleted; only somebody who still holds it sees it.
    Deleted,
}

/// What is asked of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Run the program.
    Start,
    /// Forget the process.
    Delete,
    /// Freeze the container.
    Pause,
    /// Thaw the container.
    Resume,
    /// Send a signal.
    Kill,
    /// Change resource limits.
    Update,
    /// Dump with CRIU.
    Checkpoint,
    /// Add another process to the container.
    Exec,
}

impl State {
    /// Whether `op` may be carried out in this state; the error is what the client gets. `exec` is true for a process added by
    /// exec, false for the container's first.
    pub fn check(self, op: Op, exec: bool) -> Result<(), TaskError> {
        use State::*;
        let incoming = || Err(TaskError::failed_precondition("migration not complete"));
        let refuse = |what: &str| Err(TaskError::unknown(what));
        match (op, self) {
            (Op::Delete, Deleted) => Err(TaskError::not_found("cannot delete a deleted process")),
            (Op::Kill, Deleted) => Err(TaskError::not_found("cannot kill a deleted process")),
            (Op::Kill, Incoming) => incoming(),
            (Op::Kill, _) => Ok(()),

            (Op::Start, Created | CreatedCheckpoint) => Ok(()),
            (Op::Start, Incoming) => incoming(),
            (Op::Start, Running) => refuse("cannot start a running process"),
            (Op::Start, Paused) => refuse("cannot start a paused process"),
            (Op::Start, Stopped) => refuse("cannot start a stopped process"),
            (Op::Start, Deleted) => refuse("cannot start a deleted process"),

            (Op::Delete, Created | CreatedCheckpoint | Incoming | Stopped) => Ok(()),
            (Op::Delete, Paused) if !exec => refuse("cannot delete a paused process"),
            (Op::Delete, Running | Paused) => refuse("cannot delete a running process"),

            (Op::Pause, Running) => Ok(()),
            (Op::Pause, Incoming) => incoming(),
            (Op::Pause, Created | CreatedCheckpoint) => refuse("cannot pause task in created state"),
            (Op::Pause, Paused) => refuse("cannot pause a paused container"),
            (Op::Pause, Stopped) => refuse("cannot pause a stopped container"),
            (Op::Pause, Deleted) => refuse("cannot pause a deleted process"),

            (Op::Resume, Paused) => Ok(()),
            (Op::Resume, Incoming) => incoming(),
            (Op::Resume, Created | CreatedCheckpoint) => refuse("cannot resume task in created state"),
            (Op::Resume, Running) => refuse("cannot resume a running process"),
            (Op::Resume, Stopped) => refuse("cannot resume a stopped container"),
            (Op::Resume, Deleted) => refuse("cannot resume a deleted process"),

            (Op::Update, Incoming) => incoming(),
            (Op::Update, Stopped) => refuse("cannot update a stopped container"),
            (Op::Update, Deleted) => refuse("cannot update a deleted process"),
            (Op::Update, _) => Ok(()),

            (Op::Checkpoint, Running | Paused) => Ok(()),
            (Op::Checkpoint, Incoming) => incoming(),
            (Op::Checkpoint, Created | CreatedCheckpoint) => {
                refuse("cannot checkpoint a task in created state")
            }
            (Op::Checkpoint, Stopped) => refuse("cannot checkpoint a stopped container"),
            (Op::Checkpoint, Deleted) => refuse("cannot checkpoint a deleted process"),

            (Op::Exec, Created | Running) => Ok(()),
            (Op::Exec, Incoming) => incoming(),
            (Op::Exec, CreatedCheckpoint) => refuse("cannot exec in a created state"),
            (Op::Exec, Paused) => refuse("cannot exec in a paused state"),
            (Op::Exec, Stopped) => refuse("cannot exec in a stopped state"),
            (Op::Exec, Deleted) => refuse("cannot exec in a deleted state"),
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    #[test]
    fn only_a_created_process_starts() {
        for state in [State::Created, State::CreatedCheckpoint] {
            assert!(state.check(Op::Start, false).is_ok(), "{state:?}");
        }
        for state in [State::Running, State::Paused, State::Stopped, State::Deleted] {
            assert_eq!(state.check(Op::Start, false).unwrap_err().code(), Code::UNKNOWN, "{state:?}");
        }
    }

    #[test]
    fn an_incoming_container_refuses_everything_but_delete() {
        for op in [Op::Start, Op::Pause, Op::Resume, Op::Kill, Op::Update, Op::Checkpoint, Op::Exec] {
            let e = State::Incoming.check(op, false).unwrap_err();
            assert_eq!(e.code(), Code::FAILED_PRECONDITION, "{op:?}");
            assert!(e.to_string().contains("migration not complete"));
        }
        assert!(State::Incoming.check(Op::Delete, false).is_ok());
    }

    #[test]
    fn a_deleted_process_is_not_found() {
        for op in [Op::Delete, Op::Kill] {
            assert_eq!(State::Deleted.check(op, true).unwrap_err().code(), Code::NOT_FOUND);
        }
    }

    #[test]
    fn a_paused_container_can_be_checkpointed_and_killed_but_not_entered() {
        assert!(State::Paused.check(Op::Checkpoint, false).is_ok());
        assert!(State::Paused.check(Op::Kill, false).is_ok());
        assert!(State::Paused.check(Op::Exec, false).is_err());
    }
}
