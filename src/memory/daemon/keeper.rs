//! A helper process that outlives the daemon's.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel gives zeros to whoever waits for a page, and to everybody who
//! touches a missing page later. A daemon that is killed half-way would so corrupt the tasks silently. The keeper holds duplicates of
//! the descriptors. If the daemon's process ends before it has released them, the keeper kills the tasks, by their cgroup and by their
//! pidfds, and lets go of a memory when it is gone.
//!
//! It is the same executable, started again with one argument, with nothing but a socket as standard input.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

use super::uffd::Uffd;
use crate::cgroup::Freezer;
use crate::criu::gate_server::pidfd;
use crate::criu::page_server::page_size;

const DAEMON: u8 = b'd';
const HOLD: u8 = b'h';
const DROP: u8 = b'x';
const RELEASE: u8 = b'r';
/// How long one attempt to empty a cgroup may take.
const KILLING: Duration = Duration::from_secs(1);

/// The daemon's side.
pub struct Keeper {
    socket: OwnedFd,
    child: Child,
    next: u32,
}

impl Keeper {
    /// Starts `program arg`, whose main has to call [`main`] when it sees that argument.
    pub fn start(program: &Path, arg: &str) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("making the keeper's socket pair")?;
        let me = i32::try_from(std::process::id()).ok().and_then(|p| pidfd(p).ok());
        let me = me.context("opening a pidfd of this process")?;
        let mut command = Command::new(program);
        command.arg(arg).env_clear().current_dir("/");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only two system calls are made; nothing allocates.
        unsafe {
            command.pre_exec(|| {
                // Its own session: a signal for our process group is not for it.
                libc::setsid();
                // Closes on exec what somebody opened without that flag; kernels before 5.11 cannot.
                libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("starting the keeper, {}", program.display()))?;
        let keeper = Self { socket: ours, child, next: 0 };
        keeper.send(DAEMON, 0, &[me.as_fd()])?;
        Ok(keeper)
    }

    fn send(&self, what: u8, id: u32, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = [what, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&id.to_ne_bytes());
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let io = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &io, control, MsgFlags::MSG_NOSIGNAL, None);
        sent.context("talking to the keeper").map(drop)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Holds a descriptor, and the task that it belongs to if that is known; returns a number for [`Keeper::drop_one`].
    pub fn hold(&mut self, uffd: BorrowedFd<'_>, pidfd: Option<BorrowedFd<'_>>) -> Result<u32> {
        let id = self.next;
        self.next += 1;
        self.send(HOLD, id, &[uffd].into_iter().chain(pidfd).collect::<Vec<_>>())?;
        Ok(id)
    }

    /// This memory has all its pages, or is gone.
    pub fn drop_one(&self, id: u32) -> Result<()> {
        self.send(DROP, id, &[])
    }

    /// All is done: the keeper lets go of everything and ends.
    pub fn release(mut self) -> Result<()> {
        self.send(RELEASE, 0, &[])?;
        // In the shim somebody else may collect it: then this returns with ECHILD.
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < KILLING {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

struct Held {
    uffd: Uffd,
    pidfd: Option<OwnedFd>,
    freezer: Option<Freezer>,
}

/// The keeper itself: what the executable does when it is started with the keeper's argument, before anything else and without threads.
pub fn main() -> ExitCode {
    crate::private::process();
    crate::private::umask_for_root();
    // 1 and 2 are /dev/null and stay: what gets the number 2 later would be told of a panic.
    // SAFETY: nothing of this process uses the numbers from 3 on yet.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    for s in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGPIPE] {
        // SAFETY: no handler of ours is installed.
        let _ = unsafe { signal(s, SigHandler::SigIgn) };
    }
    // SAFETY: descriptor 0 is the socket that Keeper::start put there; nobody else takes it over.
    let socket = unsafe { OwnedFd::from_raw_fd(0) };
    let mut state = State { held: BTreeMap::new(), daemon: None, released: false, eof: false };
    match state.serve(&socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => {
            state.kill();
            ExitCode::FAILURE
        }
    }
}

struct State {
    held: BTreeMap<u32, Held>,
    daemon: Option<OwnedFd>,
    released: bool,
    eof: bool,
}

impl State {
    fn serve(&mut self, socket: &OwnedFd) -> Result<()> {
        loop {
            let mut fds: Vec<PollFd<'_>> =
                self.daemon.iter().map(|d| PollFd::new(d.as_fd(), PollFlags::POLLIN)).collect();
            let dead = fds.len();
            if !self.eof {
                fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
            }
            // The handle was dropped in a process that lives on (a panic): hold until the memories are gone.
            let timeout = if self.eof { PollTimeout::from(1000u16) } else { PollTimeout::NONE };
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => continue,
                other => other.context("waiting for the daemon")?,
            };
            let dead = dead > 0 && fds[0].any().unwrap_or(false);
            // What was said before the end counts.
            while !self.eof && !self.released && self.receive(socket)? {}
            if self.released {
                return Ok(());
            }
            if dead || (self.eof && self.daemon.is_none()) {
                self.kill();
                return Ok(());
            }
            if self.eof {
                self.forget_the_gone();
                if self.held.is_empty() {
                    return Ok(());
                }
            }
        }
    }

    /// Takes one message; `false` when none waits.
    fn receive(&mut self, socket: &OwnedFd) -> Result<bool> {
        let mut bytes = [0; 5];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut io = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let (n, fds) = match recvmsg::<()>(socket.as_raw_fd(), &mut io, Some(&mut space), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            Err(Errno::ECONNRESET) => (0, Vec::new()),
            Err(e) => return Err(e).context("reading from the daemon"),
            Ok(m) => {
                let rights = m.cmsgs()?.filter_map(|c| match c {
                    ControlMessageOwned::ScmRights(raw) => Some(raw),
                    _ => None,
                });
                // SAFETY: the kernel has just made these descriptors for us.
                let fds = rights.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect::<Vec<_>>();
                (m.bytes, fds)
            }
        };
        if n == 0 {
            self.eof = true;
            return Ok(false);
        }
        ensure!(n == bytes.len(), "a message of {n} bytes");
        let id = u32::from_ne_bytes(bytes[1..].try_into().expect("four bytes"));
        let mut fds = fds.into_iter();
        match bytes[0] {
            DAEMON => self.daemon = fds.next(),
            HOLD => {
                let uffd = Uffd::new(fds.next().context("no descriptor")?)?;
                let pidfd = fds.next();
                let freezer = pidfd.as_ref().and_then(freezer_of);
                self.held.insert(id, Held { uffd, pidfd, freezer });
            }
            DROP => drop(self.held.remove(&id)),
            _ => self.released = true,
        }
        Ok(true)
    }

    fn forget_the_gone(&mut self) {
        let page = page_size() as u64;
        self.held.retain(|_, h| !h.uffd.exited(page));
    }

    /// Kills until every memory is gone. Never gives up: to let go would be worse.
    fn kill(&mut self) {
        let mut nap = Duration::from_millis(1);
        loop {
            self.forget_the_gone();
            if self.held.is_empty() {
                return;
            }
            let mut done: Vec<&Path> = Vec::new();
            for h in self.held.values() {
                if let Some(pidfd) = &h.pidfd {
                    // SAFETY: plain system call; the descriptor is open.
                    unsafe {
                        libc::syscall(
                            libc::SYS_pidfd_send_signal,
                            pidfd.as_raw_fd(),
                            libc::SIGKILL,
                            std::ptr::null::<libc::siginfo_t>(),
                            0,
                        )
                    };
                }
                if let Some(freezer) = h.freezer.as_ref().filter(|f| !done.contains(&f.path())) {
                    done.push(freezer.path());
                    let _ = freezer.kill_all(KILLING);
                }
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(100));
        }
    }
}

/// The cgroup of a task, if it can be killed as a whole: not one that this process is in, or below.
fn freezer_of(pidfd: &OwnedFd) -> Option<Freezer> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid =
        info.lines().find_map(|l| l.strip_prefix("Pid:"))?.trim().parse::<i32>().ok().filter(|p| *p > 0)?;
    let theirs = Freezer::of_pid(pid).ok()?;
    let mine = Freezer::of_pid(i32::try_from(std::process::id()).ok()?);
    match mine {
        Ok(mine) if mine.path().starts_with(theirs.path()) => None,
        _ => Some(theirs),
    }
}
