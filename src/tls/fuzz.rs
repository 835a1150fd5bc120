//! The fuzz target of the first bytes of a connection, of which nothing is known yet: see [`crate::fuzz`].

/// A ClientHello, whole and cut.
pub mod tls_hello {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::super::{ALPN_CONTROL, ALPN_DATA, config::server_name, migration_name, migration_of, peek};
    use crate::fuzz::Input;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let cut = input.take(2).iter().fold(0, |n, b| n << 8 | usize::from(*b));
        let bytes = input.rest();
        let whole = peek::parse(bytes);
        let part = peek::parse(&bytes[..cut.min(bytes.len())]);
        match (whole, part) {
            // what is a ClientHello is none less because its end is missing
            (Ok(Some(whole)), part) => {
                let part = part.expect("the beginning of a ClientHello");
                assert!(part.is_none_or(|part| part == whole));
                assert!(whole.alpn.len() <= 4);
                whole.sni.as_deref().and_then(migration_of);
            }
            (Ok(None), part) => assert!(part.is_ok_and(|p| p.is_none())),
            (Err(_), _) => {}
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let hello = |alpn: &[u8], name: &str| {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("TLS 1.3")
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth();
            config.alpn_protocols = vec![alpn.to_vec()];
            let name = server_name(name).expect("a name");
            let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
            let mut out = vec![0, 40];
            client.write_tls(&mut out).expect("memory");
            out
        };
        vec![hello(ALPN_DATA, &migration_name("m-1")), hello(ALPN_CONTROL, "b")]
    }
}
