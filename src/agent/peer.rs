//! Dialling another node's agent.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{
    api::{ErrorReport, ExitCode},
    config::DEFAULT_PORT,
    destination::hello,
    layer::name,
    link::{Link, MAX_MESSAGE},
    message::{Hello, Message, MoveAsked, Refusal, VERSIONS},
    tickets,
};
use crate::{
    migrate::protocol::select,
    tls::{
        ALPN_CONTROL,
        config::{Pki, peer_name, server_name, trust_problem},
    },
};

/// How long the other side may take for a TCP connection, for the TLS handshake, and for its hello.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to say whether the container may come: it looks at its configuration and its tickets only.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// A peer that has been reached and is who it says.
#[derive(Debug)]
pub struct Peer {
    /// The connection.
    pub link: Link,
    /// The node's name, as in its certificate.
    pub name: String,
    /// Where it was reached.
    pub address: SocketAddr,
}

/// Splits `HOST[:PORT]`; IPv6 addresses may stand in brackets, and must where a port follows.
///
/// # Errors
/// No host, or no port number.
pub fn host_and_port(to: &str) -> Result<(String, u16)> {
    if to.parse::<IpAddr>().is_ok() {
        return Ok((to.into(), DEFAULT_PORT));
    }
    let (host, port) = match to.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').unwrap_or(rest))),
        None => match to.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (to, None),
        },
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port.parse().with_context(|| format!("{to:?}: {port:?} is no port"))?,
    };
    server_name(host).with_context(|| format!("{to:?}"))?;
    Ok((host.into(), port))
}

/// [`dial_to_move`], to ask something.
///
/// # Errors
/// As that.
pub async fn dial(to: &str, pki: &Pki, node: &str, silence: Duration) -> Result<Peer, ErrorReport> {
    dial_to_move(to, pki, node, silence, None).await
}

/// Dials, authenticates both sides, agrees on a version; and is let in with what is to be moved, if that is said.
///
/// # Errors
/// With the exit code that fits: [`ExitCode::Usage`], `Unreachable`, `Untrusted`, `Refused`.
pub async fn dial_to_move(
    to: &str,
    pki: &Pki,
    node: &str,
    silence: Duration,
    moving: Option<MoveAsked>,
) -> Result<Peer, ErrorReport> {
    let (host, port) =
        host_and_port(to).map_err(|e| ErrorReport::new(ExitCode::Usage, format!("--to {e:#}")))?;
    let unreachable = |what: String| {
        ErrorReport::new(ExitCode::Unreachable, format!("{host}:{port}: {what}"))
            .advice("does `transship agent` run there, and is its port open?")
    };
    let config = pki.client(ALPN_CONTROL, None);
    let config = config.map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{e:#}")))?;
    let (stream, address) = connect(&host, port).await.map_err(|e| unreachable(format!("{e:#}")))?;
    let name_asked = server_name(&host).map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{e:#}")))?;
    let handshake = TlsConnector::from(config).connect(name_asked, stream);
    let stream = match timeout(HANDSHAKE_LIMIT, handshake).await {
        Err(_) => return Err(unreachable("no TLS handshake within 5 s".into())),
        Ok(Err(error)) => {
            return Err(untrusted(&error.into(), to).unwrap_or_else(&unreachable));
        }
        Ok(Ok(stream)) => stream,
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or(&[]);
    let name = peer_name(chain).map_err(|e| ErrorReport::new(ExitCode::Untrusted, format!("{to}: {e:#}")))?;
    if moving.is_some() && name == node {
        let error = ErrorReport::new(ExitCode::Usage, format!("{to} is this node"));
        return Err(error.advice("name another node by --to"));
    }
    if let Some(wrong) = moving.as_ref().and_then(|m| not_for(&m.ticket, &name)) {
        return Err(wrong);
    }
    let mut link = Link::new(stream, silence);
    let greeted = async {
        link.say(Message::Hello(Hello { moving, ..hello(node) })).await?;
        link.hear().await
    };
    let greeted = timeout(GREETING_LIMIT, greeted).await;
    let greeted = greeted.unwrap_or_else(|_| anyhow::bail!("no hello within {} s", GREETING_LIMIT.as_secs()));
    // a server that does not accept our certificate says so only after our side of the handshake
    let theirs = match greeted {
        Ok(Message::Hello(theirs)) => theirs,
        Ok(Message::Refused(refusal)) => return Err(refused(&name, refusal)),
        Ok(other) => return Err(unreachable(format!("it answered {}", self::name(&other)))),
        Err(error) => return Err(untrusted(&error, to).unwrap_or_else(&unreachable)),
    };
    select(VERSIONS, (theirs.oldest, theirs.newest)).map_err(|message| {
        ErrorReport::new(ExitCode::Refused, message).advice("install the same version on both nodes")
    })?;
    link.allow(MAX_MESSAGE);
    Ok(Peer { link, name, address })
}

/// The destination does not want the container.
pub fn refused(peer: &str, refusal: Refusal) -> ErrorReport {
    let mut error = ErrorReport::new(ExitCode::Refused, format!("{peer} refused: {}", refusal.message))
        .advice(refusal.advice);
    error.node = peer.into();
    error
}

/// A ticket that names another node than the one that was reached is not shown to it.
fn not_for(ticket: &str, peer: &str) -> Option<ErrorReport> {
    let error = |message: String| {
        ErrorReport::new(ExitCode::Usage, message)
            .advice("a ticket is what `transship ticket` printed on the node that the container is moved to")
    };
    match tickets::destination_of(ticket) {
        _ if ticket.is_empty() => None,
        None => Some(error("--ticket: that is no ticket".into())),
        Some(node) if node != peer => {
            Some(error(format!("--ticket: this ticket is for a move to {node}, and this is {peer}")))
        }
        Some(_) => None,
    }
}

/// Connects to the first address of a host that answers.
async fn connect(host: &str, port: u16) -> Result<(TcpStream, SocketAddr)> {
    let mut last = anyhow::anyhow!("the name has no address");
    for address in lookup_host((host, port)).await.context("looking up the name")? {
        match tcp(address).await {
            Ok(stream) => return Ok((stream, address)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A TCP connection for either protocol.
pub async fn tcp(address: SocketAddr) -> Result<TcpStream> {
    let stream = timeout(HANDSHAKE_LIMIT, TcpStream::connect(address)).await;
    let stream = stream.context("no answer within 5 s")?.context("connecting")?;
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    Ok(stream)
}

/// An error about certificates as such; anything else as its text.
fn untrusted(error: &anyhow::Error, to: &str) -> Result<ErrorReport, String> {
    if tls_in(error, |e| {
        matches!(e, rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol))
            .then_some(())
    })
    .is_some()
    {
        let message = format!("{to}: it speaks another protocol than this node's {VERSIONS:?}");
        return Ok(ErrorReport::new(ExitCode::Refused, message)
            .advice("install the same version of transship on both nodes"));
    }
    match trust_in(error) {
        Some(problem) => Ok(ErrorReport::new(ExitCode::Untrusted, format!("{to}: {problem}")).advice(
            "make both nodes' certificates with the same CA (transship cert node), naming every address",
        )),
        None => Err(format!("{error:#}")),
    }
}

/// What an error says about trust, if a TLS error about it is among its causes.
pub fn trust_in(error: &anyhow::Error) -> Option<String> {
    tls_in(error, trust_problem)
}

/// What `look` finds in a TLS error among an error's causes.
fn tls_in<T>(error: &anyhow::Error, look: impl Fn(&rustls::Error) -> Option<T>) -> Option<T> {
    error.chain().find_map(|cause| {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref());
        let tls = inner.and_then(|e| e.downcast_ref::<rustls::Error>());
        tls.or_else(|| cause.downcast_ref()).and_then(&look)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_shown_to_its_own_node_only() {
        let ticket = format!("node-b:{}:{}", "0".repeat(16), "f".repeat(64));
        assert!(not_for("", "node-c").is_none() && not_for(&ticket, "node-b").is_none());
        let error = not_for(&ticket, "node-c").unwrap();
        assert!(error.message.contains("to node-b, and this is node-c"), "{error}");
        assert!(!error.message.contains("ffff"));
        assert_eq!(not_for("nonsense", "node-b").unwrap().code, ExitCode::Usage);
    }

    #[test]
    fn destinations() {
        for (to, host, port) in [
            ("node-b", "node-b", 7420),
            ("node-b:1", "node-b", 1),
            ("10.0.0.2", "10.0.0.2", 7420),
            ("10.0.0.2:99", "10.0.0.2", 99),
            ("fd00::2", "fd00::2", 7420),
            ("[fd00::2]", "fd00::2", 7420),
            ("[fd00::2]:5", "fd00::2", 5),
        ] {
            assert_eq!(host_and_port(to).unwrap(), (host.to_string(), port), "{to}");
        }
        for bad in ["", ":1", "node-b:x", "node b", "[fd00::2]x", "node-b:70000"] {
            assert!(host_and_port(bad).is_err(), "{bad:?}");
        }
    }
}
