//! Two namespaces with the same IP and MAC on one segment.

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};

use super::*;

const MAC: &str = "02:00:0a:63:00:02";

/// A UDP socket of a namespace.
fn udp(netns: &OwnedFd, address: &str) -> UdpSocket {
    let socket = netns::inside(netns.as_fd(), || Ok(UdpSocket::bind(address)?)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

/// Sees the frames on all links of the node.
struct Tap(OwnedFd);

impl Tap {
    fn new() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Self(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap())
    }

    /// Counts the frames from [`MAC`] since the last call, except for those on the source's own veth.
    fn count(&self) -> usize {
        let source: u32 = sh("ip -o link show tnet-a-h").split(':').next().unwrap().parse().unwrap();
        let mac: config::Mac = MAC.parse().unwrap();
        let mut frame = [0; 2048];
        let mut seen = 0;
        while let Ok((len, from)) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut frame) {
            let on = from.map_or(0, |f| f.ifindex() as u32);
            if len >= 14 && frame[6..12] == mac.0 && on != source {
                println!("frame on link {on}: {:02x?}", &frame[..len.min(80)]);
                seen += 1;
            }
        }
        seen
    }
}

/// The port behind which the bridge believes [`MAC`] to be.
fn learned() -> String {
    let fdb = sh("bridge fdb show br br0");
    let line = fdb.lines().find(|l| l.starts_with(MAC) && !l.contains("permanent")).unwrap_or_default();
    line.split_whitespace().nth(2).unwrap_or_default().to_string()
}

#[test]
fn the_second_one_is_silent_until_the_release() {
    on_node(|| {
        let source = container("tnet-a", MAC);
        let peer = container("tnet-p", "02:00:0a:63:00:09");
        sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0; ip -n tnet-a addr add fd99::2/64 dev eth0
            ip -n tnet-p addr add 10.99.0.9/24 dev eth0; ip -n tnet-p addr add fd99::9/64 dev eth0");
        settle("tnet-a");
        settle("tnet-p");
        let config = capture(source.as_fd()).unwrap();
        let (from4, from6) = (udp(&peer, "10.99.0.9:0"), udp(&peer, "[fd99::9]:0"));
        let say = |text: &[u8]| {
            let _ = from4.send_to(text, "10.99.0.2:7000");
            let _ = from6.send_to(text, "[fd99::2]:7000");
        };
        // what was said before may come late, when a neighbour is found at last
        let hears = |socket: &UdpSocket, text: &[u8]| {
            let mut got = [0; 64];
            std::iter::from_fn(|| socket.recv(&mut got).ok().map(|len| &got[..len] == text)).any(|it| it)
        };
        let (old4, old6) = (udp(&source, "10.99.0.2:7000"), udp(&source, "[fd99::2]:7000"));
        say(b"one");
        assert!(hears(&old4, b"one") && hears(&old6, b"one"));
        assert_eq!(learned(), "tnet-a-h");

        // Built: nothing of it on any link of the node, while the source goes on.
        let tap = Tap::new();
        sh("ip -n tnet-p neigh flush all");
        std::thread::sleep(Duration::from_millis(100));
        tap.count();
        sh("ip link set tnet-a-h nomaster"); // so that each frame from MAC is the second one's
        build(&config, &path("tnet-b"), &attach()).unwrap();
        let made = open(&path("tnet-b")).unwrap();
        let (new4, new6) = (udp(&made, "10.99.0.2:7000"), udp(&made, "[fd99::2]:7000"));
        new4.send_to(b"leak", "10.99.0.9:7000").expect_err("dropped");
        let _ = new6.send_to(b"leak", "[fd99::9]:7000");
        say(b"lost"); // the peer asks by ARP and neighbour solicitation
        assert!(!hears(&new4, b"lost") && !hears(&new6, b"lost"));
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(tap.count(), 0, "frames from the fenced namespace");
        let neighbours = sh("ip -n tnet-p neigh show to 10.99.0.2");
        assert!(!neighbours.contains("lladdr"), "answered: {neighbours}");
        let end = sh("ip -o -s link show type veth | grep ' ts'");
        let received = end.split("RX:").nth(1).and_then(|r| r.split('\\').nth(1)).unwrap_or_default();
        assert!(received.split_whitespace().all(|n| n == "0"), "not even on its own veth: {end}");

        // The source runs on beside it.
        sh("ip link set tnet-a-h master br0; ip -n tnet-p neigh flush all");
        say(b"two");
        assert!(hears(&old4, b"two") && hears(&old6, b"two"));
        assert_eq!(learned(), "tnet-a-h");

        // The source fenced: no answer from anyone, not to ARP either.
        fence(source.as_fd()).unwrap();
        sh("ip -n tnet-p neigh flush all");
        std::thread::sleep(Duration::from_millis(100));
        tap.count();
        say(b"nobody");
        assert!(!hears(&old4, b"nobody") && !hears(&old6, b"nobody"));
        assert_eq!(tap.count(), 0, "frames from the fenced source");
        // Its abort: lifted, and it goes on.
        unfence(source.as_fd()).unwrap();
        sh("ip -n tnet-p neigh flush all");
        say(b"three");
        assert!(hears(&old4, b"three") && hears(&old6, b"three"));

        // The move.
        fence(source.as_fd()).unwrap();
        timed("release", || unfence(made.as_fd())).unwrap();
        timed("announce", || announce(made.as_fd(), &config)).unwrap();
        assert!(learned().starts_with("ts"), "{}", learned());
        timed("first packet", || {
            say(b"four");
            assert!(hears(&new4, b"four") && hears(&new6, b"four"));
        });
        new4.send_to(b"back", from4.local_addr().unwrap()).unwrap();
        assert!(hears(&from4, b"back"));
        new6.send_to(b"back", from6.local_addr().unwrap()).unwrap();
        assert!(hears(&from6, b"back"));
        destroy(&path("tnet-a")).unwrap();
        say(b"five");
        assert!(hears(&new4, b"five") && hears(&new6, b"five"));
        if has("nft") {
            assert_eq!(sh("ip netns exec tnet-b nft list ruleset"), "");
        }
    });
}

#[test]
fn neighbours_learn_a_new_hardware_address() {
    // The announcement alone, where the MAC changes: caches follow at once.
    on_node(|| {
        let moved = container("tnet-a", MAC);
        container("tnet-p", "02:00:0a:63:00:09");
        sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0; ip -n tnet-a addr add fd99::2/64 dev eth0 nodad
            ip -n tnet-p addr add 10.99.0.9/24 dev eth0; ip -n tnet-p addr add fd99::9/64 dev eth0 nodad
            for a in 10.99.0.2 fd99::2; do ip -n tnet-p neigh add $a lladdr 02:00:00:00:00:ee dev eth0 nud stale; done");
        announce(moved.as_fd(), &capture(moved.as_fd()).unwrap()).unwrap();
        for address in ["10.99.0.2", "fd99::2"] {
            let neighbour = sh(&format!("ip -n tnet-p neigh show to {address}"));
            assert!(neighbour.contains(MAC), "{neighbour}");
        }
    });
}
