//! CRIU's side of the restore (criu/uffd.c): it connects to `lazy-pages.socket` in its work directory, once. On that connection
//! every task writes its pid in the container (an `int`), followed by one byte that carries its userfaultfd; a zombie writes the
//! negative of its pid and nothing else. When all tasks are complete and before any of them runs, CRIU writes the word
//! `RSTF`. No answer is expected anywhere.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, recvmsg, setsockopt, socket, sockopt,
};

use super::uffd::Uffd;
use crate::criu::gate_server::pidfd;

/// `LAZY_PAGES_RESTORE_FINISHED`; no pid is as large.
pub const FINISHED: i32 = 0x5253_5446;

/// The listening socket; its file goes with it.
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Listener {
    /// Listens at a path of any length. Root only.
    pub fn new(path: &Path) -> Result<Self> {
        let what = || format!("listening on {}", path.display());
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("no path for a socket: {path:?}")
        };
        let dir = File::open(dir).with_context(what)?;
        // CRIU connects by the bare name; the address of ours would often be longer than 108 bytes.
        let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        match std::fs::remove_file(&short) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).with_context(what),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).with_context(what)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&short).with_context(what)?).with_context(what)?;
        let this = Self { socket, path: path.to_owned() };
        std::fs::set_permissions(&short, PermissionsExt::from_mode(0o600)).with_context(what)?;
        // Inherited by the connection on newer kernels; set again there for the others.
        setsockopt(&this.socket, sockopt::PassCred, &true).with_context(what)?;
        listen(&this.socket, Backlog::new(1)?).with_context(what)?;
        Ok(this)
    }

    /// The connection, if somebody has connected.
    pub fn accept(&self) -> Result<Option<Connection>> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(self.socket.as_raw_fd(), flags) {
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
            Err(e) => Err(e).context("accepting CRIU's connection"),
            Ok(fd) => {
                // SAFETY: accept has just made this descriptor.
                let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                Ok(Some(Connection::new(socket)?))
            }
        }
    }
}

/// What CRIU says.
pub enum Said {
    /// A task and its descriptor.
    Task {
        /// Its pid in the container.
        pid: u64,
        /// Its userfaultfd.
        uffd: Uffd,
        /// The task itself, unless the kernel did not tell who wrote.
        pidfd: Option<OwnedFd>,
    },
    /// All tasks are complete; they begin to run.
    Finished,
    /// Nobody holds the other end any more.
    End,
}

/// CRIU's connection.
pub struct Connection {
    socket: OwnedFd,
    /// Bytes of a word that is not complete.
    have: Vec<u8>,
    /// The pid that was read; its descriptor comes next.
    task: Option<u64>,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Result<Self> {
        setsockopt(&socket, sockopt::PassCred, &true).context("setting up CRIU's connection")?;
        Ok(Connection { socket, have: Vec::new(), task: None })
    }

    /// The next thing that was said, if anything was.
    pub fn read(&mut self) -> Result<Option<Said>> {
        loop {
            let mut buf = [0u8; 4];
            let want = if self.task.is_some() { 1 } else { 4 - self.have.len() };
            // as many as the kernel passes (SCM_MAX_FD): of those that found no room some would stay open
            let mut space = nix::cmsg_space!([i32; 253], nix::sys::socket::UnixCredentials);
            let (n, fds, from) = {
                let mut io = [IoSliceMut::new(&mut buf[..want])];
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
                match recvmsg::<()>(self.socket.as_raw_fd(), &mut io, Some(&mut space), flags) {
                    Err(Errno::EAGAIN) => return Ok(None),
                    Err(Errno::EINTR) => continue,
                    Err(Errno::ECONNRESET) => return Ok(Some(Said::End)),
                    Err(e) => return Err(e).context("reading from CRIU"),
                    Ok(m) => {
                        let (mut fds, mut from) = (Vec::new(), None);
                        for c in m.cmsgs().context("reading from CRIU")? {
                            match c {
                                ControlMessageOwned::ScmRights(raw) => {
                                    fds.extend(raw.into_iter().map(|fd| {
                                        // SAFETY: the kernel has just made this descriptor for us.
                                        unsafe { OwnedFd::from_raw_fd(fd) }
                                    }))
                                }
                                ControlMessageOwned::ScmCredentials(c) if c.pid() > 0 => from = Some(c.pid()),
                                _ => {}
                            }
                        }
                        (m.bytes, fds, from)
                    }
                }
            };
            if n == 0 {
                return Ok(Some(Said::End));
            }
            if let Some(pid) = self.task {
                let fd = fds.into_iter().next().with_context(|| format!("task {pid} sends no descriptor"))?;
                self.task = None;
                // The writer is the task itself, and it waits for the rest of the restore: the number is still its own.
                let pidfd = from.and_then(|p| pidfd(p).ok());
                return Ok(Some(Said::Task { pid, uffd: Uffd::new(fd)?, pidfd }));
            }
            self.have.extend_from_slice(&buf[..n]);
            let Ok(word) = <[u8; 4]>::try_from(self.have.as_slice()) else { continue };
            self.have.clear();
            match i32::from_ne_bytes(word) {
                FINISHED => return Ok(Some(Said::Finished)),
                // A zombie has no memory.
                word if word < 0 => {}
                word => {
                    ensure!(word > 0, "CRIU names pid 0");
                    self.task = Some(word as u64);
                }
            }
        }
    }
}
