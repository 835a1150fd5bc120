//! TCP sockets that end without a word: before the frozen copy of a container that has moved is killed, its sockets go into repair
//! mode, in which a close sends neither FIN nor RST (tcp_close and tcp_disconnect in the kernel's tcp.c; CRIU kills its dumped tasks in
//! the same way). Otherwise the kernel would go on to send FINs of the dead process' connections for minutes, and the first one that
//! got past the fence would close the connection that now lives on the other node.
//!
//! And the other way: a CRIU that was killed in the middle of its dump leaves the sockets in repair mode, in which the tasks that run on
//! could say nothing any more.

use std::collections::BTreeSet;

use super::repair::{self, Process};

/// Puts all TCP sockets of these processes into repair mode, for good. They must be frozen, and never run again. Returns how many.
pub fn silence(pids: impl IntoIterator<Item = i32>) -> usize {
    let mut seen = BTreeSet::new();
    for process in pids.into_iter().filter_map(Process::open) {
        for (fd, inode) in process.sockets() {
            if !seen.contains(&inode)
                && let Some(socket) = process.get(fd)
                && repair::enter(&socket).is_ok()
            {
                seen.insert(inode);
            }
        }
    }
    seen.len()
}

/// Takes all TCP sockets of these processes out of repair mode, as CRIU does when a dump fails. Returns how many were in it.
pub fn unsilence(pids: impl IntoIterator<Item = i32>) -> usize {
    let mut mended = 0;
    for process in pids.into_iter().filter_map(Process::open) {
        for (fd, _) in process.sockets() {
            mended +=
                usize::from(process.get(fd).is_some_and(|socket| repair::leave(&socket).unwrap_or(false)));
        }
    }
    mended
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    #[test]
    fn a_silenced_socket_ends_unnoticed_by_its_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (peer, _) = listener.accept().unwrap();
            peer.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            (OwnedFd::from(ours), peer)
        };
        let (ours, mut peer) = connect();
        match repair::enter(&ours) {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                return eprintln!("SKIP: needs CAP_NET_ADMIN");
            }
            entered => entered.unwrap(),
        }
        drop(ours);
        let read = peer.read(&mut [0; 1]);
        assert!(matches!(&read, Err(e) if e.kind() == ErrorKind::WouldBlock), "{read:?}");
        // without it the peer hears of the end at once
        let (ours, mut peer) = connect();
        drop(ours);
        assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_socket_that_was_left_silent_speaks_again() {
        use std::io::Write;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let twin = OwnedFd::from(ours.try_clone().unwrap());
        if repair::enter(&twin).is_err_and(|e| e.kind() == ErrorKind::PermissionDenied) {
            return eprintln!("SKIP: needs CAP_NET_ADMIN");
        }
        assert!(repair::leave(&twin).unwrap());
        assert!(!repair::leave(&twin).unwrap(), "it is out of it");
        ours.write_all(b"x").unwrap();
        assert_eq!(peer.read(&mut [0; 1]).unwrap(), 1);
    }

    #[test]
    fn only_tcp_sockets_are_touched() {
        let udp = OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        assert!(repair::enter(&udp).is_err());
    }
}
