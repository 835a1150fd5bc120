//! `transship cert`: the CA, the nodes' certificates, and the list of those that are no longer good. What is in them is
//! [`crate::tls::cert`]'s and [`crate::tls::revocation`]'s matter.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::Answer;
use crate::agent::api::{ErrorReport, ExitCode};
use crate::tls::cert::{Validity, write_ca, write_node};
use crate::tls::revocation::{Which, write_revoked};

/// Where the CA is kept unless told otherwise: apart from the nodes' own files, because its key leaves this machine never.
const CA_DIR: &str = "/etc/transship/ca";

/// Make the CA and the nodes' certificates, and revoke them.
///
/// Nodes accept each other when their certificates are of the same CA. Make the CA once, on a machine that you trust; its key
/// (ca.key) is not needed on the nodes.
#[derive(Args, Debug, Clone)]
pub struct Cert {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug, Clone)]
enum What {
    /// Make the CA: ca.pem and ca.key
    Ca(Ca),
    /// Make a node's certificate: node.pem, node.key and a copy of ca.pem
    Node(Node),
    /// Revoke certificates: crl.pem, for every node's pki directory
    Revoke(Revoke),
}

#[derive(Args, Debug, Clone)]
struct Ca {
    /// Where to put it
    #[arg(long, value_name = "DIR", default_value = CA_DIR)]
    dir: PathBuf,
    /// The CA's name
    #[arg(long, default_value = "transship")]
    name: String,
    /// Valid for so many days
    #[arg(long, default_value_t = 3650)]
    days: u32,
    /// Overwrite: every certificate of the old CA becomes worthless
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug, Clone)]
struct Node {
    /// The node's name: letters, digits, '-' and '.'
    name: String,
    /// A name or an address under which other nodes reach it (repeatable)
    #[arg(long = "address", value_name = "ADDRESS")]
    addresses: Vec<String>,
    /// Where the CA is
    #[arg(long, value_name = "DIR", default_value = CA_DIR)]
    ca: PathBuf,
    /// Where to put the files; on the node they belong into /etc/transship/pki
    #[arg(long, value_name = "DIR", default_value = crate::tls::config::DEFAULT_DIR)]
    dir: PathBuf,
    /// Valid for so many days
    #[arg(long, default_value_t = 825)]
    days: u32,
    /// Overwrite
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug, Clone)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["name", "cert"]))]
struct Revoke {
    /// Every certificate that this CA has issued to the node so far
    name: Option<String>,
    /// Only the certificate in this file
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Where the CA is
    #[arg(long, value_name = "DIR", default_value = CA_DIR)]
    ca: PathBuf,
    /// The list holds for so many days; with an older one nodes accept nobody
    #[arg(long, default_value_t = 3650)]
    days: u32,
}

impl Revoke {
    fn run(&self) -> Result<Answer, ErrorReport> {
        let which = match (&self.cert, &self.name) {
            (Some(file), _) => Which::File(file.clone()),
            (None, name) => Which::Node(name.clone().unwrap_or_default()),
        };
        let (file, new) = write_revoked(&self.ca, &which, Validity::days(self.days))
            .map_err(|e| ErrorReport::new(ExitCode::Failed, format!("{e:#}")))?;
        let text = format!(
            "{}\n{new} revoked; copy this file into /etc/transship/pki of every node: it counts from the next connection on",
            file.display()
        );
        Ok(Answer::new(json!({ "files": [file], "revoked": new }), text))
    }
}

impl Cert {
    /// Runs it.
    pub fn run(&self) -> Result<Answer, ErrorReport> {
        let (files, next) = match &self.what {
            What::Ca(ca) => (
                write_ca(&ca.dir, &ca.name, Validity::days(ca.days), ca.force),
                "next, for each node: transship cert node NAME --address ADDRESS --dir DIR",
            ),
            What::Node(node) => (
                write_node(
                    &node.ca,
                    &node.dir,
                    &node.name,
                    &node.addresses,
                    Validity::days(node.days),
                    node.force,
                ),
                "on the node these files belong into /etc/transship/pki",
            ),
            What::Revoke(revoke) => return revoke.run(),
        };
        let files = files.map_err(|e| ErrorReport::new(ExitCode::Failed, format!("{e:#}")))?;
        let mut text = String::new();
        for file in &files {
            text.push_str(&format!("{}\n", file.display()));
        }
        text.push_str(next);
        Ok(Answer::new(json!({ "files": files }), text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        cert: Cert,
    }

    #[test]
    fn a_ca_then_a_node_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let run = |args: &[&str]| Only::parse_from([&["cert"], args].concat()).cert.run();
        let (ca, node) = (path("ca"), path("node"));
        run(&["node", "a", "--ca", &ca, "--dir", &node]).unwrap_err();
        run(&["ca", "--dir", &ca]).unwrap();
        assert_eq!(run(&["ca", "--dir", &ca]).unwrap_err().code, ExitCode::Failed);
        let made = run(&["node", "a", "--ca", &ca, "--dir", &node, "--address", "10.0.0.1"]).unwrap();
        assert_eq!(made.fields["files"].as_array().unwrap().len(), 3);
        run(&["node", "a", "--ca", &ca, "--dir", &node]).unwrap_err();
        run(&["node", "a", "--ca", &ca, "--dir", &node, "--force"]).unwrap();
        // both that were made, and then none
        assert_eq!(run(&["revoke", "a", "--ca", &ca]).unwrap().fields["revoked"], 2);
        let cert = path("node/node.pem");
        assert_eq!(run(&["revoke", "--cert", &cert, "--ca", &ca]).unwrap().fields["revoked"], 0);
        run(&["revoke", "b", "--ca", &ca]).unwrap_err();
        assert!(Only::try_parse_from(["cert", "revoke"]).is_err());
        assert!(Only::try_parse_from(["cert", "revoke", "a", "--cert", &cert]).is_err());
    }
}
