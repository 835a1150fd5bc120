//! This node as transship sees it: the agent's configuration, whether it answers, its certificates, who may move containers here, the
//! bridge.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::parse_x509_certificate;

use super::Finding;
use crate::agent::admission;
use crate::agent::api::{Client, Reply, Request};
use crate::agent::config::Config;
use crate::tls::cert::{CA_CERT, NODE_CERT, NODE_KEY};
use crate::tls::revocation;

/// Warn this long before a certificate ends, in days.
const SOON: i64 = 30;

/// What [`gather`] saw.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The configuration; the default when it cannot be read.
    pub config: Config,
    /// Why the configuration could not be read.
    pub config_error: Option<String>,
    /// The agent's name and version, or why it does not answer.
    pub agent: Result<String, String>,
    /// The node's certificate and the CA's.
    pub certificates: Result<Certificates, String>,
    /// The configured bridge exists.
    pub bridge: Option<Result<(), String>>,
}

/// What the pki directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// Where.
    pub dir: PathBuf,
    /// The node's name in its certificate.
    pub name: String,
    /// Days until the first of node's and CA's certificate ends; negative when one has ended.
    pub days_left: i64,
    /// Days until both are valid; 0 when they are.
    pub days_early: i64,
    /// The key can be read by others than its owner.
    pub key_exposed: bool,
    /// The node's certificate is on the list of revoked ones that lies beside it.
    pub revoked: bool,
}

/// Reads the configuration and asks around; `socket` overrides the configuration's.
pub fn gather(config: &Path, socket: Option<&Path>) -> Facts {
    let (config, config_error) = match Config::load(config) {
        Ok(config) => (config, None),
        Err(e) => (Config::default(), Some(format!("{e:#}"))),
    };
    let agent = ask_agent(socket.unwrap_or(&config.socket));
    let certificates = read_certificates(&config.pki).map_err(|e| format!("{e:#}"));
    let bridge = config.bridge.as_deref().map(find_bridge);
    Facts { config, config_error, agent, certificates, bridge }
}

fn ask_agent(socket: &Path) -> Result<String, String> {
    let client = Client::connect(socket).map_err(|e| e.message)?;
    match client.call(&Request::Version, |_| {}) {
        Ok(Reply::Version(v)) => Ok(format!("{} as {} ({})", v.agent, v.node, socket.display())),
        Ok(_) => Err("answers something else".into()),
        Err(e) => Err(e.message),
    }
}

/// Asks the kernel and not /sys, which shows the network namespace that it was mounted from.
fn find_bridge(name: &str) -> Result<(), String> {
    if nix::net::if_::if_nametoindex(name).is_err() {
        return Err(format!("there is no link {name}"));
    }
    match driver_of(name) {
        Ok(driver) if driver == "bridge" => Ok(()),
        Ok(driver) => Err(format!("{name} is no bridge but {driver}")),
        Err(e) => Err(format!("{name} is no bridge ({e})")),
    }
}

/// The driver's name that the link gives to ethtool.
fn driver_of(name: &str) -> std::io::Result<String> {
    // linux/ethtool.h: struct ethtool_drvinfo is 196 bytes, `cmd` first and then `driver`.
    const ETHTOOL_GDRVINFO: u32 = 3;
    #[repr(C, align(4))]
    struct Info([u8; 196]);
    let mut info = Info([0; 196]);
    info.0[..4].copy_from_slice(&ETHTOOL_GDRVINFO.to_ne_bytes());
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0: longer names are no links.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = info.0.as_mut_ptr().cast();
    // SAFETY: the request points at a structure of the size that the command fills in, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let driver = &info.0[4..36];
    let end = driver.iter().position(|b| *b == 0).unwrap_or(driver.len());
    Ok(String::from_utf8_lossy(&driver[..end]).into_owned())
}

fn read_certificates(dir: &Path) -> Result<Certificates> {
    use std::os::unix::fs::PermissionsExt;
    let read = |file: &str| {
        CertificateDer::from_pem_file(dir.join(file))
            .with_context(|| format!("{}: make it with `transship cert`", dir.join(file).display()))
    };
    let (ca, der) = (read(CA_CERT)?, read(NODE_CERT)?);
    // Does the key belong to the certificate? rustls refuses it otherwise.
    let pki = crate::tls::config::Pki::new(dir);
    pki.server(&[])?;
    let (_, ca) = parse_x509_certificate(&ca).context("the CA's certificate")?;
    let (_, node) = parse_x509_certificate(&der).context("the node's certificate")?;
    let revoked = match pki.material()?.crl {
        Some(list) => revocation::names(&list, &der)?,
        None => false,
    };
    // By name and key identifier; that the signature is right is for rustls to say when a peer connects.
    ensure!(node.issuer() == ca.subject(), "node.pem was not issued by the CA in ca.pem ({})", ca.subject());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let day = 86400;
    let left = |c: &x509_parser::certificate::X509Certificate<'_>| {
        (c.validity().not_after.timestamp() - now).div_euclid(day)
    };
    let early = |c: &x509_parser::certificate::X509Certificate<'_>| {
        (c.validity().not_before.timestamp() - now + day - 1).div_euclid(day).max(0)
    };
    let key = dir.join(NODE_KEY);
    let mode = std::fs::metadata(&key).with_context(|| key.display().to_string())?.permissions().mode();
    Ok(Certificates {
        dir: dir.into(),
        name: pki.node_name()?,
        days_left: left(&ca).min(left(&node)),
        days_early: early(&ca).max(early(&node)),
        key_exposed: mode & 0o077 != 0,
        revoked,
    })
}

/// The rules.
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    let mut out = Vec::new();
    if let Some(e) = &facts.config_error {
        out.push(Finding::fail("configuration", e.clone(), "correct it: the agent does not start with it"));
    }
    out.push(match &facts.certificates {
        Ok(c) => judge_certificates(c),
        Err(e) => Finding::fail(
            "certificates",
            e.clone(),
            format!(
                "once for all nodes: transship cert ca; for each node: transship cert node NAME --address ADDRESS; then copy \
                 {CA_CERT}, {NODE_CERT} and {NODE_KEY} into the node's pki directory"
            ),
        ),
    });
    out.push(match admission::in_words(&facts.config) {
        (policy, false) => Finding::ok("arrivals", policy),
        (policy, true) => Finding::warn(
            "arrivals",
            policy,
            "whoever has one of these certificates can put containers on this node: name the nodes in accept_from",
        ),
    });
    out.push(match &facts.agent {
        Ok(who) => Finding::ok("agent", who.clone()),
        Err(e) => Finding::warn(
            "agent",
            e.clone(),
            "no migration from or to this node while it is not running: systemctl start transship-agent",
        ),
    });
    out.push(match (&facts.bridge, &facts.config.bridge) {
        (Some(Ok(())), Some(name)) => Finding::ok("bridge", name.clone()),
        (Some(Err(e)), _) => Finding::fail(
            "bridge",
            e.clone(),
            "make it, or correct `bridge` in /etc/transship/agent.toml: containers with a network of their own are attached to it",
        ),
        _ => Finding::warn(
            "bridge",
            "none configured",
            "containers with a network namespace of their own cannot arrive here: set `bridge` in /etc/transship/agent.toml",
        ),
    });
    out
}

fn judge_certificates(c: &Certificates) -> Finding {
    let found = format!("{} in {}, {} days left", c.name, c.dir.display(), c.days_left);
    if c.days_left < 0 {
        Finding::fail(
            "certificates",
            found,
            "expired: transship cert node --force (or cert ca --force and all nodes)",
        )
    } else if c.revoked {
        Finding::fail(
            "certificates",
            format!("{} in {}: revoked", c.name, c.dir.display()),
            "make a new one: transship cert node --force",
        )
    } else if c.days_early > 0 {
        Finding::fail(
            "certificates",
            format!("{} in {}: valid in {} days only", c.name, c.dir.display(), c.days_early),
            "is this node's clock right?",
        )
    } else if c.key_exposed {
        Finding::warn(
            "certificates",
            format!("{found}; others can read the key"),
            format!("chmod 600 {}", c.dir.join(NODE_KEY).display()),
        )
    } else if c.days_left < SOON {
        Finding::warn("certificates", found, "make a new one soon: transship cert node --force")
    } else {
        Finding::ok("certificates", found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;
    use crate::tls::cert::{Validity, write_ca, write_node};

    fn certificates() -> Certificates {
        let dir = "/etc/transship/pki".into();
        Certificates {
            dir,
            name: "node-a".into(),
            days_left: 300,
            days_early: 0,
            key_exposed: false,
            revoked: false,
        }
    }

    #[test]
    fn certificates_are_judged_by_their_days_and_mode() {
        let level = |c: &Certificates| judge_certificates(c).level;
        let good = certificates();
        assert_eq!(level(&good), Level::Ok);
        assert_eq!(level(&Certificates { days_left: 3, ..good.clone() }), Level::Warn);
        assert_eq!(level(&Certificates { days_left: -1, ..good.clone() }), Level::Fail);
        assert_eq!(level(&Certificates { days_early: 1, ..good.clone() }), Level::Fail);
        assert_eq!(level(&Certificates { key_exposed: true, ..good.clone() }), Level::Warn);
        assert_eq!(level(&Certificates { revoked: true, ..good }), Level::Fail);
    }

    #[test]
    fn real_certificates_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, other, node) = (dir.path().join("ca"), dir.path().join("other"), dir.path().join("node"));
        write_ca(&ca, "us", Validity::days(365), false).unwrap();
        write_ca(&other, "them", Validity::days(365), false).unwrap();
        write_node(&ca, &node, "node-a", &[], Validity::days(90), false).unwrap();
        let read = read_certificates(&node).unwrap();
        assert_eq!((read.name.as_str(), read.days_early, read.key_exposed), ("node-a", 0, false));
        assert!((89..=90).contains(&read.days_left), "{}", read.days_left);
        let which = revocation::Which::Node("node-a".into());
        let (list, _) = revocation::write_revoked(&ca, &which, Validity::days(1)).unwrap();
        std::fs::copy(list, node.join(revocation::CRL)).unwrap();
        assert!(!read.revoked && read_certificates(&node).unwrap().revoked);
        std::fs::copy(other.join(CA_CERT), node.join(CA_CERT)).unwrap();
        assert!(format!("{:#}", read_certificates(&node).unwrap_err()).contains("not issued"));
    }

    #[test]
    fn what_is_no_bridge_is_told_apart() {
        assert!(find_bridge("no-such-link").unwrap_err().contains("no link"));
        assert!(find_bridge("lo").unwrap_err().contains("no bridge"));
    }

    #[test]
    fn a_bare_node_hears_what_to_do() {
        let facts = Facts {
            config: Config::default(),
            config_error: Some("x".into()),
            agent: Err("refused".into()),
            certificates: Err("missing".into()),
            bridge: None,
        };
        let out = verdict(&facts);
        let levels: Vec<_> = out.iter().map(|f| (f.check, f.level)).collect();
        assert_eq!(
            levels,
            [
                ("configuration", Level::Fail),
                ("certificates", Level::Fail),
                ("arrivals", Level::Ok),
                ("agent", Level::Warn),
                ("bridge", Level::Warn)
            ]
        );
        assert!(out.iter().all(|f| f.advice.is_some() || f.level == Level::Ok));
        let open = Facts { config: Config::parse("accept_from = ['*']").unwrap(), ..facts };
        let arrivals = verdict(&open).into_iter().find(|f| f.check == "arrivals").unwrap();
        assert_eq!(arrivals.level, Level::Warn);
    }
}
