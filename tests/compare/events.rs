//! What containerd's subscribers hear of one namespace's tasks, in order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_client::events as e;
use containerd_client::services::v1::{PublishRequest, SubscribeRequest, events_client::EventsClient};
use containerd_client::tonic::transport::Channel;
use containerd_client::types::Envelope;
use prost::Message;
use tokio::runtime::Handle;

use crate::bed::patient;
use crate::calls::time;
use crate::daemon::Daemon;
use crate::normal::Normal;
use crate::record::Record;

/// After the last deletion, how long a shim that does not tell of it is waited for.
const LAST: Duration = Duration::from_millis(500);

/// The topic of our own events, by which it is seen that the subscription has begun.
const MARK: &str = "/compare/mark";

/// The events of a namespace since it was made.
pub struct Events(Arc<Mutex<Vec<Envelope>>>);

impl Events {
    /// Subscribes, and waits until events come.
    pub fn subscribe(handle: &Handle, channel: Channel, daemon: &Daemon) -> Result<Events> {
        let filters = vec![format!("namespace=={},topic~=\"^(/tasks/|{MARK})\"", daemon.namespace())];
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (list, mut client) = (Arc::clone(&seen), EventsClient::new(channel));
        let mut stream_client = client.clone();
        handle.spawn(async move {
            // containerd answers with its first event
            let stream = stream_client.subscribe(SubscribeRequest { filters }).await;
            let Ok(mut stream) = stream.map(|s| s.into_inner()) else { return };
            while let Ok(Some(envelope)) = stream.message().await {
                list.lock().unwrap_or_else(PoisonError::into_inner).push(envelope);
            }
        });
        let events = Events(seen);
        let start = Instant::now();
        while events.count() == 0 {
            ensure!(start.elapsed() < patient(Duration::from_secs(10)), "containerd sends no events");
            let event = Some(prost_types::Any { type_url: "compare.Mark".into(), value: Vec::new() });
            let request = PublishRequest { topic: MARK.into(), event };
            handle.block_on(client.publish(daemon.request(request))).context("publishing an event")?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(events)
    }

    /// How many have come so far: a mark for [`Events::note`].
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether an event of this topic has come since the mark.
    pub fn heard(&self, since: usize, topic: &str, id: &str) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen[since.min(seen.len())..].iter().any(|e| e.topic == topic && container(e) == id)
    }

    /// Waits a moment for the deletion of a container.
    pub fn await_deletion(&self, since: usize, id: &str) {
        let start = Instant::now();
        while !self.heard(since, "/tasks/delete", id) && start.elapsed() < patient(LAST) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Notes what has come for a container since the mark, event by event.
    pub fn note(&self, since: usize, id: &str, normal: &Normal, record: &mut Record) {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut own: Vec<&Envelope> = seen[since.min(seen.len())..].iter().collect();
        own.retain(|e| container(e) == id);
        // when the kernel's notice comes, and how often, is up to the kernel
        let before = own.len();
        own.retain(|e| e.topic != "/tasks/oom");
        if own.len() < before {
            record.note(format!("event of {id}: out of memory"), "yes");
        }
        // runc's shim does not tell of checkpoints; the others' numbers shall be the same
        let (told, own): (Vec<_>, Vec<_>) = own.into_iter().partition(|e| e.topic == "/tasks/checkpointed");
        for event in told {
            record.note(format!("event of {id}: checkpointed"), shown(event, normal));
        }
        // a shim that ends at once may take its last words with it: they have no number either, only a place
        let (mut number, mut before) = (0, "nothing");
        for event in own {
            if event.topic == "/tasks/delete" {
                record.note(
                    format!("event of {id}: deleted"),
                    format!("{}, after {before}", shown(event, normal)),
                );
                continue;
            }
            number += 1;
            before = event.topic.trim_start_matches("/tasks/");
            record.note(format!("event {number} of {id}"), shown(event, normal));
        }
    }
}

fn value(envelope: &Envelope) -> &[u8] {
    envelope.event.as_ref().map(|a| a.value.as_slice()).unwrap_or_default()
}

/// Every task event has the container's id in field 1.
fn container(envelope: &Envelope) -> String {
    e::TaskOom::decode(value(envelope)).map(|e| e.container_id).unwrap_or_default()
}

fn shown(envelope: &Envelope, normal: &Normal) -> String {
    let topic = envelope.topic.trim_start_matches("/tasks/");
    let kind = envelope.event.as_ref().map(|a| a.type_url.as_str()).unwrap_or_default();
    let fields = fields(kind, value(envelope), normal).unwrap_or_else(|e| format!("cannot be read: {e}"));
    format!("{topic} ({kind}) {fields}").trim_end().to_owned()
}

fn fields(kind: &str, value: &[u8], normal: &Normal) -> Result<String, prost::DecodeError> {
    let at = |t: Option<prost_types::Timestamp>| time(t.map(|t| t.seconds));
    Ok(match kind.rsplit('.').next().unwrap_or_default() {
        "TaskCreate" => {
            let e = e::TaskCreate::decode(value)?;
            let io = e.io.unwrap_or_default();
            let mounts: Vec<String> =
                e.rootfs.iter().map(|m| format!("{} at {:?}", m.r#type, m.target)).collect();
            normal.text(&format!(
                "pid={} bundle={} rootfs={} io={:?} checkpoint={}",
                normal.pid(e.pid),
                e.bundle,
                mounts.join(","),
                (io.stdin, io.stdout, io.stderr, io.terminal),
                // containerd's folder for it has a name of its own each time
                if e.checkpoint.is_empty() { "" } else { "a folder" },
            ))
        }
        "TaskStart" => format!("pid={}", normal.pid(e::TaskStart::decode(value)?.pid)),
        "TaskDelete" => {
            let e = e::TaskDelete::decode(value)?;
            format!("pid={} exit={} at={} id={:?}", normal.pid(e.pid), e.exit_status, at(e.exited_at), e.id)
        }
        "TaskExit" => {
            let e = e::TaskExit::decode(value)?;
            format!("id={} pid={} exit={} at={}", e.id, normal.pid(e.pid), e.exit_status, at(e.exited_at))
        }
        "TaskExecAdded" => format!("exec={}", e::TaskExecAdded::decode(value)?.exec_id),
        "TaskExecStarted" => {
            let e = e::TaskExecStarted::decode(value)?;
            format!("exec={} pid={}", e.exec_id, normal.pid(e.pid))
        }
        "TaskCheckpointed" => {
            let e = e::TaskCheckpointed::decode(value)?;
            let place = if e.checkpoint.contains("ctrd-checkpoint") { "containerd's" } else { &e.checkpoint };
            format!("checkpoint={}", normal.text(place))
        }
        _ => String::new(),
    })
}
