//! One CRIU worker: `criu swrk FD`, spoken to in [`super::rpc`]'s messages over a SOCK_SEQPACKET socketpair.
//!
//! A CRIU run is never interrupted: dropping a [`Swrk`] closes our end and leaves the process to finish.
//! The shim reaps with `waitpid(-1)` in one place, so an exit may have been collected by somebody else: the end of a run is
//! recognised by its response or by EOF, never by the exit status.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
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
    /// What the worker sees in `/run`.
    pub run: Run<'a>,
    /// What it sees in `/proc` instead of what is there: (file, on which file). One that cannot be mounted is left out. Not empty, it gives
    /// the worker a mount namespace of its own, as [`Run`] does.
    pub proc: &'a [(CString, CString)],
    /// Where [`super::conceal`] is to send the worker's questions.
    pub questions: Option<BorrowedFd<'a>>,
    /// More environment.
    pub env: Vec<(&'a str, &'a str)>,
}

/// What a worker sees in `/run`. All but the first give it a mount namespace of its own, a copy of ours in which mounts that come and go
/// elsewhere still come and go.
#[derive(Default)]
pub enum Run<'a> {
    /// What is there.
    #[default]
    Shared,
    /// A tmpfs with nothing in it.
    Empty,
    /// This file as CRIU's cache of what it knows of the kernel; there has to be one already.
    Kdat(&'a Path),
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
        let questions = how.questions.map(|fd| fd.as_raw_fd());
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
        command.envs(how.env.iter().copied());
        let over_run = match how.run {
            Run::Shared => None,
            Run::Empty => Some(OverRun::Tmpfs),
            Run::Kdat(file) => Some(OverRun::File(
                CString::new(file.as_os_str().as_bytes()).context("a path with a zero byte")?,
            )),
        };
        let mounts = Mounts { run: over_run, proc: how.proc.to_vec() };
        crate::private::under_private_umask(&mut command);
        // SAFETY: between fork and exec only async-signal-safe system calls are made: fcntl, setns, write, unshare, mount, seccomp and sendmsg, on
        // numbers and strings that were prepared above; nothing allocates.
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
                mounts.make()?;
                if let Some(socket) = questions {
                    super::conceal::install(socket)?;
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

/// What is mounted in the worker's own mount namespace.
struct Mounts {
    run: Option<OverRun>,
    /// From where to where.
    proc: Vec<(CString, CString)>,
}

/// What lies over `/run`.
enum OverRun {
    Tmpfs,
    File(CString),
}

impl Mounts {
    /// In the child, before its exec. System calls only, nothing allocates.
    fn make(&self) -> std::io::Result<()> {
        if self.run.is_none() && self.proc.is_empty() {
            return Ok(());
        }
        let (run, proc) = (Place::find(c"/run")?, Place::find(c"/proc")?);
        check(unshare_mounts())?;
        match &self.run {
            None => {}
            // A file system of its own on top: nothing below it matters to this worker.
            Some(OverRun::Tmpfs) => {
                run.detach()?;
                mount(Some(c"tmpfs"), c"/run", Some(c"tmpfs"), 0)?;
            }
            Some(OverRun::File(file)) => run.cover(|| mount(Some(file), KDAT, None, libc::MS_BIND))?,
        }
        if self.proc.is_empty() {
            return Ok(());
        }
        proc.cover(|| {
            for (from, to) in &self.proc {
                // the task may have gone
                let _ = mount(Some(from), to, None, libc::MS_BIND);
            }
            Ok(())
        })
    }
}

/// A mount that something is put on. Where a container's mounts get theirs from is something CRIU looks up in its own mounts: all keep
/// their peers but the one that is mounted on, or the others would see it.
struct Place {
    path: &'static CStr,
    /// It in the namespace before.
    before: libc::c_int,
}

impl Place {
    fn find(path: &'static CStr) -> std::io::Result<Place> {
        // SAFETY: a plain system call on a constant string.
        let before = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
        Ok(Place { path, before: check(before)? })
    }

    /// Has something mounted here that nobody else sees.
    fn cover(&self, with: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let own = self.detach()?;
        with()?;
        if own {
            self.rejoin();
        }
        Ok(())
    }

    /// Nobody else sees what is mounted here. Is it a mount of its own, or part of the root's?
    fn detach(&self) -> std::io::Result<bool> {
        match mount(None, self.path, None, libc::MS_PRIVATE) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                mount(None, c"/", None, libc::MS_PRIVATE).map(|()| false)
            }
            other => other.map(|()| true),
        }
    }

    /// Makes it a peer again of what it was a copy of. Linux 5.15; where it fails a container's mount that is slave to this one itself
    /// would not be recognised, which CRIU then says.
    fn rejoin(&self) {
        // SAFETY: plain system calls on a descriptor of ours and constant strings.
        unsafe {
            let now = libc::open(self.path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC);
            if now >= 0 {
                libc::syscall(libc::SYS_move_mount, self.before, c"".as_ptr(), now, c"".as_ptr(), SET_GROUP);
            }
        }
    }
}

const KDAT: &CStr = c"/run/criu.kdat";
/// `MOVE_MOUNT_SET_GROUP | MOVE_MOUNT_T_EMPTY_PATH | MOVE_MOUNT_F_EMPTY_PATH` (linux/mount.h).
const SET_GROUP: libc::c_uint = 0x100 | 0x40 | 0x4;

fn check(n: libc::c_int) -> std::io::Result<libc::c_int> {
    if n < 0 { Err(std::io::Error::last_os_error()) } else { Ok(n) }
}

fn unshare_mounts() -> libc::c_int {
    // SAFETY: no memory is passed.
    unsafe { libc::unshare(libc::CLONE_NEWNS) }
}

fn mount(from: Option<&CStr>, to: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> std::io::Result<()> {
    let raw = |s: Option<&CStr>| s.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: strings that live until the call returns, or null where mount(2) allows it.
    check(unsafe { libc::mount(raw(from), to.as_ptr(), raw(kind), flags, std::ptr::null()) }).map(drop)
}

pub(super) fn prepend_path(first: &Path, rest: Option<&OsStr>) -> std::ffi::OsString {
    let mut path = first.as_os_str().to_owned();
    if let Some(rest) = rest {
        path.push(":");
        path.push(rest);
    }
    path
}
