//! Frames over a socket pair and over TLS on loopback, both ways.

use super::*;
use crate::migrate::protocol::{Commit, Running};

fn pair(silence: Duration) -> (Wire, Wire) {
    let (a, b) = UnixStream::pair().unwrap();
    for s in [&a, &b] {
        s.set_read_timeout(Some(silence)).unwrap();
    }
    (Wire::new(Box::new(a), silence), Wire::new(Box::new(b), silence))
}

#[test]
fn heartbeats_are_invisible() {
    let (mut a, mut b) = pair(Duration::from_secs(5));
    a.frame(Kind::Heartbeat, &[]).unwrap();
    a.json(Kind::Commit, &Commit {}).unwrap();
    a.flush().unwrap();
    b.expect::<Commit>(Kind::Commit).unwrap();
}

#[test]
fn a_sign_of_life_does_not_wait_for_a_long_limit() {
    let (mut a, _b) = pair(Duration::from_secs(600));
    a.alive().unwrap();
    assert_eq!(a.bytes().0, 0, "it has just begun");
    std::thread::sleep(SHORTEST_SILENCE / 4);
    a.alive().unwrap();
    assert!(a.bytes().0 > 0);
}

#[test]
fn silence_is_named() {
    let (_a, mut b) = pair(Duration::from_millis(50));
    let e = b.expect::<Running>(Kind::Running).unwrap_err();
    assert!(e.to_string().contains("silent"), "{e}");
}

#[test]
fn the_peers_reason_becomes_the_error_also_when_we_were_still_sending() {
    let (mut a, mut b) = pair(Duration::from_secs(5));
    let why = Failure { phase: "restore".into(), message: "no room".into(), ..Failure::default() };
    let sent = why.clone();
    let t = std::thread::spawn(move || b.fail(&sent));
    let mut sends = (0..100_000).map(|_| a.frame(Kind::FileData, &[&[0; 4096]]));
    let failed = sends.any(|r| r.is_err());
    assert!(a.reason() == Some(why) || !failed);
    drop(a);
    t.join().unwrap();
}

#[test]
fn a_failure_in_place_of_an_answer_is_an_error() {
    let (mut a, mut b) = pair(Duration::from_secs(5));
    let why = Failure { phase: "restore".into(), message: "criu said no".into(), ..Failure::default() };
    a.json(Kind::Failed, &why).unwrap();
    a.flush().unwrap();
    let e = b.expect::<Running>(Kind::Running).unwrap_err();
    assert_eq!(e.downcast_ref::<Failure>(), Some(&why));
}

/// Of two nodes with a CA of their own.
fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    use crate::tls::cert::{Validity, write_ca, write_node};
    use crate::tls::{ALPN_DATA, config::Pki};
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    write_ca(&path("ca"), "ca", Validity::days(2), false).unwrap();
    for node in ["a", "b"] {
        write_node(&path("ca"), &path(node), node, &[], Validity::days(2), false).unwrap();
    }
    let server = Pki::new(path("b")).server(&[ALPN_DATA]).unwrap();
    (server, Pki::new(path("a")).client(ALPN_DATA, Some("b")).unwrap())
}

/// Both ends of a connection over loopback TCP with real certificates; `far` runs in a thread of its own.
fn loopback<T: Send + 'static>(
    far: impl FnOnce(Wire) -> T + Send + 'static,
) -> (Wire, std::thread::JoinHandle<T>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (server, client) = configs();
    let silence = Duration::from_secs(20);
    let far = std::thread::spawn(move || {
        let tcp = listener.accept().unwrap().0;
        let mut wire = Wire::accept(tcp, server, silence, Instant::now() + silence, |_| Ok(())).unwrap();
        wire.deadline(None).unwrap();
        far(wire)
    });
    let tcp = TcpStream::connect(address).unwrap();
    (Wire::connect(tcp, client, "x.migration.transship", silence).unwrap(), far)
}

#[test]
fn frames_of_every_size_arrive_over_tls_in_both_directions() {
    let sizes = [0, 1, 100, 16_367, 16_368, 16_369, 65_536, 300_000, 1 << 20];
    let bytes = |n: usize| (0..n).map(|i| (i * 31 + n) as u8).collect::<Vec<_>>();
    let exchange = move |mut wire: Wire| {
        for round in 0..3 {
            for n in sizes {
                wire.frame(Kind::Memory, &[&bytes(n)[..n / 3], &bytes(n)[n / 3..]]).unwrap();
                if round == 1 {
                    wire.flush().unwrap();
                }
            }
        }
        wire.flush().unwrap();
        let mut spare = Vec::new();
        for n in [sizes; 3].concat() {
            assert_eq!(wire.recv().unwrap(), Kind::Memory);
            assert!(wire.payload() == bytes(n), "{n}");
            spare = wire.take_payload(spare);
            assert!(spare == bytes(n));
        }
        wire
    };
    let (near, far) = loopback(exchange);
    let mut near = exchange(near);
    let mut far = far.join().unwrap();
    near.close().unwrap();
    let e = far.recv().unwrap_err();
    assert!(e.is::<Lost>() && e.to_string().contains("closed"), "{e}");
    far.json(Kind::Commit, &Commit {}).unwrap();
    far.close().unwrap();
    near.expect::<Commit>(Kind::Commit).unwrap();
    assert!(near.recv().is_err());
    assert!(near.json(Kind::Commit, &Commit {}).and_then(|()| near.flush()).is_err());
}

#[test]
fn two_sides_that_both_send_do_not_wait_for_each_other() {
    let send = |mut wire: Wire| {
        // so that the sockets hold far less than what is sent
        for (option, bytes) in [(libc::SO_SNDBUF, 16 << 10), (libc::SO_RCVBUF, 256 << 10)] {
            let bytes: libc::c_int = bytes;
            let (value, len) = ((&raw const bytes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
            // SAFETY: an open socket and an int that lives through the call.
            let rc = unsafe { libc::setsockopt(wire.fd(), libc::SOL_SOCKET, option, value, len) };
            assert_eq!(rc, 0);
        }
        // and that is less than we hold of what the peer sends meanwhile
        let piece = vec![7; 64 << 10];
        for _ in 0..48 {
            wire.frame(Kind::Memory, &[&piece]).unwrap();
            wire.flush().unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        (0..48).for_each(|_| assert_eq!(wire.recv().unwrap(), Kind::Memory));
        wire
    };
    let (near, far) = loopback(send);
    let _near = send(near);
    far.join().unwrap();
}

#[test]
fn what_is_there_is_taken_without_waiting() {
    let (mut near, far) = loopback(|mut wire| {
        assert_eq!(wire.recv().unwrap(), Kind::MemoryWant);
        wire.frame(Kind::Heartbeat, &[]).unwrap();
        wire.frame(Kind::Memory, &[&vec![5; 1 << 20]]).unwrap();
        wire.frame(Kind::MemoryDone, &[]).unwrap();
        wire.close().unwrap();
        wire.recv().unwrap_err()
    });
    near.low_latency(true);
    assert!(near.try_recv().unwrap().is_none() && near.fd() >= 0);
    near.frame(Kind::MemoryWant, &[&[1; 25]]).unwrap();
    near.flush().unwrap();
    let mut kinds = Vec::new();
    let until = Instant::now() + Duration::from_secs(20);
    while kinds.len() < 2 && Instant::now() < until {
        if let Some(kind) = near.try_recv().unwrap() {
            kinds.push((kind, near.payload().len()));
        }
    }
    assert_eq!(kinds, [(Kind::Memory, 1 << 20), (Kind::MemoryDone, 0)]);
    near.low_latency(false);
    near.close().unwrap();
    assert!(far.join().unwrap().is::<Lost>());
    let e = std::iter::repeat_with(|| near.try_recv()).find_map(Result::err).unwrap();
    assert!(e.is::<Lost>(), "{e}");
}

#[test]
fn a_peer_of_another_ca_is_told_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (server, _) = configs();
    let (_, client) = configs();
    let far = std::thread::spawn(move || {
        let tcp = listener.accept().unwrap().0;
        let limit = Duration::from_secs(5);
        Wire::accept(tcp, server, limit, Instant::now() + limit, |_| Ok(())).map(drop).unwrap_err()
    });
    let tcp = TcpStream::connect(address).unwrap();
    let near = Wire::connect(tcp, client, "x.migration.transship", Duration::from_secs(5));
    let (near, far) = (near.map(drop).unwrap_err(), far.join().unwrap());
    let inner = |e: &anyhow::Error| {
        let io = e.downcast_ref::<io::Error>().and_then(|e| e.get_ref());
        io.and_then(|e| e.downcast_ref::<rustls::Error>()).cloned()
    };
    assert!(matches!(inner(&near), Some(rustls::Error::InvalidCertificate(_))), "{near:#}");
    assert!(matches!(inner(&far), Some(rustls::Error::AlertReceived(_))), "the alert was sent: {far:#}");
}

/// `cargo test --release --lib -- --ignored --nocapture throughput`
#[test]
#[ignore = "a measurement"]
fn throughput() {
    for kind in [Kind::Pages, Kind::Memory] {
        for size in [64 << 10, 1 << 20] {
            let total = 4usize << 30;
            let (mut wire, far) = loopback(move |mut wire| {
                let mut got = 0;
                while wire.recv().unwrap() != Kind::MemoryDone {
                    got += wire.payload().len();
                }
                wire.json(Kind::Commit, &Commit {}).unwrap();
                wire.flush().unwrap();
                got
            });
            let data: Vec<u8> =
                (0..size as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let start = Instant::now();
            for _ in 0..total / size {
                wire.frame(kind, &[&data]).unwrap();
            }
            wire.frame(Kind::MemoryDone, &[]).unwrap();
            wire.expect::<Commit>(Kind::Commit).unwrap();
            let rate = total as f64 / start.elapsed().as_secs_f64() / 1e6;
            assert_eq!(far.join().unwrap(), total / size * size);
            println!("{kind:?} frames of {} KiB: {rate:.0} MB/s", size >> 10);
        }
    }
}
