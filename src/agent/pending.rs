//! Migrations that wait for the source's shim to connect, and their one-time tickets.
//!
//! A ticket lets one source node (by its certificate) move one container here, once, until it expires. The agent that gives
//! it also counts its uses: the connection that asks for the migration by name is handed over once and for all. The
//! destination's shim, which makes the handshake, checks the certificate's name and the ticket's secret.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tokio::sync::oneshot;

use crate::tls::random_hex;

/// How long after [`Message::Ready`](super::message::Message::Ready) the source's shim may come.
pub const TICKET_LIFE: Duration = Duration::from_secs(60);

/// A ticket and what it is bound to.
#[derive(Clone)]
pub struct Ticket {
    /// The migration it is for; no secret.
    pub migration: String,
    /// 32 random bytes, hexadecimal.
    pub secret: String,
    /// The source node, as its certificate names it.
    pub source: String,
    /// The container, as `namespace/id`.
    pub container: String,
    /// Until when it is good.
    pub expires: Instant,
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ticket({} for {} from {})", self.migration, self.container, self.source)
    }
}

impl Ticket {
    /// A fresh one.
    ///
    /// # Errors
    /// No randomness.
    pub fn issue(source: &str, namespace: &str, id: &str, now: Instant) -> Result<Ticket> {
        Ok(Ticket {
            migration: random_hex(16)?,
            secret: random_hex(32)?,
            source: source.into(),
            container: format!("{namespace}/{id}"),
            expires: now + TICKET_LIFE,
        })
    }

    /// Its life begins now: what was done since it was issued (an image that came along) may have taken longer.
    pub fn renewed(mut self, now: Instant) -> Ticket {
        self.expires = now + TICKET_LIFE;
        self
    }
}

struct Waiting {
    ticket: Ticket,
    from: IpAddr,
    to: oneshot::Sender<std::net::TcpStream>,
}

/// All migrations that wait for their data connection.
#[derive(Clone, Default)]
pub struct Pending(Arc<Mutex<HashMap<String, Waiting>>>);

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.lock().keys()).finish()
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection for this ticket in, from the address of the source's agent; it comes through the channel.
    /// Dropping the returned [`Expected`] withdraws the ticket.
    pub fn expect(&self, ticket: Ticket, from: IpAddr) -> Expected {
        let (to, connection) = oneshot::channel();
        let migration = ticket.migration.clone();
        self.lock().insert(migration.clone(), Waiting { ticket, from, to });
        Expected { pending: self.clone(), migration, connection }
    }

    /// Hands a connection to whom it is for.
    ///
    /// # Errors
    /// There is no such ticket: unknown, used, withdrawn, expired, or of another address. The connection is dropped.
    pub fn hand_over(
        &self,
        migration: &str,
        from: IpAddr,
        now: Instant,
        connection: std::net::TcpStream,
    ) -> Result<()> {
        let mut all = self.lock();
        match all.get(migration) {
            None => bail!("no ticket for migration {migration} (unknown, used or withdrawn)"),
            // it stays good for whom it was given to
            Some(w) if w.from != from => {
                bail!("migration {migration} belongs to {}, and not to {from}", w.from)
            }
            Some(w) if w.ticket.expires < now => {
                all.remove(migration);
                bail!("the ticket for migration {migration} has expired");
            }
            Some(_) => {}
        }
        let Some(waiting) = all.remove(migration) else { bail!("no ticket") };
        if waiting.to.send(connection).is_err() {
            bail!("migration {migration} was given up");
        }
        Ok(())
    }
}

/// A connection to come. Dropped, it is no longer let in.
#[derive(Debug)]
pub struct Expected {
    pending: Pending,
    migration: String,
    connection: oneshot::Receiver<std::net::TcpStream>,
}

impl Expected {
    /// Waits for it.
    ///
    /// # Errors
    /// It did not come in time.
    pub async fn connection(&mut self, limit: Duration) -> Result<std::net::TcpStream> {
        match tokio::time::timeout(limit, &mut self.connection).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(_)) => bail!("the ticket of migration {} was withdrawn", self.migration),
            Err(_) => bail!("the source's shim did not connect within {} s", limit.as_secs()),
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.pending.lock().remove(&self.migration);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const C: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3));

    fn connection() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_ticket_is_good_once_and_for_one() {
        let (pending, now) = (Pending::default(), Instant::now());
        let ticket = Ticket::issue("node-a", "default", "c", now).unwrap();
        assert_eq!((ticket.secret.len(), ticket.migration.len()), (64, 32));
        assert!(!format!("{ticket:?}").contains(&ticket.secret));
        let id = ticket.migration.clone();
        let mut expected = pending.expect(ticket, A);
        let give = |from, at| pending.hand_over(&id, from, at, connection());
        assert!(give(C, now).unwrap_err().to_string().contains("belongs"));
        give(A, now).unwrap();
        expected.connection(Duration::from_secs(1)).await.unwrap();
        assert!(give(A, now).unwrap_err().to_string().contains("no ticket"), "a second use");
    }

    #[tokio::test]
    async fn withdrawn_and_expired_tickets_are_refused() {
        let (pending, now) = (Pending::default(), Instant::now());
        let ticket = Ticket::issue("node-a", "default", "c", now).unwrap();
        drop(pending.expect(ticket.clone(), A));
        assert!(pending.hand_over(&ticket.migration, A, now, connection()).is_err());
        let mut expected = pending.expect(ticket.clone(), A);
        let late = now + TICKET_LIFE + Duration::from_secs(1);
        let error = pending.hand_over(&ticket.migration, A, late, connection()).unwrap_err();
        assert!(error.to_string().contains("expired"), "{error}");
        assert!(expected.connection(Duration::from_millis(10)).await.is_err());
    }
}
