//! The agent's two sockets: the port for peers and the unix socket for the command line.
//!
//! Until a connection to the port has shown a certificate it costs little: their number is limited ([`super::strangers`]), each
//! has [`STRANGER_LIMIT`] for all it has to say, at most 16 KiB of it are looked at before the handshake, and the log gets so
//! many lines about them and no more. A node that has shown one has [`MAX_PER_NODE`] connections at a time.

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    Agent,
    api::{self, Event, Request},
    destination,
    link::Link,
    local, ps,
    reporter::Reporter,
    source,
    strangers::{Limits, Strangers, Throttle},
    ticket,
};
use crate::tls::{ALPN_CONTROL, ALPN_DATA, config::peer_name, migration_of, peek::peek};

/// How long a connection may take until it has shown a certificate, or asked for a migration that is waited for.
pub const STRANGER_LIMIT: Duration = Duration::from_secs(10);

/// The most connections of one node that has shown its certificate: moves that come from it, and its questions about others.
pub const MAX_PER_NODE: usize = 128;

/// Lines in the log about strangers: so many in each period.
const LINES: (u32, Duration) = (50, Duration::from_secs(10));

/// The most requests of the command line at a time.
const MAX_CLIENTS: usize = 256;

/// Opens the port.
pub async fn bind_peers(agent: &Agent) -> Result<TcpListener> {
    let listen = agent.config.listen;
    TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))
}

/// Opens the unix socket, for root only.
pub fn bind_cli(agent: &Agent) -> Result<UnixListener> {
    let path = &agent.config.socket;
    let bind = || -> Result<UnixListener> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!("another agent answers there");
        }
        super::netns::gone(fs::remove_file(path))?;
        // made elsewhere and renamed, so that nobody can connect before the mode is set
        let staged = path.with_extension(format!("{}", std::process::id()));
        super::netns::gone(fs::remove_file(&staged))?;
        let listener = UnixListener::bind(&staged)?;
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o600))?;
        fs::rename(&staged, path)?;
        Ok(listener)
    };
    bind().with_context(|| format!("listening on {}", path.display()))
}

/// What all connections to the port share.
#[derive(Debug)]
struct Door {
    agent: Arc<Agent>,
    strangers: Strangers,
    guests: Arc<Guests>,
    lines: Mutex<Throttle>,
}

/// Serves the port; never ends.
pub async fn serve_peers(agent: Arc<Agent>, listener: TcpListener) {
    let door = Arc::new(Door {
        agent,
        strangers: Strangers::new(Limits::default()),
        guests: Arc::default(),
        lines: Mutex::new(Throttle::new(LINES.0, LINES.1, Instant::now())),
    });
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // out of descriptors, most likely: without a pause this would spin
                log::warn!("accepting a peer: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let door = door.clone();
        tokio::spawn(async move {
            if let Err(error) = welcome(&door, stream, from).await {
                let mut lines = door.lines.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(unsaid) = lines.may(Instant::now()) else { return };
                if unsaid > 0 {
                    log::warn!("{unsaid} other connections were refused, and nothing was said of them");
                }
                match super::peer::trust_in(&error) {
                    Some(problem) => log::warn!("refused {from}: {problem}"),
                    None => log::warn!("connection of {from}: {error:#}"),
                }
            }
        });
    }
}

/// What a stranger turned out to be.
enum Caller {
    /// A node, by its certificate.
    Node(Box<TlsStream<TcpStream>>, String),
    /// It asks for this migration; the shim has to find out who it is.
    Migration(String, std::net::TcpStream),
}

/// Hands a connection to whom it is for.
async fn welcome(door: &Door, stream: TcpStream, from: SocketAddr) -> Result<()> {
    let agent = &door.agent;
    let mut stranger = door.strangers.enter(from.ip());
    let caller = tokio::select! {
        caller = timeout(STRANGER_LIMIT, identify(agent, stream)) => {
            caller.with_context(|| format!("no certificate within {} s", STRANGER_LIMIT.as_secs()))??
        }
        () = stranger.evicted() => bail!("it had not shown a certificate yet, and had to make room for another"),
    };
    drop(stranger);
    let (stream, peer) = match caller {
        Caller::Migration(migration, stream) => {
            return agent.pending.hand_over(&migration, from.ip(), Instant::now(), stream);
        }
        Caller::Node(stream, peer) => (*stream, peer),
    };
    let Some(_guest) = door.guests.enter(&peer) else {
        bail!("{peer} has {MAX_PER_NODE} connections already");
    };
    let link = Link::new(stream, agent.config.silence(0));
    destination::serve(agent, link, peer, from.ip()).await;
    Ok(())
}

/// Finds out what a connection is.
async fn identify(agent: &Agent, stream: TcpStream) -> Result<Caller> {
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let hello = peek(&stream, STRANGER_LIMIT).await?;
    if hello.speaks(ALPN_DATA) {
        let name = hello.sni.unwrap_or_default();
        let Some(migration) = migration_of(&name) else { bail!("{name:?} is no migration") };
        let stream = stream.into_std()?;
        // the shim's threads read and write blocking
        stream.set_nonblocking(false)?;
        return Ok(Caller::Migration(migration.into(), stream));
    }
    ensure!(hello.speaks(ALPN_CONTROL), "it speaks none of our protocols");
    let config = agent.config.pki().server(&[ALPN_CONTROL])?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let peer = peer_name(stream.get_ref().1.peer_certificates().unwrap_or(&[]))?;
    Ok(Caller::Node(Box::new(stream), peer))
}

/// Connections of nodes that have shown their certificates, by name.
#[derive(Debug, Default)]
struct Guests(Mutex<HashMap<String, usize>>);

/// One of them.
struct Guest {
    guests: Arc<Guests>,
    node: String,
}

impl Guests {
    fn enter(self: &Arc<Self>, node: &str) -> Option<Guest> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(node.into()).or_default();
        if *count >= MAX_PER_NODE {
            return None;
        }
        *count += 1;
        Some(Guest { guests: self.clone(), node: node.into() })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = self.guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.node);
            }
        }
    }
}

/// Serves the unix socket; never ends.
pub async fn serve_cli(agent: Arc<Agent>, listener: UnixListener) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = clients.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("accepting a command line: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Err(error) = client(agent, stream).await {
                log::debug!("a command line: {error:#}");
            }
            drop(permit);
        });
    }
}

async fn client(agent: Arc<Agent>, mut stream: UnixStream) -> Result<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_le_bytes(length) as usize;
    api::check_length(length)?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let (mut reporter, mut events) = Reporter::new();
    let request = match serde_json::from_slice::<Request>(&body) {
        Ok(request) => request,
        Err(error) => {
            let message = format!("the request was not understood: {error}");
            let error = api::ErrorReport::new(api::ExitCode::Usage, message);
            return Ok(stream.write_all(&api::encode(&Event::Failed { error })?).await?);
        }
    };
    // a task of its own: it goes on when the client hangs up
    let work = tokio::spawn(async move { carry_out(&agent, request, &mut reporter).await });
    let mut told = false;
    while let Some(event) = events.recv().await {
        stream.write_all(&api::encode(&event)?).await?;
        told = matches!(event, Event::Done { .. } | Event::Failed { .. });
        if told {
            break;
        }
    }
    if !told {
        let why = work.await.err().map_or("no answer".into(), |e| e.to_string());
        let error = api::ErrorReport::new(api::ExitCode::Failed, format!("the agent failed: {why}"))
            .advice("see its log; this is a bug");
        stream.write_all(&api::encode(&Event::Failed { error })?).await?;
    }
    stream.shutdown().await?;
    Ok(())
}

async fn carry_out(agent: &Agent, request: Request, reporter: &mut Reporter) {
    match request {
        Request::Migrate(request) => source::migrate(agent, request, reporter).await,
        Request::Checkpoint(request) => local::checkpoint(agent, request, None, reporter).await,
        Request::CheckpointEncrypted { checkpoint, to } => {
            local::checkpoint(agent, checkpoint, Some(to), reporter).await
        }
        Request::Restore(request) => local::restore(agent, request, reporter).await,
        Request::Resolve(request) => {
            let result = local::resolve(agent, request).await;
            reporter.end(result);
        }
        Request::Ps(request) => {
            let result = ps::list(agent, &request.namespace).await;
            reporter.end(result);
        }
        Request::Ticket(request) => {
            let result = ticket::issue(agent, &request);
            reporter.end(result);
        }
        Request::Tickets => reporter.end(Ok(ticket::list(agent))),
        Request::WithdrawTicket { id } => {
            let result = ticket::withdraw(agent, &id);
            reporter.end(result);
        }
        Request::Version => {
            let result = ps::version(agent).await;
            reporter.end(result);
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
