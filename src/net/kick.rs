//! Peers whose retransmission timers have backed off during the move are made to send at once.
//!
//! A peer that sent into the frozen connection waits 200, 400, 800 ms and so on between its attempts; after the move up
//! to half of the outage would be added. Neither a duplicate ACK nor a window probe makes it send (in the Loss state its
//! congestion window is full with the one lost segment). What does, in Linux and whoever follows RFC 6069 (TCP-LCD), is
//! an ICMP "host unreachable" (IPv6: "no route") about its oldest unacknowledged segment: it takes back one doubling of
//! the timer, and sends if the shorter time is over. That is how TCP learns that it was connectivity that was lost and not
//! segments to congestion, which is exactly what happened. To the application it is a soft error that the
//! next ACK clears (only a program that set IP_RECVERR on its TCP socket would see it).
//!
//! The oldest unacknowledged segment of the peer begins at our `rcv_nxt`, which the kernel only tells about a socket in
//! repair mode: so [`Kick::collect`] is for tasks that do not run, and [`Kick::send`] for when the fence is lifted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, sendto, socket,
};

use super::repair::{self, Connection, Process};
use super::{netns, packets};

/// Doublings of the peer's timer to take back at once: the first burst covers an outage of about 13 s.
const BURST: usize = 6;
/// A peer sends only when its shorter timer is over, so it is asked again a little later.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(25), Duration::from_millis(75), Duration::from_millis(150)];

/// Connections that are to be kicked.
#[derive(Debug, Default, Clone)]
pub struct Kick {
    connections: Vec<Connection>,
}

impl Kick {
    /// Finds the established TCP connections of the processes `pids` whose sockets are in `netns`.
    ///
    /// The tasks must not run (frozen, or held after the restore). Sockets are put into repair mode for a moment, unless CRIU
    /// has them in it, and come out as they were.
    pub fn collect(netns: BorrowedFd<'_>, pids: &[i32]) -> Result<Self> {
        let cookie = netns::inside(netns, repair::netns_cookie)?;
        let mut seen = BTreeSet::new();
        let mut kick = Self::default();
        for pid in pids {
            let Some(process) = Process::open(*pid) else { continue };
            for (fd, inode) in process.sockets() {
                if !seen.insert(inode) {
                    continue;
                }
                if let Some(socket) = process.get(fd)
                    && let Some(found) = repair::examine(&socket, cookie)
                {
                    kick.connections.push(found);
                }
            }
        }
        Ok(kick)
    }

    /// Number of connections found.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Kicks all of them from `netns`, which is no longer fenced: once before it returns, then again a few times from a
    /// thread of its own. A kick that comes when the peer has nothing to send, or has sent already, does nothing.
    pub fn send(self, netns: BorrowedFd<'_>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let own: BTreeSet<SocketAddr> = self.connections.iter().map(|c| plain(c.own)).collect();
        let sockets = netns::inside(netns, || {
            own.into_iter().map(|address| Ok((address, raw(address)?))).collect::<Result<BTreeMap<_, _>>>()
        })?;
        let round = move |times: usize| {
            for connection in &self.connections {
                kick(connection, &sockets, times);
            }
        };
        round(BURST);
        let repeat = move || {
            for pause in AGAIN {
                std::thread::sleep(pause);
                round(1);
            }
        };
        std::thread::Builder::new().name("kick".into()).spawn(repeat).context("starting a thread to kick")?;
        Ok(())
    }
}

fn kick(connection: &Connection, sockets: &BTreeMap<SocketAddr, OwnedFd>, times: usize) {
    let (own, peer) = (plain(connection.own), plain(connection.peer));
    let quoted = ((peer.ip(), connection.peer.port()), (own.ip(), connection.own.port()));
    let packet = packets::unreachable(quoted.0, quoted.1, connection.rcv_nxt);
    let (Some(packet), Some(socket)) = (packet, sockets.get(&own)) else { return };
    for _ in 0..times {
        let sent = sendto(socket.as_raw_fd(), &packet, &SockaddrStorage::from(peer), MsgFlags::MSG_DONTWAIT);
        if let Err(error) = sent {
            log::debug!("kicking {}: {error}", connection.peer);
            return;
        }
    }
}

/// A raw ICMP socket of the calling thread's namespace, bound to `own`.
fn raw(own: SocketAddr) -> Result<OwnedFd> {
    let (family, protocol) = match own {
        SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let raw =
        socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).context("opening a raw socket")?;
    bind(raw.as_raw_fd(), &SockaddrStorage::from(own))
        .with_context(|| format!("binding a raw socket to {own}"))?;
    Ok(raw)
}

/// What is on the wire: IPv4 where an IPv6 socket has a mapped address. Without the port, which raw sockets do not have.
fn plain(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(mut v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(IpAddr::V4(v4), 0),
            None => {
                v6.set_port(0);
                v6.set_flowinfo(0);
                SocketAddr::V6(v6)
            }
        },
        SocketAddr::V4(v4) => SocketAddr::new(IpAddr::V4(*v4.ip()), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_ipv4_on_the_wire() {
        let text = |a: &str| plain(a.parse().unwrap()).to_string();
        assert_eq!(text("[::ffff:10.0.0.1]:80"), "10.0.0.1:0");
        assert_eq!(text("[fd00::1]:80"), "[fd00::1]:0");
        assert_eq!(text("10.0.0.1:80"), "10.0.0.1:0");
    }
}
