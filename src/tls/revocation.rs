//! The list of revoked certificates (`crl.pem`): made by who has the CA's key, kept by every node beside its certificate.
//!
//! A list is cumulative: each new one names all that were revoked before. It is a file like the others of the pki directory, read
//! anew for each connection; there is no service to ask. A node without the file knows of no revocation; a node with one
//! accepts nobody whose CA has no list in it, and nobody at all once the list has expired: no answer is not a good answer.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, Result, bail, ensure};
use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevocationReason, RevokedCertParams,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{parse_x509_certificate, parse_x509_crl};

use super::cert::{CA_CERT, CA_KEY, Pair, Validity, moment, write_all};

/// The list of revoked certificates; where there is none, none is revoked.
pub const CRL: &str = "crl.pem";
/// Beside the CA: what it has issued, `NAME-SERIAL.pem`, to be able to revoke the certificate of a node that is gone.
pub const ISSUED: &str = "issued";

/// A certificate's serial number, big endian.
type Serial = Vec<u8>;

/// The lists in a PEM text.
pub fn lists(pem: &str) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let found: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .context("the list of revoked certificates")?;
    // an empty file is a copy that failed, and must not pass for "nobody is revoked"
    ensure!(!found.is_empty(), "no list of revoked certificates in it");
    Ok(found)
}

fn serial_of(certificate: &CertificateDer<'_>) -> Result<Serial> {
    let (_, parsed) = parse_x509_certificate(certificate).context("a certificate")?;
    Ok(parsed.raw_serial().to_vec())
}

/// Whether a list names this certificate. Only for telling a person: the handshake does not ask this.
pub fn names(crl: &str, certificate: &CertificateDer<'_>) -> Result<bool> {
    let (_, certificate) = parse_x509_certificate(certificate).context("a certificate")?;
    for list in lists(crl)? {
        let (_, list) = parse_x509_crl(&list).context("the list of revoked certificates")?;
        let mut revoked = list.iter_revoked_certificates();
        if list.issuer() == certificate.issuer() && revoked.any(|r| *r.serial() == certificate.serial) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A new list of `ca`: everything that `before` (an earlier list of it) names, and these certificates.
pub fn revoke(ca: &Pair, before: Option<&str>, serials: &[Serial], validity: Validity) -> Result<String> {
    let now = moment(SystemTime::now())?;
    let entry = |serial: Serial, at| RevokedCertParams {
        serial_number: SerialNumber::from(serial),
        revocation_time: at,
        reason_code: Some(RevocationReason::Unspecified),
        invalidity_date: None,
    };
    let (mut revoked, mut number) = (Vec::new(), 0);
    if let Some(pem) = before {
        let lists = lists(pem)?;
        let [list] = &lists[..] else { bail!("it holds lists of {} CAs, and not of one", lists.len()) };
        let (_, list) = parse_x509_crl(list).context("the list of revoked certificates")?;
        let der = CertificateDer::from_pem_slice(ca.cert.as_bytes()).context("the CA's certificate")?;
        let (_, issuer) = parse_x509_certificate(&der).context("the CA's certificate")?;
        ensure!(
            list.verify_signature(issuer.public_key()).is_ok(),
            "the list that is there is not of this CA"
        );
        number = list.crl_number().and_then(|n| n.to_u64_digits().first().copied()).unwrap_or(0);
        for r in list.iter_revoked_certificates() {
            let at = std::time::UNIX_EPOCH
                + std::time::Duration::from_secs(u64::try_from(r.revocation_date.timestamp()).unwrap_or(0));
            revoked.push(entry(r.raw_serial().to_vec(), moment(at)?));
        }
    }
    for serial in serials {
        if !revoked.iter().any(|r| r.serial_number.as_ref() == serial) {
            revoked.push(entry(serial.clone(), now));
        }
    }
    let params = CertificateRevocationListParams {
        this_update: moment(validity.from)?,
        next_update: moment(validity.until)?,
        crl_number: SerialNumber::from(number + 1),
        issuing_distribution_point: None,
        revoked_certs: revoked,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let key = KeyPair::from_pem(&ca.key).context("the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&ca.cert, key).context("the CA's certificate")?;
    Ok(params.signed_by(&issuer).context("signing the list")?.pem()?)
}

/// What is to be revoked.
#[derive(Clone, Debug)]
pub enum Which {
    /// Every certificate that was issued to a node of this name so far.
    Node(String),
    /// The one in this file.
    File(PathBuf),
}

/// Revokes with the CA in `ca_dir`, whose `crl.pem` is replaced; returns that file and how many certificates were revoked by this call.
///
/// # Errors
/// No certificate of that name was issued here, the file holds none of this CA, or the CA's files cannot be read.
pub fn write_revoked(ca_dir: &Path, which: &Which, validity: Validity) -> Result<(PathBuf, usize)> {
    let read = |file: &str| {
        let path = ca_dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("{}: is the CA there?", path.display()))
    };
    let ca = Pair { cert: read(CA_CERT)?, key: read(CA_KEY)? };
    let certificates = match which {
        Which::Node(name) => issued_to(ca_dir, name)?,
        Which::File(path) => {
            vec![CertificateDer::from_pem_file(path).with_context(|| path.display().to_string())?]
        }
    };
    let ca_der = CertificateDer::from_pem_slice(ca.cert.as_bytes()).context("the CA's certificate")?;
    let (_, issuer) = parse_x509_certificate(&ca_der).context("the CA's certificate")?;
    for certificate in &certificates {
        let (_, parsed) = parse_x509_certificate(certificate).context("a certificate")?;
        let ours = parsed.verify_signature(Some(issuer.public_key())).is_ok();
        ensure!(ours, "the certificate of {} is not of the CA in {}", parsed.subject(), ca_dir.display());
    }
    let serials = certificates.iter().map(serial_of).collect::<Result<Vec<_>>>()?;
    let before = match fs::read_to_string(ca_dir.join(CRL)) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(e).with_context(|| ca_dir.join(CRL).display().to_string()),
    };
    let list = revoke(&ca, before.as_deref(), &serials, validity)
        .with_context(|| ca_dir.join(CRL).display().to_string())?;
    let mut new = certificates.len();
    if let Some(before) = &before {
        new -= certificates.iter().filter(|c| names(before, c).unwrap_or(false)).count();
    }
    let written = write_all(ca_dir, &[(CRL, &list)])?;
    Ok((written.into_iter().next().context("nothing was written")?, new))
}

/// Keeps a copy of a certificate beside its CA.
pub fn keep_issued(ca_dir: &Path, name: &str, pem: &str) -> Result<()> {
    let serial = serial_of(&CertificateDer::from_pem_slice(pem.as_bytes())?)?;
    let hex: String = serial.iter().map(|b| format!("{b:02x}")).collect();
    write_all(&ca_dir.join(ISSUED), &[(&format!("{name}-{hex}.pem"), pem)]).map(drop)
}

fn issued_to(ca_dir: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>> {
    let dir = ca_dir.join(ISSUED);
    let mut found = Vec::new();
    for file in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = file?.path();
        // by what is in it: a node's name may have dashes like a file's
        let Ok(certificate) = CertificateDer::from_pem_file(&path) else { continue };
        if super::config::peer_name(std::slice::from_ref(&certificate)).is_ok_and(|n| n == name) {
            found.push(certificate);
        }
    }
    ensure!(
        !found.is_empty(),
        "no certificate of {name} in {}: name its file with --cert, if you have it",
        dir.display()
    );
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::cert::{NODE_CERT, write_ca, write_node};

    #[test]
    fn a_list_grows_and_names_what_it_should() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, days) = (dir.path().join("ca"), Validity::days(2));
        write_ca(&ca, "ca", days, false).unwrap();
        let make = |name: &str| {
            let at = dir.path().join(name);
            write_node(&ca, &at, name, &[], days, true).unwrap();
            CertificateDer::from_pem_file(at.join(NODE_CERT)).unwrap()
        };
        // two of one node, one of another whose name begins alike
        let (a1, a2, ab) = (make("a"), make("a"), make("a-b"));
        let (file, new) = write_revoked(&ca, &Which::Node("a".into()), days).unwrap();
        assert_eq!(new, 2);
        let list = || fs::read_to_string(&file).unwrap();
        let said = [&a1, &a2, &ab].map(|c| names(&list(), c).unwrap());
        assert_eq!(said, [true, true, false]);
        // again: nothing new, nothing lost, a higher number
        let (_, new) = write_revoked(&ca, &Which::Node("a".into()), days).unwrap();
        assert_eq!(new, 0);
        let by_file = Which::File(dir.path().join("a-b").join(NODE_CERT));
        assert_eq!(write_revoked(&ca, &by_file, days).unwrap().1, 1);
        assert!([&a1, &a2, &ab].iter().all(|c| names(&list(), c).unwrap()));
        let der = lists(&list()).unwrap().remove(0);
        let parsed = parse_x509_crl(&der).unwrap().1;
        assert_eq!(parsed.crl_number().unwrap().to_u64_digits(), [3]);
        assert_eq!(parsed.iter_revoked_certificates().count(), 3);
        // what is made from now on is good, and the node gets the list
        let a3 = make("a");
        assert!(!names(&list(), &a3).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("a").join(CRL)).unwrap(), list());
        assert!(write_revoked(&ca, &Which::Node("nobody".into()), days).is_err());
    }

    #[test]
    fn certificates_of_another_ca_cannot_be_revoked_and_an_empty_list_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs, days) = (dir.path().join("ours"), dir.path().join("theirs"), Validity::days(2));
        write_ca(&ours, "ca", days, false).unwrap();
        write_ca(&theirs, "ca", days, false).unwrap();
        write_node(&theirs, &dir.path().join("a"), "a", &[], days, false).unwrap();
        let which = Which::File(dir.path().join("a").join(NODE_CERT));
        let error = write_revoked(&ours, &which, days).unwrap_err();
        assert!(error.to_string().contains("is not of the CA"), "{error:#}");
        assert!(!ours.join(CRL).exists());
        assert!(lists("").is_err());
    }
}
