//! Certificates and mutual TLS 1.3 between nodes.
//!
//! | file | what lives there |
//! |---|---|
//! | [`cert`] | making a CA and the nodes' certificates |
//! | [`revocation`] | the list of those that are no longer good |
//! | [`config`] | rustls configurations of a node, read from disk at each use; who the peer is |
//! | [`peek`] | what a fresh connection wants (ALPN, SNI), without taking a byte from it |
//!
//! Sockets and messages are not here: the agent's are in [`crate::agent`], the shims' in [`crate::migrate`].

pub mod cert;
pub mod config;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod peek;
pub mod revocation;

pub use crate::migrate::protocol::{ALPN_CONTROL, ALPN_DATA, migration_of, server_name as migration_name};

/// Whether two secrets are the same, without telling by its time where they differ. An empty one is none.
pub fn same_secret(a: &[u8], b: &[u8]) -> bool {
    use subtle::ConstantTimeEq;
    !a.is_empty() && bool::from(a.ct_eq(b))
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
    fn secrets_differ() {
        let (a, b) = (random_hex(16).unwrap(), random_hex(16).unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 32);
        assert!(same_secret(a.as_bytes(), a.as_bytes()) && !same_secret(a.as_bytes(), b.as_bytes()));
        assert!(!same_secret(b"", b"") && !same_secret(b"ab", b"a"));
        assert_eq!(migration_of(&migration_name(&a)), Some(a.as_str()));
    }
}
