//! The gates themselves: what the shim's executable does when it is called as `<bundle>/gate/criu` or `<bundle>/gate/action`,
//! and, because this is where it finds out what it was called as, as [`super::tar`].
//!
//! - `criu` stands first in runc's PATH. runc starts it as `criu swrk 3` with the RPC socket as descriptor 3. If the request that waits there is
//!   RESTORE, it says so on the gate's socket and waits for the answer; in any case it then becomes the real CRIU (same process).
//! - `action` is CRIU's action script. At `post-restore` the tasks are complete and have not run; its exit status decides. CRIU reads its
//!   configuration twice and so calls each script twice: the second call finds the answer in a file. Where there is the program
//!   `transship-quick`, that does it, and this only if it cannot.
//!
//! It runs before anything else in the shim's main: no threads, no runtime. The other side is [`super::gate_server`].

use std::ffi::{CStr, OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use crate::cgroup;

pub(super) const CRIU: &str = "criu";
/// The name of the action script.
pub const ACTION: &str = "action";
/// Where the shim listens, in the directory of the gates.
pub const SOCKET: &str = "sock";
pub(super) const REAL_CRIU: &str = "real-criu";
/// The file beside it with the shim's answer, once there is one.
pub const ANSWER: &str = "answer";
/// The answer that lets the tasks run.
pub const GO: &[u8] = b"go";
/// The variable in which CRIU says at which stage it calls the script,
pub const STAGE: &str = "CRTOOLS_SCRIPT_ACTION";
/// and the only stage at which the shim is asked.
pub const POST_RESTORE: &str = "post-restore";
/// What the script says to the shim then; the answer lies in [`ANSWER`] when the shim ends the conversation.
pub const HELLO: &[u8] = b"{\"at\":\"post-restore\"}\n";
/// A cgroup that CRIU has to be put into, if there is this file; see [`super::gate_server::enter_cgroup`].
pub(super) const CGROUP: &str = "cgroup";

/// Where a restore is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum At {
    /// Before CRIU begins.
    Restore,
    /// The tasks are complete.
    PostRestore,
}

/// A gate's line to the shim.
#[derive(Serialize, Deserialize)]
pub(super) struct Hello {
    pub at: At,
}

/// The shim's answer.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Go {
    pub go: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// Directory to put first in CRIU's PATH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_first: Option<PathBuf>,
    /// Restore without transparent huge pages.
    #[serde(default)]
    pub small_pages: bool,
}

/// Runs as a gate if that is what this process was started as; `None` for every other start. To be called first thing in main.
pub fn main_if_invoked() -> Option<ExitCode> {
    // runc calls us by the bare name `criu`, so argv[0] does not tell where we are; the path given to execve does.
    let executable = exec_path()?;
    let (dir, name) = (executable.parent()?.to_owned(), executable.file_name()?.to_owned());
    if super::tar::is_ours(&executable) {
        return Some(super::tar::main(&executable).unwrap_or_else(|e| {
            eprintln!("tar: {e:#}");
            ExitCode::FAILURE
        }));
    }
    if (name != CRIU && name != ACTION) || !dir.join(REAL_CRIU).is_file() {
        return None;
    }
    let result = if name == CRIU { criu(&dir) } else { action(&dir) };
    Some(result.unwrap_or_else(|e| {
        eprintln!("transship gate: {e:#}");
        ExitCode::FAILURE
    }))
}

fn exec_path() -> Option<PathBuf> {
    // SAFETY: getauxval has no preconditions.
    let at = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const libc::c_char;
    if at.is_null() {
        return None;
    }
    // SAFETY: the kernel puts a nul-terminated path there, which lives as long as the process.
    let path = unsafe { CStr::from_ptr(at) };
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// A name in an open directory, as a path of any length limit.
pub(super) fn via_fd(dir: BorrowedFd<'_>, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

fn ask(dir: &Path, at: At) -> Result<Go> {
    let fd = std::fs::File::open(dir).with_context(|| format!("opening {}", dir.display()))?;
    let mut stream = UnixStream::connect(via_fd(fd.as_fd(), SOCKET)).context("connecting to the shim")?;
    let mut line = serde_json::to_vec(&Hello { at }).context("encoding")?;
    line.push(b'\n');
    stream.write_all(&line).context("speaking to the shim")?;
    let mut answer = String::new();
    // EOF: the shim is gone, nobody will ever say go.
    BufReader::new(stream).read_line(&mut answer).context("waiting for the shim")?;
    ensure!(!answer.is_empty(), "the shim ended");
    serde_json::from_str(&answer).with_context(|| format!("the shim says {answer:?}"))
}

fn refused_already(dir: &Path) -> bool {
    std::fs::read(dir.join(ANSWER)).is_ok_and(|a| a == b"abort")
}

fn criu(dir: &Path) -> Result<ExitCode> {
    let real = std::fs::read(dir.join(REAL_CRIU)).context("reading which CRIU to run")?;
    let mut command = Command::new(OsStr::from_bytes(&real));
    command.arg0(CRIU).args(std::env::args_os().skip(1));
    let mut path = without(dir, std::env::var_os("PATH").unwrap_or_default());
    if is_restore()? {
        if refused_already(dir) {
            return Ok(ExitCode::FAILURE);
        }
        let answer = ask(dir, At::Restore)?;
        if !answer.go {
            return Ok(ExitCode::FAILURE);
        }
        if let Ok(path) = std::fs::read_to_string(dir.join(CGROUP)) {
            let made = cgroup::made_by_crun(nix::unistd::getppid().as_raw());
            cgroup::enter(made.as_deref().unwrap_or(&path)).context("entering the container's cgroup")?;
        }
        if let Some(netns) = answer.netns {
            let fd = std::fs::File::open(&netns).with_context(|| format!("opening {}", netns.display()))?;
            setns(fd, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", netns.display()))?;
        }
        if let Some(first) = answer.path_first {
            path = super::swrk::prepend_path(&first, Some(&path));
        }
        if answer.small_pages {
            small_pages()?;
        }
    }
    command.env("PATH", path);
    Err(command.exec()).with_context(|| format!("running {}", OsStr::from_bytes(&real).display()))
}

/// Inherited by CRIU and by the tasks that it makes; its restorer gives each task back what the task had.
fn small_pages() -> Result<()> {
    // SAFETY: PR_SET_THP_DISABLE takes numbers.
    let done = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    ensure!(done == 0, "switching transparent huge pages off: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Looks at the request without taking it. A RESTORE begins with field 1 (type), value 2; VERSION and FEATURE_CHECK with others.
fn is_restore() -> Result<bool> {
    let mut args = std::env::args_os().skip(1);
    let (Some(verb), Some(fd)) = (args.next(), args.next()) else { return Ok(false) };
    let fd = fd.to_str().and_then(|n| n.parse::<i32>().ok());
    let (true, Some(fd)) = (verb == "swrk", fd) else { return Ok(false) };
    let mut head = [0; 2];
    let n = recv(fd, &mut head, MsgFlags::MSG_PEEK).context("looking at runc's request")?;
    Ok(asks_restore(&head[..n]))
}

/// So a request begins; see [`is_restore`].
pub(super) fn asks_restore(head: &[u8]) -> bool {
    head == [0x08, super::rpc::ReqType::Restore as u8]
}

fn action(dir: &Path) -> Result<ExitCode> {
    if std::env::var_os(STAGE).is_none_or(|a| a != POST_RESTORE) {
        return Ok(ExitCode::SUCCESS);
    }
    let go = match std::fs::read(dir.join(ANSWER)) {
        Ok(answer) => answer == GO,
        Err(_) => ask(dir, At::PostRestore)?.go,
    };
    Ok(if go { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn without(dir: &Path, path: OsString) -> OsString {
    let kept = std::env::split_paths(&path).filter(|p| p != dir);
    std::env::join_paths(kept).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::super::gate_server::{GateServer, Wait};
    use super::*;
    use crate::program::Programs;
    use std::time::Duration;

    fn gates() -> (tempfile::TempDir, GateServer) {
        // Longer than a socket's address may be.
        let top = tempfile::tempdir().unwrap();
        let bundle = top.path().join("x".repeat(120));
        std::fs::create_dir(&bundle).unwrap();
        let server = GateServer::prepare(
            &bundle,
            &Programs { full: "/bin/true".into(), quick: None },
            Path::new("/usr/sbin/criu"),
            "tcp-established",
        )
        .unwrap();
        (top, server)
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn the_quick_program_says_the_same() {
        let hello = serde_json::to_string(&Hello { at: At::PostRestore }).unwrap();
        assert_eq!((hello + "\n").as_bytes(), HELLO);
    }

    #[test]
    fn a_restore_passes_both_gates_in_order() {
        let (_top, mut server) = gates();
        let dir = server.dir().to_owned();
        let restore = std::thread::spawn(move || {
            (ask(&dir, At::Restore).unwrap().go, ask(&dir, At::PostRestore).unwrap().go)
        });
        server.wait_restore(&Wait::at_most(SOON)).unwrap();
        server.open_restore().unwrap();
        server.wait_restored(&Wait::at_most(SOON)).unwrap();
        server.open_run().unwrap();
        assert_eq!(restore.join().unwrap(), (true, true));
        assert_eq!(std::fs::read(server.dir().join(ANSWER)).unwrap(), b"go");
    }

    #[test]
    fn a_refusal_holds_for_those_who_come_later() {
        let (_top, mut server) = gates();
        server.refuse().unwrap();
        assert!(refused_already(server.dir()));
    }

    #[test]
    fn a_server_that_is_dropped_refuses() {
        let (_top, server) = gates();
        let dir = server.dir().to_owned();
        let waiting = std::thread::spawn(move || {
            let answer = ask(&dir, At::Restore);
            (answer.is_ok_and(|a| a.go), refused_already(&dir))
        });
        std::thread::sleep(Duration::from_millis(50));
        drop(server);
        assert_eq!(waiting.join().unwrap(), (false, true));
    }

    #[test]
    fn waiting_ends_with_runc_or_with_the_deadline() {
        let (_top, mut server) = gates();
        let mut child = Command::new("true").spawn().unwrap();
        let pidfd = super::super::gate_server::pidfd(child.id().try_into().unwrap()).unwrap();
        let wait = Wait { or_end_of: Some(pidfd.as_fd()), ..Wait::at_most(SOON) };
        assert!(server.wait_restore(&wait).unwrap_err().to_string().contains("runc ended"));
        child.wait().unwrap();
        let late = server.wait_restore(&Wait::at_most(Duration::from_millis(5))).unwrap_err();
        assert!(late.to_string().contains("in time"));
    }

    #[test]
    fn the_configuration_names_the_action() {
        let (top, server) = gates();
        let bundle = server.dir().parent().unwrap().to_owned();
        let conf = std::fs::read_to_string(bundle.join("criu.conf")).unwrap();
        assert!(
            conf.starts_with("tcp-established\naction-script \"") && conf.contains("/gate/action"),
            "{conf}"
        );
        drop(server);
        super::super::gate_server::remove(&bundle).unwrap();
        assert!(!bundle.join("gate").exists());
        drop(top);
    }

    #[test]
    fn the_real_criu_does_not_find_the_gate_again() {
        assert_eq!(
            without(Path::new("/b/gate"), "/b/gate:/usr/bin:/sbin".into()),
            OsString::from("/usr/bin:/sbin")
        );
    }
}
