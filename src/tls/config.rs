//! A node's rustls configurations: TLS 1.3 only, ring, a certificate of our CA required on both sides.
//!
//! [`Pki`] names a directory; each configuration is read from it anew, so that a replaced certificate counts from the next
//! connection on, without a restart. Sessions are never resumed: each connection shows its certificate.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};

use super::cert::{CA_CERT, NODE_CERT, NODE_KEY};
use crate::control::TlsMaterial;

/// Where the agent's and the shims' certificates are, unless the agent's config says otherwise.
pub const DEFAULT_DIR: &str = "/etc/transship/pki";

/// A node's pki directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// The directory is not looked at before a configuration is asked for.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Pki { dir: dir.into() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the directory holds, as the shims get it.
    ///
    /// # Errors
    /// A file is missing.
    pub fn material(&self) -> Result<TlsMaterial> {
        let read = |file: &str| {
            let path = self.dir.join(file);
            fs::read_to_string(&path)
                .with_context(|| format!("{}: make it with `transship cert`", path.display()))
        };
        Ok(TlsMaterial { ca: read(CA_CERT)?, cert: read(NODE_CERT)?, key: read(NODE_KEY)?.into() })
    }

    /// [`server`] with what the directory holds now.
    pub fn server(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>> {
        server(&self.material()?, alpn).with_context(|| format!("pki directory {}", self.dir.display()))
    }

    /// [`client`] with what the directory holds now.
    pub fn client(&self, alpn: &[u8], peer: Option<&str>) -> Result<Arc<ClientConfig>> {
        client(&self.material()?, alpn, peer).with_context(|| format!("pki directory {}", self.dir.display()))
    }

    /// The name in this node's own certificate.
    pub fn node_name(&self) -> Result<String> {
        peer_name(&certificates(&self.material()?.cert)?)
    }
}

/// For the accepting side; `alpn`: what it speaks.
///
/// # Errors
/// A text does not parse, or key and certificate do not belong together.
pub fn server(material: &TlsMaterial, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(material)?, provider.clone())
        .build()
        .context("the CA's certificate")?;
    let (chain, key) = identity(material)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context("TLS 1.3")?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .context("the node's certificate and key")?;
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For the dialling side. `peer`: whom the certificate has to name; without it that is the server name given to the
/// connection. (A data connection asks for a migration's name, and expects the node's.)
///
/// # Errors
/// As [`server`], or `peer` is neither a DNS name nor an IP address.
pub fn client(material: &TlsMaterial, alpn: &[u8], peer: Option<&str>) -> Result<Arc<ClientConfig>> {
    let provider = provider();
    let webpki = WebPkiServerVerifier::builder_with_provider(roots(material)?, provider.clone())
        .build()
        .context("the CA's certificate")?;
    let expected = peer.map(server_name).transpose()?;
    let (chain, key) = identity(material)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context("TLS 1.3")?
        .dangerous() // not laxer: webpki decides, only about another name
        .with_custom_certificate_verifier(Arc::new(NamedVerifier { webpki, expected }))
        .with_client_auth_cert(chain, key)
        .context("the node's certificate and key")?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn roots(material: &TlsMaterial) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&material.ca).context("the CA's certificate")? {
        roots.add(certificate).context("the CA's certificate")?;
    }
    Ok(Arc::new(roots))
}

fn identity(material: &TlsMaterial) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let key = PrivateKeyDer::from_pem_slice(material.key.as_bytes()).context("the node's key")?;
    Ok((certificates(&material.cert).context("the node's certificate")?, key))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>()?;
    ensure!(!found.is_empty(), "no certificate in it");
    Ok(found)
}

/// A host (DNS name or IP address) as rustls wants it.
pub fn server_name(host: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(host.to_string())
        .with_context(|| format!("{host:?} is neither a host name nor an address"))
}

/// The node's name in a certificate chain that the handshake has verified: the common name of its first certificate,
/// which must also be one of its DNS names.
pub fn peer_name(chain: &[CertificateDer<'_>]) -> Result<String> {
    let der = chain.first().context("the peer showed no certificate")?;
    let (_, certificate) = x509_parser::parse_x509_certificate(der).context("the peer's certificate")?;
    let name = certificate.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok());
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        bail!("the peer's certificate has no common name");
    };
    let names = certificate.subject_alternative_name().ok().flatten();
    let listed = names.is_some_and(|san| {
        san.value
            .general_names
            .iter()
            .any(|n| matches!(n, x509_parser::extensions::GeneralName::DNSName(dns) if *dns == name))
    });
    ensure!(
        listed,
        "the peer's certificate is not one of `transship cert`: its common name is no DNS name in it"
    );
    Ok(name.to_string())
}

/// What a TLS error has to say about trust, if it is about trust: for an exit code and a hint of its own.
pub fn trust_problem(error: &rustls::Error) -> Option<String> {
    use rustls::{AlertDescription as A, CertificateError as C, Error as E};
    Some(match error {
        E::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "the peer's certificate is of another CA".into()
        }
        E::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            "the peer's certificate has expired (or this node's clock is wrong)".into()
        }
        E::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "the peer's certificate is not valid yet (or this node's clock is wrong)".into()
        }
        E::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
            "the peer's certificate is of another node: it does not name the address that was dialled".into()
        }
        E::InvalidCertificate(other) => format!("the peer's certificate was not accepted: {other:?}"),
        E::NoCertificatesPresented => "the peer showed no certificate".into(),
        E::AlertReceived(A::UnknownCA | A::DecryptError) => {
            "the peer did not accept this node's certificate: it is of another CA".into()
        }
        E::AlertReceived(A::CertificateExpired) => {
            "the peer did not accept this node's certificate: it has expired".into()
        }
        E::AlertReceived(
            alert @ (A::BadCertificate
            | A::CertificateUnknown
            | A::CertificateRequired
            | A::CertificateRevoked
            | A::AccessDenied),
        ) => format!("the peer did not accept this node's certificate ({alert:?})"),
        _ => return None,
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// webpki's verifier, about `expected` in place of the name asked for by SNI.
#[derive(Debug)]
struct NamedVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    expected: Option<ServerName<'static>>,
}

impl ServerCertVerifier for NamedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let name = self.expected.as_ref().unwrap_or(server_name);
        self.webpki.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
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
}
