//! Packets that reach a fenced namespace are not lost: a tap in front of the fence keeps them, and they are delivered where the
//! container runs on. Without that a client whose request comes in the freeze sends it again after 200 ms at the earliest
//! (`TCP_RTO_MIN`), however short the freeze was, and a datagram is gone.
//!
//! A packet socket sees what comes in ahead of netfilter's hooks (`__netif_receive_skb_core` in the kernel's net/core/dev.c).
//! How packets travel between nodes is `migrate`'s business.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, bind, recvmsg, sendto, socket,
};

use super::announce::{frame_address, link_address};
use super::netns;
use super::port::{self, Names};
use super::repair::set;
use super::socket::Netlink;

/// The most that is kept, bytes of the kernel's accounting: some thousand small packets. What comes then is lost, as on a busy wire.
const ROOM: i32 = 4 << 20;
/// The longest frame: a coalesced packet of 64 KiB and its headers.
pub const MAX_FRAME: usize = (64 << 10) + 256;

/// linux/virtio_net.h: the checksum is still to be computed.
const NEEDS_CSUM: u8 = 1;
/// linux/virtio_net.h: VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6; the bit that says ECN is added to them.
const GSO_TCP: [u8; 2] = [1, 4];
const GSO_ECN: u8 = 0x80;
/// Bytes of `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// What the sender left to the hardware: `struct virtio_net_hdr`, which keeps its meaning from one node to the other. Between two
/// containers of one machine neither checksums nor segments are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// 1: the checksum at `csum_start` + `csum_offset` is not computed yet.
    pub flags: u8,
    /// 0: one packet. Otherwise it is to be cut into segments of `gso_size` bytes.
    pub gso_type: u8,
    /// Bytes of all headers.
    pub hdr_len: u16,
    /// Bytes of a segment.
    pub gso_size: u16,
    /// Where the checksum's range begins.
    pub csum_start: u16,
    /// Where in that range the checksum is.
    pub csum_offset: u16,
}

impl Offload {
    /// As the kernel has it.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        (out[0], out[1]) = (self.flags, self.gso_type);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (n, word) in words.into_iter().enumerate() {
            out[2 + 2 * n..4 + 2 * n].copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    pub(super) fn from_bytes(raw: &[u8]) -> Offload {
        let word = |n: usize| u16::from_ne_bytes([raw[2 + 2 * n], raw[3 + 2 * n]]);
        // "the checksum was valid" (2) is for whoever receives
        Offload {
            flags: raw[0] & NEEDS_CSUM,
            gso_type: raw[1],
            hdr_len: word(0),
            gso_size: word(1),
            csum_start: word(2),
            csum_offset: word(3),
        }
    }

    /// Whether it means something for a frame of that length. It may come from a node that is not trusted.
    fn fits(&self, len: usize) -> bool {
        let checksum =
            self.flags == 0 || usize::from(self.csum_start) + usize::from(self.csum_offset) + 2 <= len;
        let cut = match self.gso_type & !GSO_ECN {
            0 => self.gso_type == 0,
            kind => GSO_TCP.contains(&kind) && self.gso_size > 0 && self.flags == NEEDS_CSUM,
        };
        self.flags & !NEEDS_CSUM == 0 && checksum && cut && usize::from(self.hdr_len) <= len
    }
}

/// A packet for the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The link that it came to, by its name in the namespace.
    pub link: String,
    /// What the sender left to do.
    pub offload: Offload,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
}

impl Packet {
    /// IPv4 or IPv6, of a length that a packet can have, with an offload that fits.
    pub fn is_sane(&self) -> bool {
        let kind = self.frame.get(12..ETHERNET).map(|t| u16::from_be_bytes([t[0], t[1]]));
        (ETHERNET + 1..=MAX_FRAME).contains(&self.frame.len())
            && kind.is_some_and(is_ip)
            && self.offload.fits(self.frame.len())
    }

    /// Whether it is TCP, whose receivers know what they had before. (Behind extension headers of IPv6 it is not looked for.)
    fn is_tcp(&self) -> bool {
        let Some((ethernet, ip)) = self.frame.split_at_checked(ETHERNET) else { return false };
        let protocol = if ethernet[12..] == (libc::ETH_P_IPV6 as u16).to_be_bytes() { 6 } else { 9 };
        ip.get(protocol) == Some(&(libc::IPPROTO_TCP as u8))
    }
}

fn is_ip(kind: u16) -> bool {
    [libc::ETH_P_IP as u16, libc::ETH_P_IPV6 as u16].contains(&kind)
}

/// Keeps what comes to a namespace.
#[derive(Debug)]
pub struct Backlog {
    socket: OwnedFd,
    names: Names,
    /// Came while the fence went up.
    early: Vec<Packet>,
}

impl Backlog {
    /// Makes the tap; it keeps nothing before [`Backlog::behind`].
    pub fn prepare(netns: BorrowedFd<'_>) -> Result<Backlog> {
        let (socket, names) = netns::inside(netns, || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            // without a protocol it receives nothing
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
                .context("opening a packet socket")?;
            Ok((socket, port::names(&mut Netlink::route()?)?))
        })?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1).context("PACKET_VNET_HDR")?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1).context("PACKET_IGNORE_OUTGOING")?;
        if set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM).is_err() {
            // as much as the machine allows everybody
            set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, ROOM).context("SO_RCVBUF")?;
        }
        Ok(Backlog { socket, names, early: Vec::new() })
    }

    /// Has the `fence` put up, and keeps what comes from there on. Where that cannot be had (it is logged) the fence is put up all the same.
    ///
    /// The tap is there first: a fence drops packets before whoever put it up knows that it stands. Of what came until then nobody knows
    /// whether it was let in. TCP throws away what it has already, and sends again after 200 ms what it believes lost: that is kept.
    /// A datagram must not come twice, and may be lost: the rest is not.
    ///
    /// # Errors
    /// The fence's.
    pub fn behind(&mut self, fence: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Err(e) = self.tap() {
            log::warn!("packets that come in the freeze will be lost: {e:#}");
        }
        fence()?;
        self.early = self.take();
        self.early.retain(Packet::is_tcp);
        Ok(())
    }

    fn tap(&self) -> Result<()> {
        let all = link_address(0, (libc::ETH_P_ALL as u16).to_be(), [0; 6]);
        bind(self.socket.as_raw_fd(), &all).context("tapping the container's network")
    }

    /// What has come since the last call; never waits.
    pub fn take(&mut self) -> Vec<Packet> {
        let mut packets = std::mem::take(&mut self.early);
        let mut buffer = vec![0; HEADER + MAX_FRAME];
        loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT) {
                Ok(got) => {
                    let (len, whole) = (got.bytes, !got.flags.contains(MsgFlags::MSG_TRUNC));
                    let from = got.address;
                    packets.extend(from.filter(|_| whole).and_then(|a| self.packet(&a, &buffer[..len])));
                }
                // segments of a kind that the header cannot say (EINVAL): this packet is lost
                Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EINTR) => {}
                Err(_) => return packets,
            }
        }
    }

    fn packet(&self, from: &LinkAddr, bytes: &[u8]) -> Option<Packet> {
        let ours = from.pkttype() == libc::PACKET_HOST && from.hatype() == libc::ARPHRD_ETHER;
        let link = self.names.get(&(from.ifindex() as u32)).filter(|_| ours)?;
        let (header, frame) = bytes.split_at_checked(HEADER)?;
        let packet =
            Packet { link: link.clone(), offload: Offload::from_bytes(header), frame: frame.to_vec() };
        packet.is_sane().then_some(packet)
    }
}

/// Lets packets come into `netns` through the node's ends of its links, as if they came now. Returns how many; of a link that has no
/// such end here they are lost.
///
/// Call it from the namespace in which the node's ends are, when the fence is lifted.
pub fn deliver(netns: BorrowedFd<'_>, packets: &[Packet]) -> Result<usize> {
    if packets.is_empty() {
        return Ok(0);
    }
    let mut inside = netns::inside(netns, Netlink::route)?;
    let ends = port::ends(&mut inside)?;
    let out = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("opening a packet socket")?;
    set(&out, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1).context("PACKET_VNET_HDR")?;
    let mut delivered = 0;
    for packet in packets.iter().filter(|p| p.is_sane()) {
        let Some((_, end)) = ends.iter().find(|(link, _)| link.name == packet.link) else { continue };
        let frame = &packet.frame;
        let address = frame_address(end.index, frame);
        let bytes = [&packet.offload.to_bytes(), &frame[..]].concat();
        match sendto(out.as_raw_fd(), &bytes, &address, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => delivered += 1,
            Err(e) => log::debug!("a packet of {} bytes to {}: {e}", frame.len(), packet.link),
        }
    }
    Ok(delivered)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> Packet {
        let mut frame = vec![0; 60];
        frame[12] = 8;
        Packet { link: "eth0".into(), offload: Offload::default(), frame }
    }

    #[test]
    fn what_a_kernel_might_stumble_over_is_not_delivered() {
        let with = |change: &dyn Fn(&mut Packet)| {
            let mut packet = packet();
            change(&mut packet);
            packet.is_sane()
        };
        assert!(packet().is_sane());
        let segments =
            Offload { flags: 1, gso_type: 1, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
        assert!(with(&|p| p.offload = segments));
        assert!(with(&|p| p.offload = Offload { gso_type: 0x84, ..segments }));
        for bad in [
            Offload { flags: 2, ..segments },
            Offload { flags: 0, ..segments },
            Offload { gso_type: 3, ..segments },
            Offload { gso_type: 0x80, ..segments },
            Offload { gso_size: 0, ..segments },
            Offload { hdr_len: 61, ..segments },
            Offload { csum_start: 50, csum_offset: 9, ..segments },
        ] {
            assert!(!with(&|p| p.offload = bad), "{bad:?}");
        }
        assert!(!with(&|p| p.frame[13] = 6), "ARP");
        assert!(!with(&|p| p.frame.truncate(14)));
        assert!(!with(&|p| p.frame.clear()));
        assert!(!with(&|p| p.frame.resize(MAX_FRAME + 1, 0)));
    }

    #[test]
    fn tcp_is_told_from_the_rest() {
        let of = |kind: u16, at: usize, protocol: i32| {
            let mut packet = packet();
            packet.frame[12..ETHERNET].copy_from_slice(&kind.to_be_bytes());
            packet.frame[ETHERNET + at] = protocol as u8;
            packet.is_tcp()
        };
        let (v4, v6) = (libc::ETH_P_IP as u16, libc::ETH_P_IPV6 as u16);
        assert!(of(v4, 9, libc::IPPROTO_TCP) && of(v6, 6, libc::IPPROTO_TCP));
        assert!(!of(v4, 9, libc::IPPROTO_UDP) && !of(v6, 6, libc::IPPROTO_UDP));
        assert!(!of(v4, 6, libc::IPPROTO_TCP) && !of(v6, 9, libc::IPPROTO_TCP));
        assert!(!Packet { frame: vec![8; ETHERNET], ..packet() }.is_tcp());
    }

    #[test]
    fn the_header_is_the_kernels() {
        let offload =
            Offload { flags: 1, gso_type: 1, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
        assert_eq!(Offload::from_bytes(&offload.to_bytes()), offload);
        let mut raw = offload.to_bytes();
        raw[0] = 3;
        assert_eq!(Offload::from_bytes(&raw), offload);
        assert_eq!(&raw[2..4], 54u16.to_ne_bytes());
    }
}
