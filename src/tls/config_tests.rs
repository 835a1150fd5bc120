//! Handshakes of two nodes in memory: who accepts whom.

use std::time::{Duration, SystemTime};

use rustls::{ClientConnection, ServerConnection};

use super::*;
use crate::tls::{
    ALPN_CONTROL, ALPN_DATA,
    cert::{Validity, new_ca, new_node, write_ca, write_node},
    migration_name,
};

/// Both ends in memory; the first error of each, and then who is who.
fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: &str,
) -> (Result<String, rustls::Error>, Result<String, rustls::Error>) {
    let mut client = ClientConnection::new(client, server_name(name).unwrap()).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let (mut client_end, mut server_end) = (Ok(()), Ok(()));
    for _ in 0..6 {
        let mut wire = Vec::new();
        while client.wants_write() && client.write_tls(&mut wire).is_ok() {}
        let mut read = &wire[..];
        while !read.is_empty() && server.read_tls(&mut read).is_ok() {
            server_end = server_end.and(server.process_new_packets().map(drop));
        }
        let mut wire = Vec::new();
        while server.wants_write() && server.write_tls(&mut wire).is_ok() {}
        let mut read = &wire[..];
        while !read.is_empty() && client.read_tls(&mut read).is_ok() {
            client_end = client_end.and(client.process_new_packets().map(drop));
        }
    }
    let name = |chain: Option<&[CertificateDer<'static>]>| peer_name(chain.unwrap_or(&[])).unwrap();
    (
        client_end.map(|()| name(client.peer_certificates())),
        server_end.map(|()| name(server.peer_certificates())),
    )
}

struct Nodes(tempfile::TempDir);

impl Nodes {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_ca(&dir.path().join("ca"), "ca", Validity::days(2), false).unwrap();
        let nodes = Nodes(dir);
        nodes.add("node-a", &["10.0.0.1"]);
        nodes.add("node-b", &["10.0.0.2", "b.example"]);
        nodes
    }
    fn add(&self, name: &str, addresses: &[&str]) {
        let addresses: Vec<_> = addresses.iter().map(|a| a.to_string()).collect();
        let (ca, dir) = (self.0.path().join("ca"), self.0.path().join(name));
        write_node(&ca, &dir, name, &addresses, Validity::days(2), false).unwrap();
    }
    fn pki(&self, name: &str) -> Pki {
        Pki::new(self.0.path().join(name))
    }
}

#[test]
fn both_sides_know_each_other() {
    let nodes = Nodes::new();
    let server = nodes.pki("node-b").server(&[ALPN_CONTROL]).unwrap();
    for name in ["node-b", "10.0.0.2", "b.example"] {
        let client = nodes.pki("node-a").client(ALPN_CONTROL, None).unwrap();
        let (seen, by) = shake(client, server.clone(), name);
        assert_eq!((seen.unwrap(), by.unwrap()), ("node-b".into(), "node-a".into()));
    }
    assert_eq!(nodes.pki("node-a").node_name().unwrap(), "node-a");
}

#[test]
fn a_data_connection_asks_for_the_migration_and_expects_the_node() {
    let nodes = Nodes::new();
    let server = nodes.pki("node-b").server(&[ALPN_DATA]).unwrap();
    let client = nodes.pki("node-a").client(ALPN_DATA, Some("node-b")).unwrap();
    assert_eq!(shake(client, server.clone(), &migration_name("00ff")).0.unwrap(), "node-b");
    let client = nodes.pki("node-a").client(ALPN_DATA, Some("node-c")).unwrap();
    let error = shake(client, server, &migration_name("00ff")).0.unwrap_err();
    assert!(trust_problem(&error).unwrap().contains("another node"), "{error}");
}

#[test]
fn other_protocols_and_names_are_refused() {
    let nodes = Nodes::new();
    let server = nodes.pki("node-b").server(&[ALPN_CONTROL]).unwrap();
    let client = nodes.pki("node-a").client(ALPN_DATA, None).unwrap();
    assert!(shake(client, server.clone(), "node-b").0.is_err());
    let client = nodes.pki("node-a").client(ALPN_CONTROL, None).unwrap();
    let error = shake(client, server, "10.0.0.3").0.unwrap_err();
    assert!(trust_problem(&error).unwrap().contains("another node"), "{error}");
}

#[test]
fn another_ca_is_refused_by_either_side() {
    let (ours, theirs) = (Nodes::new(), Nodes::new());
    let server = ours.pki("node-b").server(&[ALPN_CONTROL]).unwrap();
    let client = theirs.pki("node-a").client(ALPN_CONTROL, None).unwrap();
    let error = shake(client, server.clone(), "node-b").0.unwrap_err();
    assert!(trust_problem(&error).unwrap().contains("another CA"), "{error}");
    // a client that trusts us but whose own certificate is of another CA
    let dir = ours.0.path().join("node-a");
    for file in [NODE_CERT, NODE_KEY] {
        fs::copy(theirs.0.path().join("node-a").join(file), dir.join(file)).unwrap();
    }
    let client = ours.pki("node-a").client(ALPN_CONTROL, None).unwrap();
    let (client, server) = shake(client, server, "node-b");
    assert!(trust_problem(&server.unwrap_err()).unwrap().contains("another CA"));
    assert!(trust_problem(&client.unwrap_err()).is_some());
}

#[test]
fn expired_and_early_certificates_are_refused() {
    let nodes = Nodes::new();
    let ca = new_ca("ca", Validity::days(2)).unwrap();
    let dir = nodes.0.path().join("node-a");
    let day = Duration::from_secs(86400);
    let now = SystemTime::now();
    for (validity, word) in [
        (Validity { from: now - 2 * day, until: now - day }, "expired"),
        (Validity { from: now + day, until: now + 2 * day }, "not valid yet"),
    ] {
        let node = new_node(&ca, "node-a", &[], validity).unwrap();
        fs::write(dir.join(CA_CERT), &ca.cert).unwrap();
        fs::write(dir.join(NODE_CERT), node.cert).unwrap();
        fs::write(dir.join(NODE_KEY), node.key).unwrap();
        let pki = nodes.pki("node-a");
        let (client, server) = (pki.client(ALPN_CONTROL, None), pki.server(&[ALPN_CONTROL]));
        let error = shake(client.unwrap(), server.unwrap(), "node-a").0.unwrap_err();
        assert!(trust_problem(&error).unwrap().contains(word), "{error}");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let nodes = Nodes::new();
    let server = nodes.pki("node-b").server(&[ALPN_CONTROL]).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots(&nodes.pki("node-a").material().unwrap()).unwrap())
        .with_no_client_auth();
    client.alpn_protocols = vec![ALPN_CONTROL.to_vec()];
    let (client, server) = shake(Arc::new(client), server, "node-b");
    assert!(trust_problem(&server.unwrap_err()).is_some());
    assert!(trust_problem(&client.unwrap_err()).is_some());
}

#[test]
fn files_are_read_anew_each_time() {
    let nodes = Nodes::new();
    let pki = nodes.pki("node-a");
    pki.server(&[ALPN_CONTROL]).unwrap();
    fs::write(pki.dir().join(NODE_KEY), "no key").unwrap();
    assert!(pki.server(&[ALPN_CONTROL]).is_err());
    let error = Pki::new("/nonexistent").client(ALPN_CONTROL, None).unwrap_err();
    assert!(format!("{error:#}").contains("transship cert"), "{error:#}");
}

/// The list with node-a's certificate on it, at this node.
fn revoke_a(nodes: &Nodes, at: &str, validity: Validity) {
    use crate::tls::revocation::{CRL, Which, write_revoked};
    let ca = nodes.0.path().join("ca");
    let (list, _) = write_revoked(&ca, &Which::Node("node-a".into()), validity).unwrap();
    fs::copy(list, nodes.0.path().join(at).join(CRL)).unwrap();
}

#[test]
fn a_revoked_certificate_is_refused_by_either_side_and_the_peer_is_told() {
    let nodes = Nodes::new();
    let server = |name: &str| nodes.pki(name).server(&[ALPN_DATA]).unwrap();
    let client = |name: &str, peer| nodes.pki(name).client(ALPN_DATA, Some(peer)).unwrap();
    shake(client("node-a", "node-b"), server("node-b"), "node-b").1.unwrap();
    revoke_a(&nodes, "node-b", Validity::days(2));
    // as a client: node-b knows the list, node-a does not
    let (a, b) = shake(client("node-a", "node-b"), server("node-b"), "node-b");
    assert_eq!(trust_problem(&b.unwrap_err()).unwrap(), "the peer's certificate was revoked");
    let told = trust_problem(&a.unwrap_err()).unwrap();
    assert!(told.contains("did not accept this node's certificate: it was revoked"), "{told}");
    // as a server
    let (b, a) = shake(client("node-b", "node-a"), server("node-a"), "node-a");
    assert_eq!(trust_problem(&b.unwrap_err()).unwrap(), "the peer's certificate was revoked");
    assert!(trust_problem(&a.unwrap_err()).unwrap().contains("it was revoked"));
    // what the node gets afterwards is good
    fs::remove_file(nodes.0.path().join("node-a").join(NODE_CERT)).unwrap();
    fs::remove_file(nodes.0.path().join("node-a").join(NODE_KEY)).unwrap();
    nodes.add("node-a", &[]);
    shake(client("node-a", "node-b"), server("node-b"), "node-b").1.unwrap();
}

#[test]
fn a_list_that_says_nothing_is_no_permission() {
    let nodes = Nodes::new();
    let day = Duration::from_secs(86400);
    let now = SystemTime::now();
    revoke_a(&nodes, "node-b", Validity { from: now - 2 * day, until: now - day });
    let server = |nodes: &Nodes| nodes.pki("node-b").server(&[ALPN_DATA]);
    let client = nodes.pki("node-a").client(ALPN_DATA, None).unwrap();
    let (_, b) = shake(client.clone(), server(&nodes).unwrap(), "node-b");
    assert!(trust_problem(&b.unwrap_err()).unwrap().contains("has expired: make a new one"));
    // the list of another CA
    let others = Nodes::new();
    revoke_a(&others, "node-b", Validity::days(2));
    let list = |nodes: &Nodes| nodes.0.path().join("node-b").join(CRL);
    fs::copy(list(&others), list(&nodes)).unwrap();
    assert!(shake(client, server(&nodes).unwrap(), "node-b").1.is_err());
    // none at all in the file, and no list
    for text in ["", "not a list"] {
        fs::write(list(&nodes), text).unwrap();
        assert!(server(&nodes).is_err(), "{text:?}");
    }
}
