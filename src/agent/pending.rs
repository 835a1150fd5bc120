//! Migrations that wait for the source's shim to connect, and what they were agreed under.
//!
//! The connection that asks for a migration by name comes from the source node's address, or it is not looked at; but an address
//! proves nothing, and a name may have been seen by others. So every such connection is passed on, and the migration goes
//! on waiting, until the destination's shim has found one that shows the source's certificate and the migration's secret
//! ([`super::candidates`]). A stranger who comes first, or ten of them, can use up nothing.
//!
//! This secret is the agents' own affair, made anew for each migration and told only to the source; it is not the operator's
//! ticket ([`super::tickets`]), which is asked for long before.

use std::{
    collections::HashMap,
    net::{IpAddr, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tokio::sync::mpsc;

use crate::tls::random_hex;

/// How long after [`Message::Ready`](super::message::Message::Ready) the source's shim may come.
pub const LIFE: Duration = Duration::from_secs(60);
/// Connections that nobody has looked at yet.
const QUEUE: usize = 4;

/// A migration's name and secret, and what they are bound to.
#[derive(Clone)]
pub struct Agreed {
    /// Its name; no secret.
    pub migration: String,
    /// 32 random bytes, hexadecimal.
    pub secret: String,
    /// The source node, as its certificate names it.
    pub source: String,
    /// The container, as `namespace/id`.
    pub container: String,
    /// Until when the source's shim may come.
    pub expires: Instant,
}

impl std::fmt::Debug for Agreed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Agreed({} for {} from {})", self.migration, self.container, self.source)
    }
}

impl Agreed {
    /// A fresh one.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(source: &str, namespace: &str, id: &str, now: Instant) -> Result<Agreed> {
        Ok(Agreed {
            migration: random_hex(16)?,
            secret: random_hex(32)?,
            source: source.into(),
            container: format!("{namespace}/{id}"),
            expires: now + LIFE,
        })
    }

    /// Its life begins now: what was done since (an image that came along) may have taken longer.
    pub fn renewed(mut self, now: Instant) -> Agreed {
        self.expires = now + LIFE;
        self
    }
}

struct Waiting {
    agreed: Agreed,
    from: IpAddr,
    to: mpsc::Sender<TcpStream>,
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

    /// Lets connections for this migration in, from the address of the source's agent; they come out of the returned
    /// [`Expected`], and dropping it ends that.
    pub fn expect(&self, agreed: Agreed, from: IpAddr) -> Expected {
        let (to, connections) = mpsc::channel(QUEUE);
        let migration = agreed.migration.clone();
        self.lock().insert(migration.clone(), Waiting { agreed, from: from.to_canonical(), to });
        Expected { pending: self.clone(), migration, connections }
    }

    /// Passes a connection on to whoever waits for it. Whether it is the source's is not known yet.
    ///
    /// # Errors
    /// Nobody waits for it: unknown, over, expired, of another address, or too many come at once. The connection is dropped.
    pub fn hand_over(
        &self,
        migration: &str,
        from: IpAddr,
        now: Instant,
        connection: TcpStream,
    ) -> Result<()> {
        let mut all = self.lock();
        match all.get(migration) {
            None => bail!("no migration {migration} waits for a connection (unknown, begun or given up)"),
            Some(w) if w.from != from.to_canonical() => {
                bail!("migration {migration} belongs to {}, and not to {from}", w.from)
            }
            Some(w) if w.agreed.expires < now => {
                all.remove(migration);
                bail!("it came too late for migration {migration}");
            }
            Some(w) => match w.to.try_send(connection) {
                Ok(()) => Ok(()),
                Err(_) => bail!("too many connections ask for migration {migration} at once"),
            },
        }
    }
}

/// Connections to come. Dropped, no more are let in.
#[derive(Debug)]
pub struct Expected {
    pending: Pending,
    /// The migration.
    pub migration: String,
    connections: mpsc::Receiver<TcpStream>,
}

impl Expected {
    /// The next one; `None` once its time is over.
    pub async fn next(&mut self) -> Option<TcpStream> {
        self.connections.recv().await
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.pending.lock().remove(&self.migration);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const C: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3));

    fn connection() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn whoever_comes_first_from_the_right_address_uses_nothing_up() {
        let (pending, now) = (Pending::default(), Instant::now());
        let agreed = Agreed::new("node-a", "default", "c", now).unwrap();
        assert_eq!((agreed.secret.len(), agreed.migration.len()), (64, 32));
        assert!(!format!("{agreed:?}").contains(&agreed.secret));
        let id = agreed.migration.clone();
        let mut expected = pending.expect(agreed, A);
        let give = |from, at| pending.hand_over(&id, from, at, connection());
        assert!(give(C, now).unwrap_err().to_string().contains("belongs"));
        // the same address, written in another way
        give(IpAddr::V6(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped()), now).unwrap();
        give(A, now).unwrap();
        assert!(expected.next().await.is_some() && expected.next().await.is_some());
        for _ in 0..QUEUE {
            give(A, now).unwrap();
        }
        assert!(give(A, now).unwrap_err().to_string().contains("too many"));
        drop(expected);
        assert!(give(A, now).unwrap_err().to_string().contains("no migration"), "after it has begun");
    }

    #[tokio::test]
    async fn what_is_over_is_over() {
        let (pending, now) = (Pending::default(), Instant::now());
        let agreed = Agreed::new("node-a", "default", "c", now).unwrap();
        drop(pending.expect(agreed.clone(), A));
        assert!(pending.hand_over(&agreed.migration, A, now, connection()).is_err());
        let mut expected = pending.expect(agreed.clone(), A);
        let late = now + LIFE + Duration::from_secs(1);
        let error = pending.hand_over(&agreed.migration, A, late, connection()).unwrap_err();
        assert!(error.to_string().contains("too late"), "{error}");
        assert!(expected.next().await.is_none());
    }
}
