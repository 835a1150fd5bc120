//! stub
use std::time::Duration;
use containerd_shim_protos::{protobuf::MessageFull, protobuf::well_known_types::any::Any, shim_async::{Client, EventsClient}, ttrpc::context::Context, shim::events::{ForwardRequest}};
pub struct Publisher(tokio::sync::mpsc::UnboundedSender<(String, Any)>);
impl Publisher {
    pub fn new(a: &str, ns: &str) -> Self {
        let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel::<(String, Any)>();
        let (a, ns) = (format!("unix://{a}"), ns.to_string());
        tokio::spawn(async move { 
            while let Some((t, e)) = rx.recv().await {
              let Ok(c) = Client::connect(&a).await else { continue };
              let c = EventsClient::new(c);
                let mut env = containerd_shim_protos::shim::event::Envelope::new(); env.topic = t; env.namespace = ns.clone(); env.event = Some(e).into();
                env.timestamp = Some(crate::process::timestamp(Some(std::time::SystemTime::now()))).into();
                let mut r = ForwardRequest::new(); r.envelope = Some(env).into();
                let _ = c.forward(Context::default(), &r).await;
            } });
        Self(tx)
    }
    pub fn publish(&self, topic: &str, event: impl MessageFull) { let n = event_name(&event); let _ = self.0.send((topic.into(), Any { type_url: n, value: event.write_to_bytes().unwrap(), ..Default::default() })); }
    pub async fn flush(&self, _d: Duration) { tokio::time::sleep(Duration::from_millis(50)).await }
}
fn event_name<M: MessageFull>(_: &M) -> String { M::descriptor().full_name().to_string() }
