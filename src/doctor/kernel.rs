//! The kernel: its version, and by real system calls what CRIU and we need of it. Memory tracking is [`super::tracker`].

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use super::{Finding, version_in};

/// Namespaces that a container uses (`/proc/self/ns`); `time` since Linux 5.6 keeps monotonic clocks from jumping.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// What [`gather`] saw.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `uname -r`.
    pub release: String,
    /// `uname -m`.
    pub machine: String,
    /// Namespaces that this kernel has.
    pub namespaces: Vec<String>,
    /// Each system call that was tried, and how it failed.
    pub calls: Vec<(&'static str, Result<(), String>)>,
    /// `TCP_REPAIR` on a fresh socket: without it no connection can be read or rebuilt.
    pub tcp_repair: Option<String>,
}

/// Asks the kernel.
pub fn gather() -> Facts {
    let uname = nix::sys::utsname::uname().ok();
    let text = |s: Option<&std::ffi::OsStr>| s.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Facts {
        release: text(uname.as_ref().map(|u| u.release())),
        machine: text(uname.as_ref().map(|u| u.machine())),
        namespaces: NAMESPACES
            .iter()
            .filter(|n| Path::new("/proc/self/ns").join(n).exists())
            .map(|n| n.to_string())
            .collect(),
        calls: vec![
            ("openat2", try_openat2()),
            ("pidfd_open", try_pidfd().map(drop)),
            ("pidfd_getfd", try_pidfd_getfd()),
            ("kcmp", try_kcmp()),
            ("userfaultfd", try_userfaultfd()),
            ("process_vm_readv", try_process_vm_readv()),
        ],
        tcp_repair: try_tcp_repair().err(),
    }
}

/// The rules: Linux 5.6 at least (openat2 for every path that comes from a peer, pidfd_getfd, time namespaces).
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    let mut out = Vec::new();
    let found = format!("Linux {} on {}", facts.release, facts.machine);
    out.push(match version_in(&facts.release) {
        Some(v) if v >= (5, 9, 0) => Finding::ok("kernel", found),
        Some(v) if v >= (5, 6, 0) => Finding::warn(
            "kernel",
            found,
            "CAP_CHECKPOINT_RESTORE and clone3's set_tid need 5.9; a newer kernel is advised",
        ),
        _ => Finding::fail("kernel", found, "Linux 5.6 or newer is needed"),
    });
    let missing: Vec<_> = NAMESPACES.iter().filter(|n| !facts.namespaces.iter().any(|m| m == **n)).collect();
    out.push(match missing.as_slice() {
        [] => Finding::ok("namespaces", facts.namespaces.join(" ")),
        [only] if **only == "time" => Finding::warn(
            "namespaces",
            "all but time",
            "without CONFIG_TIME_NS a container's monotonic clock jumps when it moves",
        ),
        more => Finding::fail(
            "namespaces",
            format!("missing: {}", more.iter().map(|n| **n).collect::<Vec<_>>().join(" ")),
            "use a kernel with these namespaces (CONFIG_*_NS)",
        ),
    });
    let failed: Vec<_> = facts.calls.iter().filter_map(|(n, r)| r.as_ref().err().map(|e| (*n, e))).collect();
    let names = |list: &[(&str, &String)]| {
        list.iter().map(|(n, e)| format!("{n}: {e}")).collect::<Vec<_>>().join(", ")
    };
    let (soft, hard): (Vec<_>, Vec<_>) = failed.into_iter().partition(|(n, _)| *n == "userfaultfd");
    if !hard.is_empty() {
        out.push(Finding::fail(
            "system calls",
            names(&hard),
            "CONFIG_CHECKPOINT_RESTORE, CONFIG_KCMP and CONFIG_CROSS_MEMORY_ATTACH must be set, and no seccomp filter in the way (run as root on the host)",
        ));
    } else if !soft.is_empty() {
        out.push(Finding::warn(
            "system calls",
            names(&soft),
            "without userfaultfd (CONFIG_USERFAULTFD) memory can neither be tracked by write-protection nor sent after the move",
        ));
    } else {
        out.push(Finding::ok(
            "system calls",
            facts.calls.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(" "),
        ));
    }
    out.push(match &facts.tcp_repair {
        None => Finding::ok("tcp repair", "TCP_REPAIR works"),
        Some(e) => Finding::fail(
            "tcp repair",
            e.clone(),
            "established connections need TCP_REPAIR: run as root with CAP_NET_ADMIN on a kernel with CONFIG_CHECKPOINT_RESTORE",
        ),
    });
    out
}

/// The system call's result, or its error in words.
fn check(rc: libc::c_long) -> Result<libc::c_long, String> {
    if rc < 0 { Err(std::io::Error::last_os_error().to_string()) } else { Ok(rc) }
}

fn try_openat2() -> Result<(), String> {
    // struct open_how { flags, mode, resolve } (linux/openat2.h).
    let how: [u64; 3] = [libc::O_PATH as u64 | libc::O_CLOEXEC as u64, 0, libc::RESOLVE_IN_ROOT];
    // SAFETY: the path is NUL-terminated and `how` is as large as the size given.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            how.as_ptr(),
            std::mem::size_of_val(&how),
        )
    })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

fn try_pidfd() -> Result<OwnedFd, String> {
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn try_pidfd_getfd() -> Result<(), String> {
    let me = try_pidfd()?;
    let target = std::fs::File::open("/dev/null").map_err(|e| e.to_string())?;
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, me.as_raw_fd(), target.as_raw_fd(), 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

fn try_kcmp() -> Result<(), String> {
    const KCMP_FILE: libc::c_int = 0; // linux/kcmp.h
    let file = std::fs::File::open("/dev/null").map_err(|e| e.to_string())?;
    let fd = file.as_raw_fd();
    // SAFETY: no pointers are passed.
    check(unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), libc::getpid(), KCMP_FILE, fd, fd) })
        .map(drop)
}

fn try_userfaultfd() -> Result<(), String> {
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

fn try_process_vm_readv() -> Result<(), String> {
    let from = 0x5au8;
    let mut to = 0u8;
    let local = libc::iovec { iov_base: (&raw mut to).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: (&raw const from).cast_mut().cast(), iov_len: 1 };
    // SAFETY: both vectors name one valid byte of this process.
    let n =
        check(unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) } as libc::c_long)?;
    if n == 1 && to == from { Ok(()) } else { Err(format!("read {n} bytes")) }
}

fn try_tcp_repair() -> Result<(), String> {
    // SAFETY: no pointers are passed.
    let fd = check(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) } as libc::c_long
    )?;
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a c_int of the size given.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const on).cast(),
            std::mem::size_of_val(&on) as libc::socklen_t,
        )
    } as libc::c_long)
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn good() -> Facts {
        Facts {
            release: "6.12.1".into(),
            machine: "x86_64".into(),
            namespaces: NAMESPACES.iter().map(|n| n.to_string()).collect(),
            calls: vec![("openat2", Ok(())), ("userfaultfd", Ok(()))],
            tcp_repair: None,
        }
    }

    fn level(facts: &Facts, check: &str) -> Level {
        verdict(facts).into_iter().find(|f| f.check == check).unwrap().level
    }

    #[test]
    fn a_modern_kernel_is_fit() {
        assert!(verdict(&good()).iter().all(|f| f.level == Level::Ok));
    }

    #[test]
    fn old_and_unreadable_versions_fail() {
        for (release, want) in [("5.4.0", Level::Fail), ("5.8.1", Level::Warn), ("weird", Level::Fail)] {
            assert_eq!(level(&Facts { release: release.into(), ..good() }, "kernel"), want, "{release}");
        }
    }

    #[test]
    fn a_missing_time_namespace_only_warns() {
        let mut facts = good();
        facts.namespaces.retain(|n| n != "time");
        assert_eq!(level(&facts, "namespaces"), Level::Warn);
        facts.namespaces.retain(|n| n != "pid");
        assert_eq!(level(&facts, "namespaces"), Level::Fail);
    }

    #[test]
    fn userfaultfd_warns_and_the_rest_fails() {
        let mut facts = good();
        facts.calls[1].1 = Err("ENOSYS".into());
        assert_eq!(level(&facts, "system calls"), Level::Warn);
        facts.calls[0].1 = Err("ENOSYS".into());
        assert_eq!(level(&facts, "system calls"), Level::Fail);
    }
}
