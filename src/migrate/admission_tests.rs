//! Everyone who may come to a shim that waits for the source: each of them is refused with its reason, and then the source gets in.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::SystemTime;

use super::*;
use crate::control::Limits;
use crate::migrate::protocol::{Failure, Welcome};
use crate::migrate::wire::FrameSink;
use crate::tls::cert::{CA_CERT, NODE_CERT, NODE_KEY, Validity, new_node, write_ca, write_node};
use crate::tls::config::Pki;
use crate::tls::revocation::{CRL, Which, write_revoked};

const MIGRATION: &str = "00112233445566778899aabbccddeeff";

/// A shim that waits for a migration from node-a, and admits one connection after the other.
struct Waiting {
    dir: tempfile::TempDir,
    address: SocketAddr,
    ticket: String,
    /// What became of each.
    ends: Arc<Mutex<Vec<Result<(), String>>>>,
    _server: JoinHandle<()>,
}

impl Waiting {
    fn new() -> Waiting {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write_ca(&path("ca"), "ca", Validity::days(2), false).unwrap();
        for node in ["node-a", "node-b", "node-c"] {
            write_node(&path("ca"), &path(node), node, &[], Validity::days(2), false).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ticket, ends) = ("5".repeat(64), Arc::new(Mutex::new(Vec::new())));
        let (at, secret, kept) = (path("node-b"), ticket.clone(), ends.clone());
        let server = std::thread::spawn(move || {
            while let Ok((tcp, _)) = listener.accept() {
                // as the agent does: the certificates are read for each connection
                let request = request(Pki::new(&at), &secret);
                let end = admit(tcp, &request).map(|mut a| {
                    assert_eq!(a.hello.migration_id, MIGRATION);
                    a.wire.json(Kind::Welcome, &Welcome { version: 1 }).unwrap();
                    a.wire.flush().unwrap();
                });
                kept.lock().unwrap().push(end.map_err(|e| format!("{e:#}")));
            }
        });
        Waiting { dir, address, ticket, ends, _server: server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }

    /// What a source with this pki directory hears when it shows this ticket.
    fn source(&self, pki: &str, expects: &str, ticket: &str) -> Result<(), String> {
        let client = Pki::new(self.path(pki)).client(ALPN_DATA, Some(expects)).unwrap();
        let ask = || -> Result<Welcome> {
            let name = tls::migration_name(MIGRATION);
            let mut wire = Wire::connect(self.tcp(), client, &name, Duration::from_secs(20))?;
            let hello = Hello { oldest: 1, newest: 1, migration_id: MIGRATION.into(), ticket: ticket.into() };
            wire.json(Kind::Hello, &hello)?;
            wire.expect(Kind::Welcome)
        };
        ask().map(drop).map_err(|e| match e.downcast_ref::<Failure>() {
            Some(failure) => format!("told: {} (phase {})", failure.message, failure.phase),
            None => format!("{e:#}"),
        })
    }

    /// What the shim said of the connection that came last, once it has.
    fn last(&self, count: usize) -> Result<(), String> {
        for _ in 0..3000 {
            if let Some(end) = self.ends.lock().unwrap().get(count - 1) {
                return end.clone();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("connection {count} did not come to an end");
    }
}

fn request(pki: Pki, ticket: &str) -> ReceiveRequest {
    ReceiveRequest {
        migration_id: MIGRATION.into(),
        ticket: ticket.into(),
        node: "node-b".into(),
        peer: "node-a".into(),
        tls: Some(pki.material().unwrap()),
        limits: Limits {
            silence_s: 20,
            ghost_limit: 0,
            criu: None,
            memory_cap: 0,
            max_frozen: 0,
            policy: Default::default(),
            images_dir: "/nonexistent".into(),
        },
        netns: None,
        net: None,
        on_post_copy_failure: Default::default(),
    }
}

#[test]
fn who_is_not_the_source_is_refused_and_told_so_and_the_source_still_gets_in() {
    let shim = Waiting::new();
    let ticket = shim.ticket.clone();
    let mut count = 0;
    let mut refused = |pki: &str, ticket: &str, told: &str, said: &str| {
        count += 1;
        let heard = shim.source(pki, "node-b", ticket).expect_err(told);
        assert!(heard.contains(told), "{heard:?} does not say {told:?}");
        let logged = shim.last(count).expect_err(said);
        assert!(logged.contains(said), "{logged:?} does not say {said:?}");
        assert!(logged.contains("connection of "), "who it was: {logged}");
    };
    // the right node, not the ticket; another node, and the right ticket
    refused("node-a", &"6".repeat(64), "told: it showed a ticket that is not", "connection of node-a (127.");
    refused("node-a", "", "told: it showed a ticket", "ticket");
    refused("node-c", &ticket, "told: migration 0011", "connection of node-c (127.");
    // another CA under the same names
    let theirs = shim.path("theirs");
    write_ca(&theirs, "ca", Validity::days(2), false).unwrap();
    write_node(&theirs, &shim.path("foreign"), "node-a", &[], Validity::days(2), false).unwrap();
    fs::copy(shim.path("ca").join(CA_CERT), shim.path("foreign").join(CA_CERT)).unwrap();
    refused("foreign", &ticket, "did not accept this node's certificate", "of another CA");
    // expired, and not valid yet
    let ca = crate::tls::cert::Pair {
        cert: fs::read_to_string(shim.path("ca").join(CA_CERT)).unwrap(),
        key: fs::read_to_string(shim.path("ca").join("ca.key")).unwrap(),
    };
    let (now, day) = (SystemTime::now(), Duration::from_secs(86400));
    fs::create_dir(shim.path("stale")).unwrap();
    fs::copy(shim.path("ca").join(CA_CERT), shim.path("stale").join(CA_CERT)).unwrap();
    for (from, until, told, said) in [
        (now - 2 * day, now - day, "it has expired", "has expired"),
        (now + day, now + 2 * day, "did not accept this node's certificate", "not valid yet"),
    ] {
        let node = new_node(&ca, "node-a", &[], Validity { from, until }).unwrap();
        fs::write(shim.path("stale").join(NODE_CERT), node.cert).unwrap();
        fs::write(shim.path("stale").join(NODE_KEY), node.key).unwrap();
        refused("stale", &ticket, told, said);
    }
    // a source that expects another node
    count += 1;
    let heard = shim.source("node-a", "node-c", &ticket).unwrap_err();
    assert!(heard.contains("of another node"), "{heard}");
    shim.last(count).unwrap_err();
    // and now the right one
    count += 1;
    shim.source("node-a", "node-b", &ticket).unwrap();
    shim.last(count).unwrap();
    // revoked meanwhile: the shim hears of it without being restarted
    let (list, _) =
        write_revoked(&shim.path("ca"), &Which::Node("node-a".into()), Validity::days(2)).unwrap();
    fs::copy(list, shim.path("node-b").join(CRL)).unwrap();
    let heard = shim.source("node-a", "node-b", &ticket).unwrap_err();
    assert!(heard.contains("it was revoked"), "{heard}");
    assert!(shim.last(count + 1).unwrap_err().contains("was revoked"));
}

#[test]
fn a_peer_that_sends_a_byte_now_and_then_has_no_longer_than_one_that_sends_none() {
    let shim = Waiting::new();
    // a record that is announced and comes byte by byte: no read waits long
    let mut slow = shim.tcp();
    slow.write_all(&[0x16, 3, 1, 0x20, 0]).unwrap();
    let begun = Instant::now();
    let drip = std::thread::spawn(move || {
        while slow.write_all(&[1]).is_ok() && begun.elapsed() < 3 * LIMIT {
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let end = shim.last(1).unwrap_err();
    let took = begun.elapsed();
    println!("a slow handshake was given up after {took:?}: {end}");
    assert!(took < LIMIT + Duration::from_secs(3), "{took:?}");
    drip.join().unwrap();
    // the next one gets in at once
    shim.source("node-a", "node-b", &shim.ticket).unwrap();
    shim.last(2).unwrap();
}
