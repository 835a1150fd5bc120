//! A CA and a certificate for each node: `transship cert ca|node`.
//!
//! Keys are ECDSA P-256. A node's certificate serves as client and as server, and names the node (common name and DNS
//! name) and the addresses under which the other nodes dial it. Files: `ca.pem`, `ca.key`, `node.pem`, `node.key`; a
//! node needs all but `ca.key`, which stays with the operator. Beside the CA a copy of every certificate is kept, and the list of
//! those that were revoked ([`super::revocation`]); each node has a copy of that too.

use std::{
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls_pki_types::DnsName;

use super::revocation;

/// The CA's certificate, in every node's pki directory.
pub const CA_CERT: &str = "ca.pem";
/// The CA's key; only where certificates are made.
pub const CA_KEY: &str = "ca.key";
/// The node's certificate.
pub const NODE_CERT: &str = "node.pem";
/// The node's key.
pub const NODE_KEY: &str = "node.key";

/// How far back a new certificate is valid, for nodes whose clocks differ a little.
const BACKDATE: Duration = Duration::from_secs(3600);

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// Not before.
    pub from: SystemTime,
    /// Not after.
    pub until: SystemTime,
}

impl Validity {
    /// From an hour ago, for so many days from now.
    pub fn days(days: u32) -> Self {
        let now = SystemTime::now();
        Validity { from: now - BACKDATE, until: now + Duration::from_secs(u64::from(days) * 86400) }
    }

    fn apply(self, params: &mut CertificateParams) -> Result<()> {
        params.not_before = moment(self.from)?;
        params.not_after = moment(self.until)?;
        Ok(())
    }
}

/// A moment as rcgen wants it.
pub(super) fn moment(at: SystemTime) -> Result<time::OffsetDateTime> {
    let since = at.duration_since(UNIX_EPOCH).context("a moment before 1970")?;
    Ok(rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since.as_secs()))
}

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub struct Pair {
    /// The certificate.
    pub cert: String,
    /// The key (PKCS #8).
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("cert", &self.cert).finish_non_exhaustive()
    }
}

/// Makes a CA.
pub fn new_ca(name: &str, validity: Validity) -> Result<Pair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity.apply(&mut params)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("generating the CA's key")?;
    let cert = params.self_signed(&key).context("signing the CA's certificate")?;
    Ok(Pair { cert: cert.pem(), key: key.serialize_pem() })
}

/// Makes a node's certificate.
///
/// # Errors
/// The node's name or one of the addresses is neither a DNS name nor an IP address (a name must be a DNS name: peers
/// check it), or the CA's files do not parse.
pub fn new_node(ca: &Pair, name: &str, addresses: &[String], validity: Validity) -> Result<Pair> {
    DnsName::try_from(name).map_err(|_| {
        anyhow::anyhow!(
            "{name:?} cannot be a node's name: use letters, digits, '-' and '.', as in a host name"
        )
    })?;
    ensure!(name.parse::<std::net::IpAddr>().is_err(), "a node's name cannot be an IP address: {name}");
    let mut names = vec![name.to_string()];
    names.extend(addresses.iter().filter(|a| *a != name).cloned());
    let mut params = CertificateParams::new(names).context("an address of the node")?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    validity.apply(&mut params)?;
    let ca_key = KeyPair::from_pem(&ca.key).context("the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&ca.cert, ca_key).context("the CA's certificate")?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("generating the node's key")?;
    let cert = params.signed_by(&key, &issuer).context("signing the node's certificate")?;
    Ok(Pair { cert: cert.pem(), key: key.serialize_pem() })
}

/// Makes a CA in `dir`; returns the files written.
///
/// # Errors
/// One of the files exists and `force` is not set: every certificate of the old CA would become worthless.
pub fn write_ca(dir: &Path, name: &str, validity: Validity, force: bool) -> Result<Vec<PathBuf>> {
    refuse_existing(dir, &[CA_CERT, CA_KEY], force)?;
    let ca = new_ca(name, validity)?;
    write_all(dir, &[(CA_KEY, &ca.key), (CA_CERT, &ca.cert)])
}

/// Makes a node's certificate with the CA in `ca_dir`, and puts it with a copy of the CA's certificate into `dir`, which
/// is then what the node needs as its pki directory; returns the files written.
///
/// # Errors
/// The node's files exist and `force` is not set, or the CA's cannot be read.
pub fn write_node(
    ca_dir: &Path,
    dir: &Path,
    name: &str,
    addresses: &[String],
    validity: Validity,
    force: bool,
) -> Result<Vec<PathBuf>> {
    refuse_existing(dir, &[NODE_CERT, NODE_KEY], force)?;
    let read = |file: &str| {
        let path = ca_dir.join(file);
        fs::read_to_string(&path)
            .with_context(|| format!("{}: make the CA first (transship cert ca)", path.display()))
    };
    let ca = Pair { cert: read(CA_CERT)?, key: read(CA_KEY)? };
    if let Ok(present) = fs::read_to_string(dir.join(CA_CERT))
        && present != ca.cert
        && !force
    {
        bail!("{}: another CA's certificate is there; --force replaces it", dir.join(CA_CERT).display());
    }
    let node = new_node(&ca, name, addresses, validity)?;
    // first: what was issued can be revoked, whatever comes of it
    revocation::keep_issued(ca_dir, name, &node.cert)?;
    let mut files = vec![(NODE_KEY, &*node.key), (NODE_CERT, &*node.cert), (CA_CERT, &*ca.cert)];
    let revoked = fs::read_to_string(ca_dir.join(revocation::CRL)).ok();
    files.extend(revoked.as_deref().map(|list| (revocation::CRL, list)));
    write_all(dir, &files)
}

fn refuse_existing(dir: &Path, files: &[&str], force: bool) -> Result<()> {
    for file in files {
        let path = dir.join(file);
        if !force && path.symlink_metadata().is_ok() {
            bail!("{} exists; --force overwrites it", path.display());
        }
    }
    Ok(())
}

/// Each file is written beside its place, and when all of them are there they are renamed into it: a node that reads them
/// meanwhile sees the old or the new ([`super::config::Pki`] looks again should it meet some of each).
pub(super) fn write_all(dir: &Path, files: &[(&str, &str)]) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("mode of {}", dir.display()))?;
    }
    let staged = |name: &str| dir.join(format!(".{name}.new"));
    for (name, text) in files {
        let path = staged(name);
        let _ = fs::remove_file(&path);
        let write = || -> std::io::Result<()> {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().with_context(|| format!("writing {}", path.display()))?;
    }
    let mut written = Vec::new();
    for (name, _) in files {
        let path = dir.join(name);
        fs::rename(staged(name), &path).with_context(|| format!("writing {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_private_and_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        write_ca(&pki, "test CA", Validity::days(30), false).unwrap();
        let node = dir.path().join("node");
        let names = ["10.0.0.1".to_string(), "fd00::1".into(), "a.example".into()];
        let files = write_node(&pki, &node, "node-a", &names, Validity::days(30), false).unwrap();
        assert_eq!(files.len(), 3);
        for file in files {
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
        }
        assert!(!node.join(CA_KEY).exists());
        let error = write_ca(&pki, "other", Validity::days(1), false).unwrap_err();
        assert!(error.to_string().contains("--force"), "{error}");
        assert!(write_node(&pki, &node, "node-a", &[], Validity::days(30), false).is_err());
        let before = fs::read(node.join(NODE_CERT)).unwrap();
        write_node(&pki, &node, "node-a", &[], Validity::days(30), true).unwrap();
        assert_ne!(before, fs::read(node.join(NODE_CERT)).unwrap());
        // a CA made anew is not slipped under a node that trusts the old one
        write_ca(&pki, "other", Validity::days(1), true).unwrap();
        fs::remove_file(node.join(NODE_CERT)).unwrap();
        fs::remove_file(node.join(NODE_KEY)).unwrap();
        let error = write_node(&pki, &node, "node-a", &[], Validity::days(30), false).unwrap_err();
        assert!(error.to_string().contains("another CA"), "{error}");
    }

    #[test]
    fn bad_names_are_refused() {
        let ca = new_ca("ca", Validity::days(1)).unwrap();
        for bad in ["", "a b", "10.0.0.1", "-", "ü"] {
            assert!(new_node(&ca, bad, &[], Validity::days(1)).is_err(), "{bad:?}");
        }
    }
}
