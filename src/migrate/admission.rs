//! Who is at the other end of a connection that asks for a migration: the certificate must be the source's, and its first
//! message must show the migration's ticket. Until then nothing of the container is touched, and the connection costs a
//! bounded time ([`LIMIT`], however slowly its bytes come) and a few hundred kilobytes. Who is refused is told why, and the
//! shim goes on waiting for the right one: a stranger cannot use up a ticket.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::codec::Kind;
use super::destination::failure_of;
use super::protocol::{ALPN_DATA, Hello};
use super::report::Clock;
use super::wire::Wire;
use crate::control::ReceiveRequest;
use crate::tls;

/// From the first byte to the shown ticket.
pub const LIMIT: Duration = Duration::from_secs(10);

/// The source, and its hello.
pub struct Admitted {
    pub(super) wire: Wire,
    pub(super) hello: Hello,
    pub(super) clock: Clock,
}

/// Makes the handshake and looks at the ticket.
///
/// # Errors
/// It is not the source, or it did not show the ticket in time. It was told so.
pub fn admit(tcp: TcpStream, request: &ReceiveRequest) -> Result<Admitted> {
    let mut clock = Clock::start();
    clock.phase("connect");
    let until = Instant::now() + LIMIT;
    let from = tcp.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string());
    let silence = Duration::from_secs(request.limits.silence_s);
    let material = request.tls.as_ref().context("no certificate for this connection")?;
    let config = tls::config::server(material, &[ALPN_DATA])?;
    let mut name = String::new();
    let mut wire = Wire::accept(tcp, config, silence, until, |c| {
        name = tls::config::peer_name(c.peer_certificates().unwrap_or_default())?;
        Ok(())
    })
    .with_context(|| format!("connection of {from}"))?;
    let hello = ticket(&mut wire, &name, request).map_err(|e| {
        wire.fail(&failure_of(&e, "connect", &request.node));
        e.context(format!("connection of {name} ({from})"))
    })?;
    wire.deadline(None)?;
    Ok(Admitted { wire, hello, clock })
}

fn ticket(wire: &mut Wire, name: &str, request: &ReceiveRequest) -> Result<Hello> {
    ensure!(
        name == request.peer,
        "migration {} was agreed with another node, {name} may not send it",
        request.migration_id
    );
    let hello: Hello = wire.expect(Kind::Hello)?;
    ensure!(
        hello.migration_id == request.migration_id
            && tls::same_secret(hello.ticket.as_bytes(), request.ticket.as_bytes()),
        "it showed a ticket that is not for this migration"
    );
    Ok(hello)
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
