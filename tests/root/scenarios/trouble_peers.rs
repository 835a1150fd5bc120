//! Peers that cannot be reached, are not trusted, or speak something else; and strangers at the port.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use rustls::{ServerConnection, StreamOwned};
use transship::migrate::wire::{FrameSink, Wire};
use transship::migrate::{codec::Kind, protocol};
use transship::tls::{self, cert, config};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::{self, Attempt, Configured, Fault, Witness, in_network, refused};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "peer_unreachable", needs: Needs::Migration, run: unreachable },
    Scenario { name: "peer_of_another_ca", needs: Needs::Migration, run: another_ca },
    Scenario { name: "peer_certificate_expired", needs: Needs::Migration, run: expired },
    Scenario { name: "peer_of_another_version", needs: Needs::Migration, run: another_version },
    Scenario { name: "peer_strangers_change_nothing", needs: Needs::Migration, run: strangers },
    Scenario { name: "peer_ticket_cannot_be_used_up", needs: Needs::Migration, run: not_the_source },
    Scenario { name: "peer_operators_ticket", needs: Needs::Migration, run: operators_ticket },
];

/// Where the client's network is.
const CLIENT: &str = "10.77.0.9";
const PORT: u16 = 7420;

fn unreachable(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    refused(bed, "w1", "10.77.0.77", &[], 6, &["10.77.0.77:7420", "transship agent"])?;
    refused(bed, "w1", "10.99.0.1", &[], 6, &["10.99.0.1:7420", "transship agent"])?;
    refused(bed, "w1", "10.77.0.2:7999", &[], 6, &["10.77.0.2:7999", "refused"])?;
    refused(bed, "w1", "no-such-node.invalid", &[], 6, &["no-such-node.invalid", "looking up the name"])?;
    // accepts (the kernel does) and says nothing
    let silent = in_network(bed, "c", || Ok(TcpListener::bind((CLIENT, PORT))?))?;
    refused(bed, "w1", CLIENT, &[], 6, &["no TLS handshake within 5 s"])?;
    drop(silent);
    // another program
    let chatty = in_network(bed, "c", || Ok(TcpListener::bind((CLIENT, PORT))?))?;
    let chat = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = chatty.accept()?;
        stream.write_all(b"SSH-2.0-OpenSSH_10.0\r\n")?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    });
    refused(bed, "w1", CLIENT, &[], 6, &["10.77.0.9:7420"])?;
    chat.join().ok().context("the listener")??;
    witness.finish_untouched().map(drop)
}

/// Other certificates for a node while this lives.
struct Certified<'a> {
    bed: &'a Bed,
    node: Node,
}

impl<'a> Certified<'a> {
    fn new(bed: &'a Bed, node: Node, pki: &Path) -> Result<Certified<'a>> {
        let certified = Certified { bed, node };
        certified.install(pki)?;
        Ok(certified)
    }

    fn install(&self, pki: &Path) -> Result<()> {
        let pki = pki.to_str().context("path")?;
        self.bed.sh(self.node, &format!("cp -f {pki}/* /etc/transship/pki/")).map(drop)
    }
}

impl Drop for Certified<'_> {
    fn drop(&mut self) {
        let back = trouble::folder(self.bed).map(|f| f.join(format!("pki-{}", self.node.name())));
        if let Err(e) = back.and_then(|pki| self.install(&pki)) {
            eprintln!("{e:#}");
        }
    }
}

/// A directory of certificates for a node, by a CA of its own.
fn foreign(bed: &Bed, node: Node) -> Result<std::path::PathBuf> {
    let dir = bed.shared()?.join(format!("foreign-{}", node.name()));
    let (ca, days) = (dir.join("ca"), cert::Validity::days(2));
    cert::write_ca(&ca, "another CA", days, true)?;
    let name = format!("{}-{}", trouble::prefix(bed)?, node.name());
    cert::write_node(&ca, &dir.join("pki"), &name, &[node.address().into()], days, true)?;
    Ok(dir.join("pki"))
}

fn another_ca(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    for node in Node::ALL {
        let _foreign = Certified::new(bed, node, &foreign(bed, node)?)?;
        witness.refused(&[], 11, &["of another CA", "transship cert"])?;
    }
    witness.finish_untouched().map(drop)
}

fn expired(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let folder = trouble::folder(bed)?;
    let now = SystemTime::now();
    let gone = cert::Validity { from: now - Duration::from_secs(7200), until: now - Duration::from_secs(60) };
    for node in Node::ALL {
        let dir = bed.shared()?.join(format!("expired-{}", node.name()));
        let name = format!("{}-{}", trouble::prefix(bed)?, node.name());
        cert::write_node(&folder.join("ca"), &dir, &name, &[node.address().into()], gone, true)?;
        let _expired = Certified::new(bed, node, &dir)?;
        witness.refused(&[], 11, &["expired", "transship cert"])?;
    }
    witness.finish_untouched().map(drop)
}

/// A peer of the same CA, in the client's network, that answers one connection so: this ALPN, and this as the first message.
fn peer(bed: &Bed, alpn: &'static [u8], hello: &'static str) -> Result<std::thread::JoinHandle<Result<()>>> {
    let dir = bed.shared()?.join("other");
    let ca = trouble::folder(bed)?.join("ca");
    cert::write_node(&ca, &dir, "other", &[CLIENT.into()], cert::Validity::days(2), true)?;
    let server = config::Pki::new(&dir).server(&[alpn])?;
    let listener = in_network(bed, "c", || Ok(TcpListener::bind((CLIENT, PORT))?))?;
    Ok(std::thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        let mut tls = StreamOwned::new(ServerConnection::new(server)?, stream);
        let mut message = (hello.len() as u32).to_le_bytes().to_vec();
        message.push(0);
        message.extend_from_slice(hello.as_bytes());
        // with another ALPN it comes to nothing, as it should
        if tls.write_all(&message).and_then(|()| tls.flush()).is_ok() {
            let _ = tls.read_to_end(&mut Vec::new());
        }
        Ok(())
    }))
}

fn another_version(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let server = peer(bed, b"transship-control/7", "")?;
    refused(bed, "w1", CLIENT, &[], 5, &["another protocol", "same version"])?;
    server.join().ok().context("the peer")??;
    let server =
        peer(bed, b"transship-control/1", r#"{"says":"hello","oldest":7,"newest":9,"node":"other"}"#)?;
    refused(bed, "w1", CLIENT, &[], 5, &["no common protocol version", "7 to 9", "same version"])?;
    server.join().ok().context("the peer")??;
    // not what any version says
    let server = peer(bed, b"transship-control/1", r#"{"says":"moo"}"#)?;
    refused(bed, "w1", CLIENT, &[], 6, &["10.77.0.9"])?;
    server.join().ok().context("the peer")??;
    witness.finish_untouched().map(drop)
}

/// The migration that node b has prepared for.
fn migration(bed: &Bed) -> Result<String> {
    let leases = bed.ok(Node::B, &["ctr", "leases", "ls", "-q"])?;
    let mut ids = leases.lines().filter_map(|l| l.trim().strip_prefix("transship-"));
    Ok(ids.next().with_context(|| format!("no lease of a migration: {leases:?}"))?.to_owned())
}

/// A data connection to node b from node a's or the client's network, with that node's good certificate.
fn data_connection(
    bed: &Bed,
    of: &str,
    pki: &Path,
    migration: &str,
    ticket: &str,
) -> Result<protocol::Welcome> {
    let material = config::Pki::new(pki).material()?;
    let client =
        config::client(&material, protocol::ALPN_DATA, Some(&format!("{}-b", trouble::prefix(bed)?)))?;
    let to: SocketAddr = SocketAddr::new(IpAddr::from([10, 77, 0, 2]), PORT);
    let tcp = in_network(bed, of, || Ok(TcpStream::connect(to)?))?;
    let mut wire = Wire::connect(tcp, client, &tls::migration_name(migration), Duration::from_secs(5))?;
    let hello =
        protocol::Hello { oldest: 1, newest: 1, migration_id: migration.into(), ticket: ticket.into() };
    wire.json(Kind::Hello, &hello)?;
    wire.expect(Kind::Welcome)
}

fn strangers(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let folder = trouble::folder(bed)?;
    let other = bed.shared()?.join("other");
    let ca = folder.join("ca");
    cert::write_node(&ca, &other, "other", &[CLIENT.into()], cert::Validity::days(2), true)?;
    let to: SocketAddr = SocketAddr::new(IpAddr::from([10, 77, 0, 2]), PORT);
    let fault = Fault::at(bed, Node::A, "dial")?;
    let attempt = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    // before the source's own connection: silent ones, garbage, and others' certificates
    let id = migration(bed)?;
    let idle: Vec<_> =
        in_network(bed, "c", || (0..20).map(|_| Ok(TcpStream::connect(to)?)).collect::<Result<_>>())?;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xff], &[0; 4096]] {
        let mut stream = in_network(bed, "c", || Ok(TcpStream::connect(to)?))?;
        stream.write_all(garbage)?;
    }
    ensure!(data_connection(bed, "c", &other, &id, "guess").is_err(), "another address got in");
    ensure!(
        data_connection(bed, "a", &folder.join("pki-a"), &"0".repeat(32), "guess").is_err(),
        "no migration"
    );
    let held = Fault::at(bed, Node::B, "receive")?;
    drop(fault);
    held.reached()?;
    // after it: nobody waits any more
    ensure!(data_connection(bed, "a", &folder.join("pki-a"), &id, "again").is_err(), "used twice");
    drop(held);
    let outcome = attempt.finish()?;
    ensure!(outcome.code == 0, "{} {}", outcome.json, outcome.stderr);
    drop(idle);
    let log = std::fs::read_to_string(folder.join("b/log/agent.log"))?;
    for line in [
        "belongs to 10.77.0.1",
        "waits for a connection",
        "unknown, begun or given up",
        "connection of 10.77.0.9",
    ] {
        ensure!(log.contains(line), "node b's agent did not log {line:?}:\n{log}");
    }
    witness.finish(Node::B).map(drop)
}

/// The words are in node b's agent's log.
fn said_on_b(bed: &Bed, words: &[&str]) -> Result<()> {
    let log = std::fs::read_to_string(trouble::folder(bed)?.join("b/log/agent.log"))?;
    let there = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(there, "node b's agent did not log {words:?}:\n{log}");
    Ok(())
}

/// Whoever knows a migration's name, at the source's own address, cannot make it fail: the right one still gets in.
fn not_the_source(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let folder = trouble::folder(bed)?;
    let other = bed.shared()?.join("other");
    cert::write_node(&folder.join("ca"), &other, "other", &[CLIENT.into()], cert::Validity::days(2), true)?;
    let fault = Fault::at(bed, Node::A, "dial")?;
    let attempt = Attempt::start(bed, "w1", &[])?;
    fault.reached()?;
    let id = migration(bed)?;
    // the right node with the right certificate, but not the ticket; another node
    let answer = data_connection(bed, "a", &folder.join("pki-a"), &id, &"f".repeat(64));
    let said = format!("{:#}", answer.err().context("a wrong ticket was welcome")?);
    ensure!(said.contains("ticket"), "{said}");
    let answer = data_connection(bed, "a", &other, &id, &"f".repeat(64));
    let said = format!("{:#}", answer.err().context("another node was welcome")?);
    ensure!(said.contains("agreed with another node"), "{said}");
    // a ClientHello with the migration's name, and then nothing
    let silent = hello_and_silence(bed, &other, &id)?;
    drop(fault);
    let outcome = attempt.finish()?;
    ensure!(outcome.code == 0, "{} {}", outcome.json, outcome.stderr);
    drop(silent);
    said_on_b(bed, &["refused for migration", "a ticket that is not for this migration"])?;
    said_on_b(bed, &["refused for migration", "connection of other (10.77.0.1"])?;
    witness.finish(Node::B).map(drop)
}

fn hello_and_silence(bed: &Bed, pki: &Path, migration: &str) -> Result<TcpStream> {
    let client = config::client(&config::Pki::new(pki).material()?, protocol::ALPN_DATA, None)?;
    let name = config::server_name(&tls::migration_name(migration))?;
    let mut connection = rustls::ClientConnection::new(client, name)?;
    let to: SocketAddr = SocketAddr::new(IpAddr::from([10, 77, 0, 2]), PORT);
    let mut tcp = in_network(bed, "a", || Ok(TcpStream::connect(to)?))?;
    connection.write_tls(&mut tcp)?;
    Ok(tcp)
}

/// Node b wants a ticket for each move: without one, with one, and with the same one again.
fn operators_ticket(bed: &Bed) -> Result<()> {
    let witness = Witness::start(bed, "w1")?;
    let _always = Configured::new(bed, Node::B, "tickets = \"always\"\n")?;
    witness.refused(&[], 5, &["every move to this node needs one", "transship ticket w1", "--ticket"])?;
    let from = format!("{}-a", trouble::prefix(bed)?);
    let made = bed.ok(Node::B, &["transship", "ticket", "w1", "--from", &from, "--valid", "1m", "--json"])?;
    let made: serde_json::Value = serde_json::from_str(made.trim())?;
    let ticket = made["ticket"].as_str().context("no ticket")?;
    let there = moves::attempt(bed, "w1", Node::A, Node::B.address(), &["--ticket", ticket])?;
    ensure!(there.code == 0, "{} {}", there.json, there.stderr);
    let back = moves::attempt(bed, "w1", Node::B, Node::A.address(), &[])?;
    ensure!(back.code == 0, "{} {}", back.json, back.stderr);
    refused(bed, "w1", Node::B.address(), &["--ticket", ticket], 5, &["used already", "transship ticket"])?;
    said_on_b(bed, &["refused", &from, "used already", "default/w1"])?;
    witness.finish(Node::A).map(drop)
}
