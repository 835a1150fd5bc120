//! CRIU's logs: the first line that says what went wrong, and what can be done about the causes that are known.
//!
//! Later errors are mostly consequences of the first; CRIU's own RPC answer says nothing ("errno 0").

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The option of ours that raises [`super::rpc::CriuOpts::ghost_limit`]; named in hints.
pub const GHOST_LIMIT_OPTION: &str = "ghost_limit";

/// An error of CRIU.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Finding {
    /// CRIU's line without time stamp and `Error`, such as `sk-inet: Unsupported proto 262 for socket 2a`.
    pub line: String,
    /// What it means and what to do, where that is known.
    pub hint: Option<String>,
    /// The cause, for those who decide by it.
    pub cause: Cause,
}

/// Causes that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Cause {
    /// This CRIU does not understand this kernel.
    CriuTooOld,
    /// A process uses something that CRIU cannot carry.
    Unsupported,
    /// It could succeed at another instant.
    Transient,
    /// A setting of ours or of the node.
    Limit,
    /// The destination differs from the source.
    Mismatch,
    /// Not known to us.
    Other,
}

impl Finding {
    /// A finding from CRIU's own line.
    pub fn new(line: &str) -> Self {
        let line = strip(line);
        let known = KNOWN.iter().find(|k| k.all.iter().all(|part| line.contains(part)));
        Self {
            hint: known.map(|k| k.hint.replace("{ghost_limit}", GHOST_LIMIT_OPTION)),
            cause: known.map_or(Cause::Other, |k| k.cause),
            line: line.to_owned(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.line)?;
        match &self.hint {
            Some(hint) => write!(f, " [{hint}]"),
            None => Ok(()),
        }
    }
}

/// Errors that CRIU prints and gets over.
const HARMLESS: &[&str] = &[
    // Without CAP_SYS_RESOURCE.
    "Can't setup RLIMIT",
    "rlimit: ",
    "Can't set oom_score_adj",
    // kerndat probing for what a kernel lacks.
    "Can't open /proc/sys/vm/",
    "Unable to set TCP_CORK",
    "Unable to set TCP_NODELAY",
];

struct Known {
    all: &'static [&'static str],
    cause: Cause,
    hint: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        all: &["Can't get 1:16 opt"],
        cause: Cause::CriuTooOld,
        hint: "this CRIU is too old for the kernel (SO_PASSSEC on connected sockets): CRIU 4.2 or later",
    },
    Known {
        all: &["vdso"],
        cause: Cause::CriuTooOld,
        hint: "this CRIU is too old for the kernel's vdso: CRIU 4.2 or later",
    },
    Known {
        all: &["Unknown VMA"],
        cause: Cause::CriuTooOld,
        hint: "this CRIU does not know a mapping of this kernel: CRIU 4.2 or later",
    },
    // The kernel does not pass an io_uring's descriptor over a socket, which is how CRIU's parasite hands over all of them.
    Known {
        all: &["send_fds failed (-22)"],
        cause: Cause::Unsupported,
        hint: "a process holds an io_uring, which CRIU cannot dump; most programs have a setting to do without it",
    },
    Known {
        all: &["io_uring"],
        cause: Cause::Unsupported,
        hint: "a process uses io_uring, which CRIU cannot dump; most programs have a setting to do without it",
    },
    Known {
        all: &["Unsupported proto 262"],
        cause: Cause::Unsupported,
        hint: "an MPTCP socket (Go 1.24 and later listen with MPTCP; GODEBUG=multipathtcp=0 turns it off)",
    },
    Known {
        all: &["Unsupported proto"],
        cause: Cause::Unsupported,
        hint: "a socket of a protocol that CRIU cannot dump",
    },
    Known {
        all: &["Unsupported socket"],
        cause: Cause::Unsupported,
        hint: "a socket of a family or type that CRIU cannot dump",
    },
    Known {
        all: &["In-flight connection"],
        cause: Cause::Transient,
        hint: "a connection that no process has accepted yet; try again",
    },
    Known {
        all: &["in-flight socket"],
        cause: Cause::Transient,
        hint: "a unix connection that no process has accepted yet; try again",
    },
    Known {
        all: &["external socket", "half of"],
        cause: Cause::Unsupported,
        hint: "a unix socket whose other end is outside the container",
    },
    Known {
        all: &["unix socket", "external"],
        cause: Cause::Unsupported,
        hint: "a unix socket whose other end is outside the container",
    },
    Known {
        all: &["Can't dump nested"],
        cause: Cause::Unsupported,
        hint: "processes in namespaces that were made inside the container (a container in the container)",
    },
    Known {
        all: &["Can't dump ghost file"],
        cause: Cause::Limit,
        hint: "a deleted file that is still open is larger than the limit: raise {ghost_limit}",
    },
    Known {
        all: &["link-remap"],
        cause: Cause::Limit,
        hint: "an open file was renamed or deleted while another name of it exists",
    },
    Known {
        all: &["inotify"],
        cause: Cause::Unsupported,
        hint: "an inotify watch on a file of the overlay file system whose path cannot be found again",
    },
    Known {
        all: &["fsnotify"],
        cause: Cause::Unsupported,
        hint: "an inotify or fanotify watch on a file whose path cannot be found again",
    },
    Known {
        all: &["Can't find suitable path for handle"],
        cause: Cause::Unsupported,
        hint: "an inotify watch on a file of the overlay file system whose path cannot be found again",
    },
    Known {
        all: &["Unexpected process"],
        cause: Cause::Transient,
        hint: "a process in the container's cgroup that is not a child of its init, such as a live exec session: end it first",
    },
    Known {
        all: &["build-ID"],
        cause: Cause::Mismatch,
        hint: "a program or library differs from that on the source",
    },
    Known {
        all: &["has bad build"],
        cause: Cause::Mismatch,
        hint: "a program or library differs from that on the source",
    },
    Known {
        all: &["has bad size"],
        cause: Cause::Mismatch,
        hint: "an open file differs from that on the source",
    },
    Known {
        all: &["has bad checksum"],
        cause: Cause::Mismatch,
        hint: "an open file differs from that on the source",
    },
    Known {
        all: &["cpu: "],
        cause: Cause::Mismatch,
        hint: "the processor lacks features that the processes could be using",
    },
    Known {
        all: &["Can't lookup mount", "/dev/null"],
        cause: Cause::Unsupported,
        hint: "the container's stdio is the host's /dev/null; it was once restored without its pipes",
    },
    Known {
        all: &["Can't lookup mount"],
        cause: Cause::Unsupported,
        hint: "an open file lies on a mount that is not the container's",
    },
    Known {
        all: &["doesn't have a proper root mount"],
        cause: Cause::Unsupported,
        hint: "a bind mount from the host that the spec does not name",
    },
    Known {
        all: &["Unable to freeze cgroup"],
        cause: Cause::Transient,
        hint: "a process does not freeze (waiting in the kernel, for a disk or NFS?)",
    },
    Known {
        all: &["Bind address already in use"],
        cause: Cause::Mismatch,
        hint: "the address or port is in use on the destination",
    },
    Known {
        all: &["Can't bind inet socket"],
        cause: Cause::Mismatch,
        hint: "the container's address is missing on the destination, or in use",
    },
    Known {
        all: &["Unable to dump", "of that type"],
        cause: Cause::Unsupported,
        hint: "an open file of a kind that CRIU cannot dump",
    },
    Known {
        all: &["Can't dump file", "of that type"],
        cause: Cause::Unsupported,
        hint: "an open file of a kind that CRIU cannot dump",
    },
];

/// The time stamp, the pid column of a restore, and `Error (file:line): ` taken off.
fn strip(line: &str) -> &str {
    let line = line.trim();
    match line.find("Error (") {
        Some(at) => line[at..].split_once("): ").map_or(line, |(_, said)| said.trim()),
        None => line,
    }
}

/// The first error line of a log that is not harmless.
pub fn first_error(log: impl IntoIterator<Item = String>) -> Option<Finding> {
    let mut context: Option<String> = None;
    for line in log {
        if line.contains("Error (") && !HARMLESS.iter().any(|h| line.contains(h)) {
            return Some(Finding::new(&line));
        }
        // Warnings that are the whole story when an unspecific error follows.
        if line.contains("Unexpected process") {
            context.get_or_insert(line);
        }
    }
    context.map(|line| {
        Finding::new(
            line.rsplit_once("Warn  (")
                .and_then(|(_, l)| l.split_once("): "))
                .map_or(line.as_str(), |(_, l)| l),
        )
    })
}

/// [`first_error`] of a file; `None` when there is no file either.
pub fn first_error_in(path: &Path) -> Option<Finding> {
    let file = std::fs::File::open(path).ok()?;
    // Names in a log need not be UTF-8.
    first_error(
        BufReader::new(file)
            .split(b'\n')
            .map_while(Result::ok)
            .map(|l| String::from_utf8_lossy(&l).into_owned()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(log: &str) -> Option<Finding> {
        first_error(log.lines().map(str::to_owned))
    }

    #[test]
    fn the_first_error_counts_and_harmless_ones_do_not() {
        // CRIU 4.1.1 on kernel 6.18, a process with a connected socket.
        let log = "(00.000012) Warn  (criu/kerndat.c:1153): madvise(MADV_GUARD_INSTALL) is supported\n\
             (00.000431) Error (criu/rlimit.c:28): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
             (00.021112) sockets: Searching for socket 0x4e3a family 1\n\
             (00.021149) Error (criu/sockets.c:524): sockets: Can't get 1:16 opt: Operation not supported\n\
             (00.021160) ----------------------------------------\n\
             (00.021173) Error (criu/cr-dump.c:1661): Dump files (pid: 4222) failed with -1\n";
        let found = of(log).unwrap();
        assert_eq!(found.line, "sockets: Can't get 1:16 opt: Operation not supported");
        assert_eq!(found.cause, Cause::CriuTooOld);
    }

    #[test]
    fn a_restore_log_has_a_pid_column() {
        let log = "(00.093311)      1: Error (criu/files-reg.c:2219): File usr/bin/app has bad size 7 (expect 9)\n\
             (00.093400) Error (criu/cr-restore.c:2557): Restoring FAILED.";
        let found = of(log).unwrap();
        assert_eq!(found.line, "File usr/bin/app has bad size 7 (expect 9)");
        assert_eq!(found.cause, Cause::Mismatch);
    }

    #[test]
    fn causes_are_recognised_in_the_logs_of_criu_4_2_1() {
        let rlimit = "(00.042957) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n";
        for (log, line, cause, hint) in [
            (
                "pie: 26716: Error (criu/pie/parasite.c:588): send_fds failed (-22)\n(00.046151) Error (criu/parasite-syscall.c:280): Can't retrieve FDs",
                "send_fds failed (-22)",
                Cause::Unsupported,
                "io_uring",
            ),
            (
                "(00.037404) Error (criu/proc_parse.c:502): Unknown shit 600 (anon_inode:[io_uring])\n(00.03) Error (criu/proc_parse.c:738): Can't open",
                "Unknown shit 600 (anon_inode:[io_uring])",
                Cause::Unsupported,
                "io_uring",
            ),
            (
                "(00.053211) Error (criu/sk-inet.c:137): inet: Unsupported proto 262 for socket 8aefb",
                "inet: Unsupported proto 262 for socket 8aefb",
                Cause::Unsupported,
                "MPTCP",
            ),
            (
                "(00.075390) Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 8b18d",
                "inet: In-flight connection (l) for 8b18d",
                Cause::Transient,
                "accepted",
            ),
            (
                "(00.044377) Error (criu/namespaces.c:460): Can't dump nested pid namespace for 27285",
                "Can't dump nested pid namespace for 27285",
                Cause::Unsupported,
                "container in the container",
            ),
        ] {
            let found = of(&format!("{rlimit}{log}\n")).unwrap();
            assert_eq!((found.line.as_str(), found.cause), (line, cause));
            assert!(found.hint.unwrap().contains(hint));
        }
    }

    #[test]
    fn a_log_without_errors_has_none() {
        assert_eq!(of("(00.1) Dumping finished successfully\n"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn the_ghost_limit_hint_names_our_option() {
        let found = Finding::new(
            "(00.1) Error (criu/files-reg.c:1031): Can't dump ghost file /x of 2097152 size, increase limit",
        );
        assert!(found.to_string().contains(GHOST_LIMIT_OPTION));
        assert_eq!(found.cause, Cause::Limit);
    }
}
