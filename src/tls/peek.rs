//! What a fresh connection wants, without taking a byte from it.
//!
//! One port serves agents and shims. The agent peeks (`MSG_PEEK`) at the ClientHello, and hands a connection that asks for
//! the shims' protocol to the shim with the handshake still to be made. Nothing here is authenticated: it only tells
//! who has to do the handshake.

use std::{io, time::Duration};

use anyhow::{Result, bail, ensure};
use rustls::server::Acceptor;
use tokio::{net::TcpStream, time::timeout};

/// The largest ClientHello that is looked at, in bytes.
pub const MAX_HELLO: usize = 16 << 10;

/// What a ClientHello says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Protocols it offers, at most four.
    pub alpn: Vec<Vec<u8>>,
    /// The server name it asks for.
    pub sni: Option<String>,
}

impl Hello {
    /// Does it offer this protocol?
    pub fn speaks(&self, alpn: &[u8]) -> bool {
        self.alpn.iter().any(|p| p == alpn)
    }
}

/// Reads a ClientHello from a copy of a connection's first bytes; `None`: more bytes are needed.
///
/// # Errors
/// It is no ClientHello of TLS, or longer than [`MAX_HELLO`].
pub fn parse(bytes: &[u8]) -> Result<Option<Hello>> {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => bail!("no ClientHello: {error}"),
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let alpn = hello.alpn().map(|p| p.take(4).map(<[u8]>::to_vec).collect());
                return Ok(Some(Hello {
                    alpn: alpn.unwrap_or_default(),
                    sni: hello.server_name().map(str::to_string),
                }));
            }
            Ok(None) => {}
            Err((error, _)) => bail!("no ClientHello: {error}"),
        }
    }
    ensure!(bytes.len() < MAX_HELLO, "no ClientHello in the first {MAX_HELLO} bytes");
    Ok(None)
}

/// Peeks until the ClientHello is complete; what was sent stays in the socket.
///
/// # Errors
/// The peer closed, sent something else, or did not finish within `limit`.
pub async fn peek(stream: &TcpStream, limit: Duration) -> Result<Hello> {
    match timeout(limit, peek_forever(stream)).await {
        Ok(result) => result,
        Err(_) => bail!("no ClientHello within {} s", limit.as_secs_f32()),
    }
}

async fn peek_forever(stream: &TcpStream) -> Result<Hello> {
    let mut buffer = Vec::new();
    let mut seen = 0;
    let mut pause = Duration::from_millis(1);
    loop {
        stream.readable().await?;
        // who has sent nothing costs nothing
        buffer.resize(MAX_HELLO, 0);
        let length = stream.peek(&mut buffer).await?;
        ensure!(length > 0, io::Error::from(io::ErrorKind::UnexpectedEof));
        if length > seen {
            seen = length;
            if let Some(hello) = parse(&buffer[..length])? {
                return Ok(hello);
            }
        }
        // The bytes that are there make the socket readable for good, so it cannot tell of more. The pauses grow whatever comes:
        // a peer that sends byte by byte is not looked at for each of them, and costs some dozens of looks in all.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::tls::{ALPN_CONTROL, ALPN_DATA, config::server_name, migration_name, migration_of};

    fn client_hello(alpn: &[u8], name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let mut connection = ClientConnection::new(Arc::new(config), server_name(name).unwrap()).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn real_hellos() {
        let bytes = client_hello(ALPN_DATA, &migration_name("00ff"));
        let hello = parse(&bytes).unwrap().unwrap();
        assert!(hello.speaks(ALPN_DATA) && !hello.speaks(ALPN_CONTROL));
        assert_eq!(migration_of(hello.sni.as_deref().unwrap()), Some("00ff"));
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]).unwrap(), None, "at {cut}");
        }
        let hello = parse(&client_hello(ALPN_CONTROL, "10.0.0.1")).unwrap().unwrap();
        assert_eq!((hello.speaks(ALPN_CONTROL), hello.sni), (true, None));
    }

    #[test]
    fn anything_else_is_refused() {
        assert!(parse(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").is_err());
        assert!(parse(&[0xff; 64]).is_err());
        // a record that promises more than ever comes
        let mut endless = vec![0x16, 3, 1, 0x40, 0];
        endless.extend([1, 0, 0xff, 0xff]);
        endless.resize(MAX_HELLO, 0);
        assert!(parse(&endless).is_err());
    }

    #[tokio::test]
    async fn peeking_leaves_the_bytes_there() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let bytes = client_hello(ALPN_DATA, &migration_name("00ff"));
        let (first, second) = bytes.split_at(20);
        client.write_all(first).await.unwrap();
        let peeked = tokio::spawn(async move {
            let hello = peek(&server, Duration::from_secs(5)).await;
            let mut all = vec![0; 4096];
            let length = server.read(&mut all).await.unwrap();
            all.truncate(length);
            (hello, all)
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        client.write_all(second).await.unwrap();
        let (hello, all) = peeked.await.unwrap();
        assert!(hello.unwrap().speaks(ALPN_DATA));
        assert_eq!(all, bytes);
    }

    #[tokio::test]
    async fn a_silent_peer_is_given_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let error = peek(&server, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("within"), "{error}");
    }
}
