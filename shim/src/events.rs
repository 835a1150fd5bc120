//! Events for containerd: an ordered queue, and a task that forwards it over ttrpc to the address that containerd gave us.
//!
//! Not containerd-shim's `RemotePublisher`: it queues a failed event again *behind* later ones (an exit could overtake its start),
//! needs containerd up when it is made, makes its caller wait up to 3 s when the queue is full, sets no deadline for a forward,
//! and reads a message's descriptor (reflection: memory that an idle shim would keep) for the name that `Message::NAME` has.
//! So one layer below: ttrpc's client and the generated Events service.
//!
//! An event that containerd does not take is tried again, as containerd's own shim does, up to five times after 1, 2, 3, 4 and 5
//! seconds; later ones wait behind it. While nobody listens at the address (a restart, an upgrade, a crash) nothing is given up,
//! unlike in containerd's own shim, where an exit in an absence of more than 15 seconds is lost: events wait until it is back.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow};
use containerd_shim_protos::{
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    ttrpc::{self, context},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

/// Events that are kept while containerd is away; then the oldest go.
const QUEUE: usize = 2048;
/// How often an event is tried again.
const RETRIES: u32 = 5;
/// What the first try waits for the second; each next waits that much longer.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });
/// How often it is looked whether containerd is back.
const AWAY: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });
/// How long containerd may take to accept a connection or an event.
const FORWARD: Duration = Duration::from_secs(5);

/// Sends events to containerd. Dropping it ends its task; call [`Publisher::flush`] before.
pub struct Publisher {
    queue: Arc<Queue>,
    namespace: String,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    /// Nobody delivers: no address, or the publisher is gone.
    closed: AtomicBool,
    /// An event was added, or the publisher is gone.
    added: Notify,
    /// An event was delivered or given up.
    removed: Notify,
}

impl Publisher {
    /// A publisher for containerd's ttrpc socket (a path or a `unix://` address; empty: events go nowhere). Does not connect yet.
    pub fn new(address: &str, namespace: &str) -> Publisher {
        let queue = Arc::new(Queue::default());
        if address.is_empty() {
            queue.close();
        } else {
            let address =
                if address.contains("://") { address.to_string() } else { format!("unix://{address}") };
            tokio::spawn(deliver(queue.clone(), address));
        }
        Publisher { queue, namespace: namespace.to_string() }
    }

    /// Queues an event, one of containerd's task events (`containerd.events.*`), under a topic of
    /// [`containerd_shim_protos::topics`]. Never waits.
    pub fn publish<M: Message>(&self, topic: &str, event: M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(e) => return log::error!("event {topic} cannot be encoded: {e}"),
        };
        let any = Any { type_url: format!("containerd.events.{}", M::NAME), value, ..Default::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(now()),
            namespace: self.namespace.clone(),
            topic: topic.to_string(),
            event: MessageField::some(any),
            ..Default::default()
        };
        if self.queue.is_closed() {
            return log::debug!("event {topic} is not sent: no address");
        }
        let mut waiting = self.queue.waiting();
        if waiting.len() >= QUEUE
            && let Some(lost) = waiting.pop_front()
        {
            log::warn!("event {} is lost: {QUEUE} others wait for containerd", lost.topic);
        }
        waiting.push_back(envelope);
        drop(waiting);
        self.queue.added.notify_one();
    }

    /// Waits until everything has been delivered or given up, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let empty = async {
            loop {
                let removed = self.queue.removed.notified();
                if self.queue.waiting().is_empty() {
                    return;
                }
                removed.await;
            }
        };
        if timeout(limit, empty).await.is_err() {
            log::warn!("{} events are lost: containerd did not take them", self.queue.waiting().len());
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.added.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// Why an event was not delivered.
enum Failure {
    /// Nobody listens.
    Away(anyhow::Error),
    /// Somebody listens and does not take it.
    Refused(anyhow::Error),
}

/// The task: delivers the head of the queue until the publisher is gone.
async fn deliver(queue: Arc<Queue>, address: String) {
    let mut connection = None;
    let mut tries = 0;
    let mut away = false;
    while !queue.is_closed() {
        let head = queue.waiting().front().cloned();
        let Some(head) = head else {
            queue.added.notified().await;
            continue;
        };
        match forward(&mut connection, &address, &head).await {
            Ok(()) => {}
            Err(Failure::Away(e)) => {
                if !std::mem::replace(&mut away, true) {
                    log::warn!("event {} waits, and those behind it: {e:#}", head.topic);
                }
                sleep(AWAY).await;
                continue;
            }
            Err(Failure::Refused(e)) => {
                tries += 1;
                if tries <= RETRIES {
                    log::warn!("event {} was not delivered, try {tries}: {e:#}", head.topic);
                    sleep(PAUSE * tries).await;
                    continue;
                }
                log::error!("event {} is given up: {e:#}", head.topic);
            }
        }
        (tries, away) = (0, false);
        let mut waiting = queue.waiting();
        // A queue that overflowed meanwhile has dropped it already.
        if waiting.front() == Some(&head) {
            waiting.pop_front();
        }
        drop(waiting);
        queue.removed.notify_waiters();
    }
}

/// One event over the connection; a fresh one when there is none or the old one is closed.
async fn forward(
    connection: &mut Option<EventsClient>,
    address: &str,
    event: &Envelope,
) -> Result<(), Failure> {
    let request = ForwardRequest { envelope: MessageField::some(event.clone()), ..Default::default() };
    for fresh in [false, true] {
        let client = match connection.take() {
            Some(client) => client,
            None => connect(address).await.map_err(Failure::Away)?,
        };
        match timeout(FORWARD, client.forward(context::with_duration(FORWARD), &request)).await {
            Ok(Ok(_)) => {
                *connection = Some(client);
                return Ok(());
            }
            Ok(Err(ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed)) if !fresh => continue,
            Ok(Err(e)) => return Err(Failure::Refused(anyhow::Error::from(e).context("forwarding"))),
            Err(_) => return Err(Failure::Refused(anyhow!("containerd does not answer"))),
        }
    }
    Err(Failure::Refused(anyhow!("containerd closes the connection")))
}

async fn connect(address: &str) -> Result<EventsClient> {
    let client = timeout(FORWARD, Client::connect(address)).await.context("connecting takes too long")?;
    Ok(EventsClient::new(client.with_context(|| format!("connecting to {address}"))?))
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, path::Path};

    use async_trait::async_trait;
    use containerd_shim_protos::{
        api::Empty,
        events::task::{TaskExit, TaskStart},
        shim_async::{Events, create_events},
        topics,
        ttrpc::{
            r#async::TtrpcContext,
            asynchronous::{Server, transport::Listener},
        },
    };
    use tokio::sync::mpsc;

    use super::*;

    /// containerd's end: takes events; refuses each `refuse` times first.
    struct Daemon {
        seen: mpsc::UnboundedSender<Envelope>,
        refuse: Mutex<u32>,
    }

    #[async_trait]
    impl Events for Daemon {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            {
                let mut refuse = self.refuse.lock().unwrap();
                if *refuse > 0 {
                    *refuse -= 1;
                    return Err(ttrpc::Error::Others("not now".into()));
                }
            }
            self.seen.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::default())
        }
    }

    async fn daemon(path: &Path, seen: &mpsc::UnboundedSender<Envelope>, refuse: u32) -> Server {
        let _ = std::fs::remove_file(path);
        let listener = Listener::try_from(UnixListener::bind(path).unwrap()).unwrap();
        let service = create_events(Arc::new(Daemon { seen: seen.clone(), refuse: Mutex::new(refuse) }));
        let mut server = Server::new().add_listener(listener).register_service(service);
        server.start().await.unwrap();
        server
    }

    fn exit(pid: u32) -> TaskExit {
        TaskExit { pid, ..Default::default() }
    }

    fn pid(envelope: &Envelope) -> u32 {
        TaskExit::parse_from_bytes(&envelope.event.value).unwrap().pid
    }

    #[tokio::test]
    async fn in_order_over_a_refusal_and_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let (seen, mut events) = mpsc::unbounded_channel();
        // Nobody listens yet: neither an error nor a wait.
        let publisher = Publisher::new(path.to_str().unwrap(), "k8s.io");
        publisher.publish(topics::TASK_START_EVENT_TOPIC, TaskStart { pid: 1, ..Default::default() });
        publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(2));
        publisher.flush(Duration::from_millis(50)).await;
        let mut server = daemon(&path, &seen, 1).await;
        publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(3));
        publisher.flush(Duration::from_secs(20)).await;
        let first = events.recv().await.unwrap();
        assert_eq!((first.topic.as_str(), first.namespace.as_str()), ("/tasks/start", "k8s.io"));
        assert_eq!(first.event.type_url, "containerd.events.TaskStart");
        assert!(first.timestamp.seconds > 1_600_000_000);
        for n in [2, 3] {
            let next = events.recv().await.unwrap();
            assert_eq!((pid(&next), next.event.type_url.as_str()), (n, "containerd.events.TaskExit"));
        }
        // A restart of containerd.
        server.shutdown().await.unwrap();
        drop(server);
        let _server = daemon(&path, &seen, 0).await;
        for n in 4..200 {
            publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(n));
        }
        publisher.flush(Duration::from_secs(20)).await;
        for n in 4..200 {
            assert_eq!(pid(&events.try_recv().unwrap()), n);
        }
    }

    #[tokio::test]
    async fn nothing_is_given_up_while_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let publisher = Publisher::new(path.to_str().unwrap(), "k8s.io");
        publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(1));
        publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(2));
        // many more looks than an event has tries
        sleep(20 * RETRIES * AWAY).await;
        assert_eq!(publisher.queue.waiting().len(), 2);
        let (seen, mut events) = mpsc::unbounded_channel();
        let _server = daemon(&path, &seen, 0).await;
        publisher.flush(Duration::from_secs(20)).await;
        assert_eq!((pid(&events.try_recv().unwrap()), pid(&events.try_recv().unwrap())), (1, 2));
    }

    #[tokio::test]
    async fn bounded_and_quiet_without_containerd() {
        let publisher = Publisher::new("/nonexistent/ttrpc", "x");
        for n in 0..QUEUE as u32 + 10 {
            publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(n));
        }
        assert_eq!(publisher.queue.waiting().len(), QUEUE);
        assert_eq!(pid(publisher.queue.waiting().front().unwrap()), 10);
        let nowhere = Publisher::new("", "x");
        nowhere.publish(topics::TASK_EXIT_EVENT_TOPIC, exit(1));
        nowhere.flush(Duration::from_secs(1)).await;
        assert!(nowhere.queue.waiting().is_empty());
    }
}
