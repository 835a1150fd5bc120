//! The tasks to look at: thread-group leaders, and who is still the one that we knew.

use std::{fs, io};

/// A thread-group leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Task {
    /// Its pid here.
    pub pid: i32,
    /// Its pid in the container: the id of CRIU's images.
    pub vpid: u64,
}

/// The leaders among these pids (a cgroup may list threads), with their pids in the container. Those that have ended are left out.
pub fn tasks(pids: &[i32]) -> Vec<Task> {
    pids.iter()
        .filter_map(|&pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            Some(Task { pid, vpid: leader(&status, pid)? })
        })
        .collect()
}

/// From /proc/PID/status: the pid in the innermost namespace, if the task is a leader with memory of its own (a zombie has none).
fn leader(status: &str, pid: i32) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    if field("Tgid")?.trim().parse() != Ok(pid) || field("VmSize").is_none() {
        return None;
    }
    field("NSpid")?.split_whitespace().last()?.parse().ok()
}

/// What tells a task from a later one with the same pid: its start time in clock ticks. None when it has ended.
pub fn started(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    crate::procstat::field(&text, 22)
}

/// Ended, or a zombie.
pub fn gone(pid: i32) -> bool {
    tasks(&[pid]).is_empty()
}

/// Is this why a look failed: the memory is gone that it was opened for? Of a task that lives: it has executed another program, whose
/// memory the next look finds.
pub fn replaced(e: &anyhow::Error) -> bool {
    let os_errors = e.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    os_errors.into_iter().any(|e| e == libc::ESRCH)
}

/// Do two tasks share their memory (a vfork whose child has not executed yet)?
pub fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: no pointers.
    unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_by_its_status() {
        let status = "Name:\ta (b)\nTgid:\t70\nPid:\t70\nNSpid:\t70\t12\t3\nVmSize:\t 100 kB\n";
        assert_eq!(leader(status, 70), Some(3));
        assert_eq!(leader(&status.replace("Tgid:\t70", "Tgid:\t69"), 70), None, "a thread");
        assert_eq!(leader(&status.replace("VmSize", "Other"), 70), None, "a zombie");
        let me = std::process::id() as i32;
        assert_eq!(tasks(&[me]).len(), 1);
        let error = |number| anyhow::Error::from(io::Error::from_raw_os_error(number)).context("x");
        assert!(replaced(&error(libc::ESRCH)) && !replaced(&error(libc::EPERM)));
        assert!(started(me).is_some() && share_memory(me, me) && started(-1).is_none());
    }
}
