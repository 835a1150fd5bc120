//! One CRIU worker: `criu swrk FD`, spoken to in [`super::rpc`]'s messages over a SOCK_SEQPACKET socketpair.
//!
//! A CRIU run is never interrupted: dropping a [`Swrk`] closes our end and leaves the process to finish.
//! The shim reaps with `waitpid(-1)` in one place, so an exit may have been collected by somebody else: the end of a run is
//! recognised by its response or by EOF, never by the exit status.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use prost::Message;

use super::rpc::{CriuReq, CriuResp, ReqType};

/// Larger than any message of CRIU (runc reads them into 40 KiB).
const MESSAGE_CAP: usize = 256 << 10;

/// How the worker is started.
#[derive(Default)]
pub struct Spawn<'a> {
    /// Descriptors that the worker keeps, under the same numbers.
    pub keep: Vec<BorrowedFd<'a>>,
    /// Network namespace to enter before the exec.
    pub netns: Option<BorrowedFd<'a>>,
    /// Open `cgroup.procs` files of cgroups to join before the exec.
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Directory to put first in PATH (a faster `tar`, say).
    pub path_first: Option<&'a Path>,
}

/// A running worker.
pub struct Swrk {
    socket: OwnedFd,
    pid: Pid,
}

impl Swrk {
    /// Starts `criu swrk`. Returns once the exec has happened.
    pub fn spawn(criu: &Path, how: &Spawn<'_>) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("making CRIU's RPC socket pair")?;
        let mut inherit: Vec<RawFd> = how.keep.iter().map(AsRawFd::as_raw_fd).collect();
        inherit.push(theirs.as_raw_fd());
        let netns = how.netns.map(|fd| fd.as_raw_fd());
        let cgroups: Vec<RawFd> = how.cgroups.iter().map(AsRawFd::as_raw_fd).collect();

        let mut command = Command::new(criu);
        // The worker takes the socket under the number that it has here: no dup2, which could hit a descriptor of the standard library.
        command
            .arg("swrk")
            .arg(theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(first) = how.path_first {
            command.env("PATH", prepend_path(first, std::env::var_os("PATH").as_deref()));
        }
        // SAFETY: between fork and exec only async-signal-safe system calls are made: fcntl, setns and write, on numbers that
        // were prepared above; nothing allocates.
        unsafe {
            command.pre_exec(move || {
                for &fd in &inherit {
                    fcntl(BorrowedFd::borrow_raw(fd), FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                for &fd in &cgroups {
                    nix::unistd::write(BorrowedFd::borrow_raw(fd), b"0")?;
                }
                if let Some(fd) = netns {
                    setns(BorrowedFd::borrow_raw(fd), CloneFlags::CLONE_NEWNET)?;
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("starting {}", criu.display()))?;
        // `theirs` is closed here, so that the worker's end gives us EOF.
        Ok(Self { socket: ours, pid: Pid::from_raw(i32::try_from(child.id()).context("CRIU's pid")?) })
    }

    /// The worker's pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends one request.
    pub fn send(&self, request: &CriuReq) -> Result<()> {
        let bytes = request.encode_to_vec();
        let sent = send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)
            .context("sending a request to CRIU")?;
        ensure!(sent == bytes.len(), "CRIU took {sent} of {} bytes of a request", bytes.len());
        Ok(())
    }

    /// Receives one message; `None` is the worker's end.
    pub fn receive(&self) -> Result<Option<CriuResp>> {
        let mut buf = vec![0; MESSAGE_CAP];
        let n = loop {
            match recv(self.socket.as_raw_fd(), &mut buf, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                other => break other.context("receiving CRIU's response")?,
            }
        };
        if n == 0 {
            return Ok(None);
        }
        ensure!(n < MESSAGE_CAP, "CRIU sent a message of more than {MESSAGE_CAP} bytes");
        Ok(Some(CriuResp::decode(&buf[..n]).context("decoding CRIU's response")?))
    }

    /// One request and its response; NOTIFY messages in between are answered by `on_notify`.
    pub fn call(&self, request: &CriuReq, on_notify: &mut dyn FnMut(&str) -> bool) -> Result<CriuResp> {
        self.send(request)?;
        loop {
            let Some(response) = self.receive()? else { bail!("CRIU ended without an answer") };
            if response.r#type != ReqType::Notify as i32 {
                return Ok(response);
            }
            self.answer(&response, on_notify)?;
        }
    }

    /// Answers a NOTIFY.
    pub fn answer(&self, message: &CriuResp, on_notify: &mut dyn FnMut(&str) -> bool) -> Result<()> {
        let script = message.notify.as_ref().and_then(|n| n.script.as_deref()).unwrap_or("");
        self.send(&CriuReq::notify_answer(on_notify(script)))
    }

    /// Waits until the worker has gone. Its status is of no interest (see the module's text).
    pub fn finish(self) {
        let Self { socket, pid } = self;
        // A worker that waits for another request sees EOF and leaves.
        drop(socket);
        while let Err(Errno::EINTR) = waitpid(pid, None) {}
    }
}

impl AsFd for Swrk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn prepend_path(first: &Path, rest: Option<&OsStr>) -> std::ffi::OsString {
    let mut path = first.as_os_str().to_owned();
    if let Some(rest) = rest {
        path.push(":");
        path.push(rest);
    }
    path
}
