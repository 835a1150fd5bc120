//! Certificates and mutual TLS 1.3 between nodes.
//!
//! | file | what lives there |
//! |---|---|
//! | [`cert`] | making a CA and the nodes' certificates |
//! | [`config`] | rustls configurations of a node, read from disk at each use; who the peer is |
//! | [`peek`] | what a fresh connection wants (ALPN, SNI), without taking a byte from it |
//!
//! Sockets and messages are not here: the agent's are in [`crate::agent`], the shims' in [`crate::migrate`].

pub mod cert;
pub mod config;
pub mod peek;

/// ALPN of a connection between two agents.
pub const ALPN_CONTROL: &[u8] = b"transship-control/1";

/// ALPN of a connection between two shims.
pub const ALPN_DATA: &[u8] = b"transship-data/1";

/// What follows the migration's id in the server name of a data connection.
pub const MIGRATION_SUFFIX: &str = ".migration.transship";

/// The server name (SNI) that a shim asks for on a data connection; the agent finds the destination's shim by it.
pub fn migration_name(migration: &str) -> String {
    format!("{migration}{MIGRATION_SUFFIX}")
}

/// The migration's id in a server name, if it is one.
pub fn migration_of(name: &str) -> Option<&str> {
    let id = name.strip_suffix(MIGRATION_SUFFIX)?;
    (!id.is_empty() && id.len() <= 63 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
}

/// Fills a buffer with random bytes fit for secrets.
///
/// # Errors
/// The system's random source does not answer.
pub fn random(buffer: &mut [u8]) -> anyhow::Result<()> {
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(buffer).map_err(|_| anyhow::anyhow!("the system's random source failed"))
}

/// `bytes` random bytes in hexadecimal.
///
/// # Errors
/// As [`random`].
pub fn random_hex(bytes: usize) -> anyhow::Result<String> {
    let mut buffer = vec![0; bytes];
    random(&mut buffer)?;
    Ok(buffer.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migration_names() {
        assert_eq!(migration_of(&migration_name("00ff")), Some("00ff"));
        for bad in ["", ".migration.transship", "a/b.migration.transship", "x.migration.transship", "node-a"]
        {
            assert_eq!(migration_of(bad), None, "{bad}");
        }
        assert_ne!(random_hex(16).unwrap(), random_hex(16).unwrap());
    }
}
