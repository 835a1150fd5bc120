//! TCP sockets of other processes examined from outside, by a duplicate of their descriptor (pidfd_getfd).

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};

const SO_NETNS_COOKIE: i32 = 71;
const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_RECV_QUEUE: i32 = 1;
/// States (`net/tcp_states.h`) in which the peer may still send: ESTABLISHED, FIN_WAIT1, FIN_WAIT2.
const OPEN: [u8; 3] = [1, 4, 5];

/// An open TCP connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    /// The container's side.
    pub own: SocketAddr,
    /// The other side.
    pub peer: SocketAddr,
    /// The sequence number that is expected next from the peer.
    pub rcv_nxt: u32,
}

/// A process whose descriptors can be duplicated.
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// None when it is gone.
    pub fn open(pid: i32) -> Option<Self> {
        // SAFETY: pidfd_open takes two integers and returns a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        Some(Self { pid, pidfd: owned(fd)? })
    }

    /// Its sockets: (descriptor, inode).
    pub fn sockets(&self) -> Vec<(i32, u64)> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return Vec::new() };
        let socket = |entry: fs::DirEntry| {
            let target = fs::read_link(entry.path()).ok()?;
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, inode))
        };
        entries.flatten().filter_map(socket).collect()
    }

    /// A duplicate of its descriptor `fd`; None when it is gone.
    pub fn get(&self, fd: i32) -> Option<OwnedFd> {
        // SAFETY: pidfd_getfd takes an open pidfd and two integers and returns a descriptor or -1.
        owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0) })
    }
}

fn owned(fd: libc::c_long) -> Option<OwnedFd> {
    // SAFETY: a non-negative result of the two calls above is a descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The cookie of the calling thread's namespace; None before Linux 5.14.
pub fn netns_cookie() -> Result<Option<u64>> {
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").context("opening a socket in the namespace")?;
    Ok(cookie(&probe.into()))
}

fn cookie(socket: &OwnedFd) -> Option<u64> {
    let mut value = [0; 8];
    get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut value).ok()?;
    Some(u64::from_ne_bytes(value))
}

/// What is known of `socket` if it is an open TCP connection in the namespace with that cookie, and not to itself.
pub fn examine(socket: &OwnedFd, netns_cookie: Option<u64>) -> Option<Connection> {
    if number(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL).ok()? != libc::IPPROTO_TCP {
        return None;
    }
    if netns_cookie.is_some() && cookie(socket) != netns_cookie {
        return None;
    }
    // struct tcp_info begins with the state.
    let mut info = [0];
    get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).ok()?;
    if !OPEN.contains(&info[0]) {
        return None;
    }
    let own = address(&getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok()?)?;
    let peer = address(&getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?)?;
    if own.ip() == peer.ip() || peer.ip().to_canonical().is_loopback() {
        return None;
    }
    match rcv_nxt(socket) {
        Ok(rcv_nxt) => Some(Connection { own, peer, rcv_nxt }),
        Err(error) => {
            log::debug!("the sequence number of {own} - {peer}: {error}");
            None
        }
    }
}

/// Puts a TCP socket (not a listening one) into repair mode.
pub fn enter(socket: &OwnedFd) -> io::Result<()> {
    if number(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL)? != libc::IPPROTO_TCP {
        return Err(io::ErrorKind::Unsupported.into());
    }
    set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
}

/// Takes a TCP socket out of repair mode, if it is in it; false if it was not.
pub fn leave(socket: &OwnedFd) -> io::Result<bool> {
    let tcp = libc::IPPROTO_TCP;
    if number(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL)? != tcp
        || number(socket, tcp, libc::TCP_REPAIR)? != 1
    {
        return Ok(false);
    }
    // Leaving repair mode clears SO_REUSEADDR.
    let reuse = number(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    set(socket, tcp, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    set(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    Ok(true)
}

/// The next expected sequence number, read in repair mode.
fn rcv_nxt(socket: &OwnedFd) -> io::Result<u32> {
    let tcp = libc::IPPROTO_TCP;
    let in_repair = number(socket, tcp, libc::TCP_REPAIR)? == 1;
    if in_repair {
        let queue = number(socket, tcp, libc::TCP_REPAIR_QUEUE)?;
        set(socket, tcp, libc::TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)?;
        let sequence = number(socket, tcp, libc::TCP_QUEUE_SEQ);
        set(socket, tcp, libc::TCP_REPAIR_QUEUE, queue)?;
        return sequence.map(|s| s as u32);
    }
    // Leaving repair mode clears SO_REUSEADDR.
    let reuse = number(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    set(socket, tcp, libc::TCP_REPAIR, 1)?;
    let sequence = set(socket, tcp, libc::TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
        .and_then(|()| number(socket, tcp, libc::TCP_QUEUE_SEQ));
    set(socket, tcp, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    set(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    sequence.map(|s| s as u32)
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    let v6 = storage.as_sockaddr_in6()?;
    Some(SocketAddr::V6(SocketAddrV6::new(v6.ip(), v6.port(), 0, v6.scope_id())))
}

pub(super) fn number(socket: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    get(socket, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

pub(super) fn get(socket: &OwnedFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has that many.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(super) fn set(socket: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let bytes = value.to_ne_bytes();
    // SAFETY: the kernel reads four bytes from `bytes`, which has that many.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, bytes.as_ptr().cast(), 4) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
