//! The agent's side of a control socket: a request, then events until the last one.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::mpsc;

use super::{Event, Inspected, Request, socket_path, transport};

/// Sends a request to the container's shim; the events come through the channel, the last one is
/// [`Event::is_last`]. If the shim dies, the channel ends without one.
///
/// # Errors
/// The container's shim has no socket (it is not ours, or gone), or refuses the connection.
pub async fn call(
    namespace: &str,
    id: &str,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<mpsc::Receiver<Event>> {
    let path = socket_path(namespace, id);
    let name = format!("{namespace}/{id}");
    let socket = tokio::task::spawn_blocking(move || -> Result<UnixStream> {
        let socket = UnixStream::connect(&path).with_context(|| {
            format!("no transship shim answers for container {name} (socket {})", path.display())
        })?;
        let borrowed: Vec<_> = fds.iter().map(|f| f.as_fd()).collect();
        transport::send(&socket, &request, &borrowed)?;
        Ok(socket)
    })
    .await??;
    let (to, events) = mpsc::channel(64);
    // a thread and not an async reader: descriptors and JSON come through one blocking transport on both sides
    std::thread::Builder::new().name("shim-events".into()).spawn(move || {
        while let Ok(Some((event, _))) = transport::recv::<Event>(&socket) {
            let last = event.is_last();
            if to.blocking_send(event).is_err() || last {
                return;
            }
        }
    })?;
    Ok(events)
}

/// What the shim knows of its container.
pub async fn inspect(namespace: &str, id: &str) -> Result<Inspected> {
    let mut events = call(namespace, id, Request::Inspect, Vec::new()).await?;
    let answer = tokio::time::timeout(Duration::from_secs(5), events.recv()).await;
    match answer.map_err(|_| anyhow!("the shim of {namespace}/{id} does not answer"))? {
        Some(Event::Inspected(i)) => Ok(i),
        Some(Event::Failed { failure, .. }) => Err(failure.into()),
        other => bail!("the shim of {namespace}/{id} answered {other:?}"),
    }
}

/// Has the shim give up the migration that runs, unless it is committed; returns once that is decided.
pub async fn abort(namespace: &str, id: &str) {
    match call(namespace, id, Request::Abort, Vec::new()).await {
        Ok(mut answer) => while answer.recv().await.is_some() {},
        Err(error) => log::warn!("aborting {namespace}/{id}: {error:#}"),
    }
}
