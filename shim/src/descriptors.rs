//! How many descriptors this process may have. A pod's shim holds some eight for every container, and containerd's own unit leaves 1024
//! as the soft limit: the shim goes up to the hard one, as Go's runtime does by itself in containerd's shim. What it starts gets
//! back what the shim was started with, because a container without a limit of its own has that of its runc.

use std::{io, os::unix::process::CommandExt, process::Command, sync::OnceLock};

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// Soft and hard limit at the start, if they were changed.
static BEFORE: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Lifts the limit of this process. One that cannot be lifted stays.
pub fn raise() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft >= hard {
        return;
    }
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => drop(BEFORE.set((soft, hard))),
        Err(e) => log::warn!("the limit of open files stays at {soft}: {e}"),
    }
}

/// `command` will run with the limit that was there before [`raise`].
pub fn as_before(command: &mut Command) {
    let Some(&(soft, hard)) = BEFORE.get() else { return };
    // SAFETY: runs in the child between fork and exec; setrlimit is async-signal-safe and nothing is allocated.
    unsafe {
        command.pre_exec(move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test for both, because the limit is the whole process'.
    #[test]
    fn raised_here_and_as_before_in_children() {
        let limit = |command: &mut Command| String::from_utf8(command.output().unwrap().stdout).unwrap();
        let ask = || {
            let mut command = Command::new("sh");
            command.args(["-c", "ulimit -Sn"]);
            command
        };
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let low = soft.min(512);
        setrlimit(Resource::RLIMIT_NOFILE, low, hard).unwrap();
        raise();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        let mut child = ask();
        as_before(&mut child);
        assert_eq!(limit(&mut child).trim(), low.to_string());
        assert_ne!(limit(&mut ask()).trim(), low.to_string());
    }
}
