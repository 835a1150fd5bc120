//! What comes to a fenced namespace comes once, and only what was meant for it.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::*;

/// The container (10.99.0.2) and somebody beside it (10.99.0.9).
fn neighbours() -> (OwnedFd, OwnedFd) {
    let both = (container("tnet-a", "02:00:0a:63:00:02"), container("tnet-p", "02:00:0a:63:00:09"));
    sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0; ip -n tnet-p addr add 10.99.0.9/24 dev eth0");
    both
}

#[test]
fn datagrams_into_the_fence_come_once_and_in_order() {
    on_node(|| {
        let (own, peer) = neighbours();
        let server =
            netns::inside(own.as_fd(), || Ok(UdpSocket::bind(("10.99.0.2", 7001)).unwrap())).unwrap();
        let client = netns::inside(peer.as_fd(), || Ok(UdpSocket::bind(("10.99.0.9", 0)).unwrap())).unwrap();
        client.connect("10.99.0.2:7001").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut word = [0; 64];
        let mut next = || server.recv(&mut word).map(|n| String::from_utf8_lossy(&word[..n]).into_owned());
        let mut backlog = Backlog::prepare(own.as_fd()).unwrap();
        client.send(b"before").unwrap();
        assert_eq!(next().unwrap(), "before");
        let fence_late = || {
            client.send(b"let in").unwrap();
            fence(own.as_fd())
        };
        backlog.behind(fence_late).unwrap();
        assert_eq!(next().unwrap(), "let in");
        // IP fragments, and enough of them that the room is used
        let long = "x".repeat(3000);
        for n in 0..150 {
            client.send(format!("{n}").as_bytes()).unwrap();
        }
        client.send(long.as_bytes()).unwrap();
        sh("ip netns exec tnet-p ping -c1 -W1 -b 10.99.0.255 > /dev/null 2>&1 || true"); // for nobody in particular
        let packets = backlog.take();
        assert_eq!(packets.len(), 153, "150, and one in three fragments");
        assert!(packets.iter().all(|p| p.link == "eth0"));
        unfence(own.as_fd()).unwrap();
        client.send(b"after").unwrap();
        assert_eq!(next().unwrap(), "after", "what was fenced off has not come by itself");
        assert_eq!(timed("deliver 153", || deliver(own.as_fd(), &packets)).unwrap(), 153);
        for n in 0..150 {
            assert_eq!(next().unwrap(), n.to_string());
        }
        let mut all = vec![0; 4000];
        assert_eq!(server.recv(&mut all).unwrap(), 3000);
        server.set_nonblocking(true).unwrap();
        assert!(server.recv(&mut all).is_err(), "nothing comes twice");
        let other = Packet { link: "eth1".into(), ..packets[0].clone() };
        assert_eq!(deliver(own.as_fd(), &[other]).unwrap(), 0, "a link that is not there");
    });
}

#[test]
fn what_the_hardware_was_to_do_is_still_done() {
    use std::io::{Read, Write};
    on_node(|| {
        let (own, peer) = neighbours();
        let listener = netns::inside(own.as_fd(), || Ok(TcpListener::bind("10.99.0.2:7002")?)).unwrap();
        // a busy kernel may cut the packet itself (seen once): a new connection then
        let left_to_the_card = (0..5).any(|_| {
            let connect = || Ok(TcpStream::connect("10.99.0.2:7002")?);
            let mut client = netns::inside(peer.as_fd(), connect).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let mut backlog = Backlog::prepare(own.as_fd()).unwrap();
            backlog.behind(|| fence(own.as_fd())).unwrap();
            // more than a segment and less than the first window: one packet for the network card to cut, without a checksum
            let sent: Vec<u8> = (0..8000u32).map(|n| (n % 251) as u8).collect();
            client.write_all(&sent).unwrap();
            let packets = backlog.take();
            unfence(own.as_fd()).unwrap();
            deliver(own.as_fd(), &packets).unwrap();
            server.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
            let mut got = vec![0; sent.len()];
            server.read_exact(&mut got).expect("it comes before the client's timer sends it again");
            assert_eq!(got, sent);
            packets.iter().any(|p| p.offload.gso_type != 0 && p.offload.flags == 1)
        });
        assert!(left_to_the_card, "no packet of five connections was to be cut");
    });
}

#[test]
fn a_request_that_comes_while_the_fence_goes_up_is_not_lost() {
    use std::io::{Read, Write};
    on_node(|| {
        let (own, peer) = neighbours();
        let listener = netns::inside(own.as_fd(), || Ok(TcpListener::bind("10.99.0.2:7003")?)).unwrap();
        let connect = || Ok(TcpStream::connect("10.99.0.2:7003")?);
        // one request of each after the other, while a fence goes up slowly: no later one of its connection tells that it is missing
        let mut pairs: Vec<_> = (0..100)
            .map(|_| {
                let client = netns::inside(peer.as_fd(), connect).unwrap();
                let (server, _) = listener.accept().unwrap();
                server.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
                (client, server)
            })
            .collect();
        let (mut word, mut kept) = ([0; 4], 0);
        for round in 0..5u32 {
            let mut backlog = Backlog::prepare(own.as_fd()).unwrap();
            let fence_and_dawdle =
                || fence(own.as_fd()).inspect(|()| std::thread::sleep(Duration::from_millis(1)));
            std::thread::scope(|threads| {
                threads.spawn(|| pairs.iter_mut().for_each(|p| p.0.write_all(&round.to_le_bytes()).unwrap()));
                backlog.behind(fence_and_dawdle).unwrap();
            });
            let packets = backlog.take();
            kept += packets.len();
            unfence(own.as_fd()).unwrap();
            deliver(own.as_fd(), &packets).unwrap();
            for (n, (client, server)) in pairs.iter_mut().enumerate() {
                let read = server.read_exact(&mut word);
                read.unwrap_or_else(|e| panic!("round {round}, request {n}: {e}"));
                assert_eq!(u32::from_le_bytes(word), round);
                server.write_all(&word).unwrap();
                client.read_exact(&mut word).unwrap();
            }
        }
        assert!(kept > 0, "none came in time for the test");
    });
}
