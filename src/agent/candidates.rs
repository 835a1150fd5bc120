//! The connections that come for one migration: the first that the shim admits is the one.
//!
//! The shim makes each one's handshake and looks at the migration's secret; whom it refuses is logged, and the waiting goes
//! on until the deadline. A few are looked at beside one another, so that an idle one holds nobody up; should more come,
//! the oldest is cut: an honest source needs milliseconds.

use std::{
    net::{Shutdown, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use super::pending::Expected;
use crate::{
    control::Event,
    migrate::{admission, protocol::Failure},
};

/// So many are looked at beside one another.
const MOST: usize = 4;

/// What came of one.
enum Verdict {
    /// It is the source: what the shim says from here on.
    Admitted(mpsc::Receiver<Event>),
    /// It is not.
    Refused(String),
    /// The shim is not there to tell.
    NoShim(anyhow::Error),
}

/// Waits until the source is there, `limit` at most; `call` hands a connection to the shim. Returns the shim's events.
///
/// # Errors
/// The source did not come in time, or the shim is gone.
pub async fn admit<C, F>(expected: &mut Expected, limit: Duration, call: C) -> Result<mpsc::Receiver<Event>>
where
    C: Fn(OwnedFd) -> F,
    F: Future<Output = Result<mpsc::Receiver<Event>>> + Send + 'static,
{
    let migration = expected.migration.clone();
    let (mut refused, mut last) = (0, String::new());
    // dropped, it cuts what is still being looked at
    let mut looked_at = Candidates::default();
    let admitted = async {
        loop {
            let verdict = tokio::select! {
                connection = expected.next() => {
                    let Some(connection) = connection else { return Ok(None) };
                    looked_at.add(connection, &call)?;
                    continue;
                }
                Some(verdict) = looked_at.running.join_next() => verdict.context("a task")?,
            };
            match verdict {
                (number, Verdict::Admitted(events)) => {
                    looked_at.cuts.retain(|(n, _)| *n != number);
                    return Ok(Some(events));
                }
                (number, Verdict::Refused(why)) => {
                    log::warn!("refused for migration {migration}: {why}");
                    looked_at.cuts.retain(|(n, _)| *n != number);
                    (refused, last) = (refused + 1, why);
                }
                (_, Verdict::NoShim(error)) => return Err(error),
            }
        }
    };
    if let Some(events) = timeout(limit, admitted).await.unwrap_or(Ok(None))? {
        return Ok(events);
    }
    let others = match refused {
        0 => String::new(),
        n => format!("; {n} connections were refused, the last: {last}"),
    };
    bail!("the source's shim did not connect within {} s{others}", limit.as_secs())
}

/// Those that are being looked at.
#[derive(Default)]
struct Candidates {
    running: JoinSet<(u64, Verdict)>,
    /// By age, to be cut.
    cuts: Vec<(u64, TcpStream)>,
    next: u64,
}

impl Candidates {
    fn add<C, F>(&mut self, connection: TcpStream, call: &C) -> Result<()>
    where
        C: Fn(OwnedFd) -> F,
        F: Future<Output = Result<mpsc::Receiver<Event>>> + Send + 'static,
    {
        if self.cuts.len() >= MOST {
            let (_, oldest) = self.cuts.remove(0);
            // its handshake ends, and the shim says so
            oldest.shutdown(Shutdown::Both).ok();
        }
        let number = self.next;
        self.next += 1;
        self.cuts.push((number, connection.try_clone().context("a descriptor")?));
        let called = call(connection.into());
        self.running.spawn(async move {
            let events = match called.await {
                Ok(events) => events,
                Err(error) => return (number, Verdict::NoShim(error)),
            };
            // the shim has a limit of its own, and says how it ended
            let verdict = timeout(admission::LIMIT + Duration::from_secs(10), first(events)).await;
            (number, verdict.unwrap_or_else(|_| Verdict::Refused("the shim did not say who it is".into())))
        });
        Ok(())
    }
}

impl Drop for Candidates {
    fn drop(&mut self) {
        for (_, connection) in &self.cuts {
            connection.shutdown(Shutdown::Both).ok();
        }
    }
}

async fn first(mut events: mpsc::Receiver<Event>) -> Verdict {
    match events.recv().await {
        Some(Event::Admitted) => Verdict::Admitted(events),
        Some(Event::Failed { failure: Failure { message, .. }, .. }) => Verdict::Refused(message),
        Some(other) => Verdict::NoShim(anyhow::anyhow!("the shim answered {other:?}")),
        None => Verdict::NoShim(anyhow::anyhow!("the shim died before the source was there")),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{IpAddr, Ipv4Addr, TcpListener},
        sync::{Arc, Mutex},
        time::Instant,
    };

    use super::*;
    use crate::agent::pending::{Agreed, Pending};

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A shim that does to the nth connection what the nth letter says: `-` looks at it without end, `r` refuses it, `a`
    /// admits it, `d` dies over it.
    fn shim(script: &'static str) -> (impl Fn(OwnedFd) -> BoxedCall, Arc<Mutex<Vec<OwnedFd>>>) {
        let kept: Arc<Mutex<Vec<OwnedFd>>> = Arc::default();
        let seen = kept.clone();
        let call = move |fd: OwnedFd| -> BoxedCall {
            let mut seen = seen.lock().unwrap();
            let what = script.as_bytes().get(seen.len()).copied().unwrap_or(b'-');
            seen.push(fd);
            Box::pin(async move {
                let (to, events) = mpsc::channel(4);
                match what {
                    b'-' => drop(tokio::spawn(async move { to.closed().await })),
                    b'r' => {
                        let failure =
                            Failure { message: "connection of node-c".into(), ..Failure::default() };
                        to.send(Event::Failed { failure, state: String::new() }).await.unwrap();
                    }
                    b'a' => to.send(Event::Admitted).await.unwrap(),
                    _ => {}
                }
                Ok(events)
            })
        };
        (call, kept)
    }

    type BoxedCall = std::pin::Pin<Box<dyn Future<Output = Result<mpsc::Receiver<Event>>> + Send>>;

    /// The pending migration, and its far ends as they are made.
    fn expected() -> (Pending, Expected, impl Fn(&Pending) -> TcpStream) {
        let (pending, listener) = (Pending::default(), TcpListener::bind("127.0.0.1:0").unwrap());
        let agreed = Agreed::new("node-a", "default", "c", Instant::now()).unwrap();
        let name = agreed.migration.clone();
        let expected = pending.expect(agreed, HERE);
        let come = move |pending: &Pending| {
            let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (near, _) = listener.accept().unwrap();
            pending.hand_over(&name, HERE, Instant::now(), near).unwrap();
            far
        };
        (pending, expected, come)
    }

    #[tokio::test]
    async fn the_source_gets_in_behind_idle_and_refused_ones() {
        let (pending, mut expected, come) = expected();
        let (call, seen) = shim("r-ra");
        let far: Vec<_> = (0..4).map(|_| come(&pending)).collect();
        let begun = Instant::now();
        let mut events = admit(&mut expected, Duration::from_secs(20), call).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "it did not wait for the idle one");
        assert!(events.recv().await.is_none());
        assert_eq!(seen.lock().unwrap().len(), 4);
        // the idle one was cut, the admitted one was not
        far[1].set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!((&far[1]).read(&mut [0]).unwrap(), 0);
        far[3].set_nonblocking(true).unwrap();
        assert_eq!((&far[3]).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[tokio::test]
    async fn many_idle_ones_make_room_and_the_deadline_says_what_came() {
        let (pending, mut expected, come) = expected();
        let (call, _) = shim("r-----------------");
        let feed = tokio::spawn(async move {
            let mut far = Vec::new();
            for _ in 0..12 {
                far.push(come(&pending));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let mut cut = 0;
            for stream in &far[1..] {
                stream.set_nonblocking(true).unwrap();
                cut += usize::from(matches!((&*stream).read(&mut [0]), Ok(0)));
            }
            cut
        });
        let error = admit(&mut expected, Duration::from_secs(1), call).await.unwrap_err().to_string();
        assert!(
            error.contains("within 1 s; 1 connections were refused, the last: connection of node-c"),
            "{error}"
        );
        assert!(feed.await.unwrap() >= 11 - MOST);
    }

    #[tokio::test]
    async fn a_dead_shim_is_no_reason_to_wait() {
        let (pending, mut expected, come) = expected();
        let (call, _) = shim("rd");
        let _far = [come(&pending), come(&pending)];
        let error = admit(&mut expected, Duration::from_secs(20), call).await.unwrap_err();
        assert!(error.to_string().contains("died"), "{error}");
    }
}
