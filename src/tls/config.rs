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
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject,
};

use super::{
    cert::{CA_CERT, NODE_CERT, NODE_KEY},
    revocation::{self, CRL},
};
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
        // no file: nobody is revoked; one that cannot be read is an error
        let there = self.dir.join(CRL).symlink_metadata().is_ok();
        let crl = there.then(|| read(CRL)).transpose()?;
        Ok(TlsMaterial { ca: read(CA_CERT)?, cert: read(NODE_CERT)?, key: read(NODE_KEY)?.into(), crl })
    }

    /// [`server`] with what the directory holds now.
    pub fn server(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>> {
        self.with_what_is_there(|material| server(material, alpn))
    }

    /// [`client`] with what the directory holds now.
    pub fn client(&self, alpn: &[u8], peer: Option<&str>) -> Result<Arc<ClientConfig>> {
        self.with_what_is_there(|material| client(material, alpn, peer))
    }

    /// Files that are being replaced may be met with some of them old and some new: then they are read once more.
    fn with_what_is_there<T>(&self, make: impl Fn(&TlsMaterial) -> Result<T>) -> Result<T> {
        let attempt = || make(&self.material()?);
        attempt().or_else(|_| attempt()).with_context(|| format!("pki directory {}", self.dir.display()))
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
        .with_crls(revoked(material)?)
        .enforce_revocation_expiration()
        .build()
        .context("the CA's certificate and its list of revoked ones")?;
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
        .with_crls(revoked(material)?)
        .enforce_revocation_expiration()
        .build()
        .context("the CA's certificate and its list of revoked ones")?;
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

/// The lists of revoked certificates, if there are any.
fn revoked(material: &TlsMaterial) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    material.crl.as_deref().map_or(Ok(Vec::new()), |crl| revocation::lists(crl).context(CRL))
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
        E::InvalidCertificate(C::Revoked) => "the peer's certificate was revoked".into(),
        E::InvalidCertificate(C::UnknownRevocationStatus) => {
            "this node's crl.pem has no list of the CA that made the peer's certificate".into()
        }
        E::InvalidCertificate(C::ExpiredRevocationList | C::ExpiredRevocationListContext { .. }) => {
            "this node's list of revoked certificates (crl.pem) has expired: make a new one with `transship cert revoke`"
                .into()
        }
        E::InvalidCertificate(other) => format!("the peer's certificate was not accepted: {other:?}"),
        E::NoCertificatesPresented => "the peer showed no certificate".into(),
        E::AlertReceived(A::UnknownCA | A::DecryptError) => {
            "the peer did not accept this node's certificate: it is of another CA".into()
        }
        E::AlertReceived(A::CertificateExpired) => {
            "the peer did not accept this node's certificate: it has expired".into()
        }
        E::AlertReceived(A::CertificateRevoked) => {
            "the peer did not accept this node's certificate: it was revoked".into()
        }
        E::AlertReceived(
            alert @ (A::BadCertificate | A::CertificateUnknown | A::CertificateRequired | A::AccessDenied),
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
#[path = "config_tests.rs"]
mod tests;
