//! An established connection moved by hand, with the kernel's TCP repair mode, between two namespaces.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use super::super::repair::{get, number, set};
use super::*;

const TCP: i32 = libc::IPPROTO_TCP;
const RECV: i32 = 1;
const SEND: i32 = 2;

/// A connection with empty queues, as CRIU has it in its image.
struct Image {
    own: SocketAddr,
    peer: SocketAddr,
    sequences: [i32; 2],
    window: [u8; 20],
    options: Vec<[u32; 2]>,
    timestamp: i32,
}

/// Reads the connection and leaves it in repair mode: closing it sends nothing.
fn dump(stream: &TcpStream) -> Image {
    let fd: OwnedFd = stream.as_fd().try_clone_to_owned().unwrap();
    set(&fd, TCP, libc::TCP_REPAIR, 1).unwrap();
    let sequence = |queue| {
        set(&fd, TCP, libc::TCP_REPAIR_QUEUE, queue).unwrap();
        number(&fd, TCP, libc::TCP_QUEUE_SEQ).unwrap()
    };
    let sequences = [sequence(RECV), sequence(SEND)];
    let mut window = [0; 20];
    get(&fd, TCP, libc::TCP_REPAIR_WINDOW, &mut window).unwrap();
    let mut info = [0; 8];
    get(&fd, TCP, libc::TCP_INFO, &mut info).unwrap();
    // TCPOPT_MSS, _WINDOW, _SACK_PERM, _TIMESTAMP; tcpi_options in byte 5, the scales in byte 6.
    let mut options = vec![[2, number(&fd, TCP, libc::TCP_MAXSEG).unwrap() as u32]];
    options.push([3, u32::from(info[6] & 15) | u32::from(info[6] >> 4) << 16]);
    if info[5] & 2 != 0 {
        options.push([4, 0]);
    }
    if info[5] & 1 != 0 {
        options.push([8, 0]);
    }
    let timestamp = number(&fd, TCP, libc::TCP_TIMESTAMP).unwrap();
    let (own, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    Image { own, peer, sequences, window, options, timestamp }
}

/// Makes the connection in `netns`, still in repair mode.
fn restore(image: &Image, netns: &OwnedFd) -> OwnedFd {
    let family = if image.own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd =
        netns::inside(netns.as_fd(), || Ok(socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?))
            .unwrap();
    set(&fd, TCP, libc::TCP_REPAIR, 1).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(image.own)).unwrap();
    for (queue, sequence) in [RECV, SEND].into_iter().zip(image.sequences) {
        set(&fd, TCP, libc::TCP_REPAIR_QUEUE, queue).unwrap();
        set(&fd, TCP, libc::TCP_QUEUE_SEQ, sequence).unwrap();
    }
    connect(fd.as_raw_fd(), &SockaddrStorage::from(image.peer)).expect("a repaired connection needs a route");
    set_bytes(
        &fd,
        libc::TCP_REPAIR_OPTIONS,
        &image.options.concat().iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<_>>(),
    );
    set(&fd, TCP, libc::TCP_TIMESTAMP, image.timestamp).unwrap();
    set_bytes(&fd, libc::TCP_REPAIR_WINDOW, &image.window);
    fd
}

fn set_bytes(fd: &OwnedFd, name: i32, value: &[u8]) {
    // SAFETY: the kernel reads as many bytes as `value` has.
    let done =
        unsafe { libc::setsockopt(fd.as_raw_fd(), TCP, name, value.as_ptr().cast(), value.len() as u32) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// What helps the peer's words along.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Help {
    Nothing,
    Kick,
    Backlog,
}

/// Moves a connection on which the client speaks during the outage; how long after the release its words arrived.
fn move_connection(own: &str, help: Help) -> Duration {
    let source = container("tnet-a", "02:00:0a:63:00:02");
    let peer = container("tnet-p", "02:00:0a:63:00:09");
    sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0; ip -n tnet-a addr add fd99::2/64 dev eth0
        ip -n tnet-p addr add 10.99.0.9/24 dev eth0; ip -n tnet-p addr add fd99::9/64 dev eth0");
    settle("tnet-a");
    settle("tnet-p");
    let listener = netns::inside(source.as_fd(), || Ok(TcpListener::bind(own)?)).unwrap();
    let mut client = netns::inside(peer.as_fd(), || Ok(TcpStream::connect(own)?)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut word = [0; 4];
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut word).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut word).unwrap();
    std::thread::sleep(Duration::from_millis(50)); // acknowledged

    let config = capture(source.as_fd()).unwrap();
    build(&config, &path("tnet-b"), &attach()).unwrap();
    let made = open(&path("tnet-b")).unwrap();
    let mut backlog = Backlog::prepare(source.as_fd()).unwrap();
    backlog.behind(|| fence(source.as_fd())).unwrap();
    client.write_all(b"late").unwrap();
    let image = dump(&server);
    drop((server, listener));
    let restored = restore(&image, &made);
    std::thread::sleep(Duration::from_millis(1000)); // the next retransmission would be after some 1.7 s
    let kick = timed("collect", || Kick::collect(made.as_fd(), &[std::process::id() as i32])).unwrap();
    assert_eq!(kick.len(), 1);

    let start = Instant::now();
    timed("release", || unfence(made.as_fd())).unwrap();
    timed("announce", || announce(made.as_fd(), &config)).unwrap();
    match help {
        Help::Nothing => {}
        Help::Kick => timed("kick", || kick.send(made.as_fd())).unwrap(),
        Help::Backlog => {
            let packets = backlog.take();
            // the segment itself and its retransmissions
            assert!(packets.len() > 1, "{packets:?}");
            let delivered = timed("deliver", || deliver(made.as_fd(), &packets)).unwrap();
            assert_eq!(delivered, packets.len());
        }
    }
    set(&restored, TCP, libc::TCP_REPAIR, 0).unwrap();
    let mut server = TcpStream::from(restored);
    server.read_exact(&mut word).unwrap();
    let took = start.elapsed();
    assert_eq!(&word, b"late");
    destroy(&path("tnet-a")).unwrap();
    server.write_all(b"done").unwrap();
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"done");
    assert!(client.take_error().unwrap().is_none());
    took
}

#[test]
fn a_connection_moves_and_the_peer_is_heard_at_once() {
    for own in ["10.99.0.2:7000", "[fd99::2]:7000"] {
        for help in [Help::Kick, Help::Backlog, Help::Nothing] {
            on_node(|| {
                let took = move_connection(own, help);
                println!("{own}: the peer's data came {took:?} after the release ({help:?})");
                assert!(help == Help::Nothing || took < Duration::from_millis(200), "{took:?}");
            });
        }
    }
}
