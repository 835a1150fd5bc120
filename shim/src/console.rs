//! The pty of a process with a terminal: the socket on which runc sends its master, window size, and the input queue (what was
//! typed and not yet read). Copying is in [`crate::io`].

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
        termios::{InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr},
    },
    unistd::isatty,
};
use tokio::{io::Interest, net::UnixListener, time::timeout};

/// How long runc may take to send the master once somebody waits for it.
const RECEIVE: Duration = Duration::from_secs(30);
/// Most bytes that a pty's input queue holds (N_TTY_BUF_SIZE of the kernel, less one).
const QUEUE: usize = 4095;
/// Longest path of a unix socket (`sun_path`, with its final zero).
const SUN_PATH: usize = 108;

/// A unix socket for `runc --console-socket`; its directory goes when it is dropped.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl ConsoleSocket {
    /// Makes a socket in a new directory (mode 0700) in `dir`, or in the directory for temporary files where the path would be
    /// too long for a socket.
    pub fn new(dir: &Path) -> Result<ConsoleSocket> {
        const NAME: &str = "pty.sock";
        let long = dir.as_os_str().as_bytes().len() + "/pty-123456/".len() + NAME.len() >= SUN_PATH;
        let parent = if long { std::env::temp_dir() } else { dir.to_path_buf() };
        let dir = tempfile::Builder::new()
            .prefix("pty-")
            .tempdir_in(&parent)
            .with_context(|| format!("making a directory for a console socket in {}", parent.display()))?;
        let path = dir.path().join(NAME);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("binding the console socket {}", path.display()))?;
        Ok(ConsoleSocket { listener, path, _dir: dir })
    }

    /// Its path, for runc.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master. It may be called before or after runc sends it.
    pub async fn receive(self) -> Result<OwnedFd> {
        timeout(RECEIVE, async {
            let (stream, _) = self.listener.accept().await.context("accepting runc on the console socket")?;
            loop {
                stream.readable().await.context("waiting for the terminal's master")?;
                match stream.try_io(Interest::READABLE, || Ok(receive_fd(stream.as_fd())?)) {
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                    other => {
                        return other
                            .context("receiving the terminal's master")?
                            .context("runc sent no terminal");
                    }
                }
            }
        })
        .await
        .context("runc did not send the terminal's master")?
    }
}

/// One message's first descriptor.
fn receive_fd(socket: BorrowedFd) -> nix::Result<Option<OwnedFd>> {
    let mut name = [0u8; 4096];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
            received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(received.into_iter().next().filter(|fd| isatty(fd).unwrap_or(false)))
}

/// Sets the window size in characters; the foreground process group gets SIGWINCH.
pub fn resize(master: BorrowedFd, width: u16, height: u16) -> Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize through the pointer, which is valid for the call.
    let rc = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    if rc < 0 {
        return Err(std::io::Error::last_os_error()).context("setting the terminal's window size");
    }
    Ok(())
}

/// The window size `(width, height)` in characters.
pub fn size(master: BorrowedFd) -> Result<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one winsize through the pointer, which is valid for the call.
    let rc = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) };
    if rc < 0 {
        return Err(std::io::Error::last_os_error()).context("reading the terminal's window size");
    }
    // SAFETY: all zeroes is a valid winsize, and the call has succeeded.
    let size = unsafe { size.assume_init() };
    Ok((size.ws_col, size.ws_row))
}

/// Opens the slave that belongs to a master, whatever mount namespace its devpts is in.
fn peer(master: BorrowedFd) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes its flags by value and touches no memory of ours.
    let raw = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if raw < 0 {
        return Err(std::io::Error::last_os_error()).context("opening the terminal's slave");
    }
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Takes what was typed and not read out of the queue of a pty whose processes are frozen: finished lines and the line being
/// typed. [`put_input`] puts it back. An end-of-file mark (`^D`) among them becomes a zero byte, as the kernel stores it.
pub fn take_input(master: BorrowedFd) -> Result<Vec<u8>> {
    let slave = peer(master)?;
    let saved = tcgetattr(&slave).context("reading the terminal's mode")?;
    // Only without canonical mode does a read return the line that is still being typed.
    let mut raw = saved.clone();
    raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG | LocalFlags::IEXTEN);
    raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 0;
    raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    tcsetattr(&slave, SetArg::TCSANOW, &raw).context("switching the terminal to raw mode")?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(n) = nix::unistd::read(&slave, &mut buffer)
        && n > 0
        && bytes.len() <= 16 * QUEUE
    {
        bytes.extend_from_slice(&buffer[..n]);
    }
    tcsetattr(&slave, SetArg::TCSANOW, &saved).context("setting the terminal's mode back")?;
    Ok(bytes)
}

/// Puts bytes into the input queue as they are: not echoed (they were, when they were typed), not interpreted again. Returns how
/// many the queue has taken. The mode is as before when it returns.
pub fn put_input(master: BorrowedFd, bytes: &[u8]) -> Result<usize> {
    let bytes = &bytes[..bytes.len().min(QUEUE)];
    if bytes.is_empty() {
        return Ok(0);
    }
    let slave = peer(master)?;
    let saved = tcgetattr(&slave).context("reading the terminal's mode")?;
    tcsetattr(&slave, SetArg::TCSANOW, &literal(saved.clone())).context("switching the terminal's mode")?;
    let outcome = insert(&slave, master, bytes);
    tcsetattr(&slave, SetArg::TCSANOW, &saved).context("setting the terminal's mode back")?;
    outcome
}

/// A mode in which input is queued as it is. Canonical mode stays as it was: turning it off and on again would make one line of
/// all that is queued, the unfinished one included.
fn literal(mut mode: Termios) -> Termios {
    mode.input_flags = InputFlags::empty();
    mode.local_flags &= LocalFlags::ICANON;
    for (index, character) in mode.control_chars.iter_mut().enumerate() {
        if index != SpecialCharacterIndices::VMIN as usize && index != SpecialCharacterIndices::VTIME as usize
        {
            *character = 0; // _POSIX_VDISABLE on Linux
        }
    }
    mode
}

/// By TIOCSTI where we may (it has happened when it returns), else through the master.
fn insert(slave: &OwnedFd, master: BorrowedFd, bytes: &[u8]) -> Result<usize> {
    for (done, byte) in bytes.iter().enumerate() {
        // SAFETY: TIOCSTI reads one byte through the pointer, which is valid for the call.
        if unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSTI, byte) } == 0 {
            continue;
        }
        if done > 0 {
            return Ok(done);
        }
        let written = nix::unistd::write(master, bytes).context("writing to the terminal")?;
        // The kernel moves it from the master to the queue in a work item that cannot be waited for.
        std::thread::sleep(Duration::from_millis(5));
        return Ok(written);
    }
    Ok(bytes.len())
}

/// Fails unless `fd` is a terminal.
pub fn must_be_tty(fd: &impl AsFd) -> Result<()> {
    if !isatty(fd).unwrap_or(false) {
        bail!("not a terminal");
    }
    Ok(())
}
