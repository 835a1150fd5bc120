//! The agent's two sockets: the port for peers and the unix socket for the command line.
//!
//! Until a connection to the port has shown a certificate it costs little: their number is limited, each has
//! [`HANDSHAKE_LIMIT`] for its ClientHello and as much for its handshake, and at most 16 KiB of it are looked at.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Agent,
    api::{self, Event, Request},
    destination,
    link::Link,
    local,
    peer::HANDSHAKE_LIMIT,
    ps,
    reporter::Reporter,
    source,
};
use crate::tls::{ALPN_CONTROL, ALPN_DATA, config::peer_name, migration_of, peek::peek};

/// The most connections that have not shown a certificate yet; more wait in the kernel's queue.
const MAX_STRANGERS: usize = 256;

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

/// Serves the port; never ends.
pub async fn serve_peers(agent: Arc<Agent>, listener: TcpListener) {
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    loop {
        let Ok(permit) = strangers.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // out of descriptors, most likely: without a pause this would spin
                log::warn!("accepting a peer: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Err(error) = welcome(agent, stream, from, permit).await {
                match super::peer::trust_in(&error) {
                    Some(problem) => log::warn!("refused {from}: {problem}"),
                    None => log::warn!("connection of {from}: {error:#}"),
                }
            }
        });
    }
}

/// Hands a connection to whom it is for; `stranger` is given back once it is known whose it is.
async fn welcome(
    agent: Arc<Agent>,
    stream: TcpStream,
    from: SocketAddr,
    stranger: tokio::sync::OwnedSemaphorePermit,
) -> Result<()> {
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let hello = peek(&stream, HANDSHAKE_LIMIT).await?;
    if hello.speaks(ALPN_DATA) {
        let name = hello.sni.unwrap_or_default();
        let Some(migration) = migration_of(&name) else { bail!("{name:?} is no migration") };
        let stream = stream.into_std()?;
        // the shim's threads read and write blocking
        stream.set_nonblocking(false)?;
        return agent.pending.hand_over(migration, from.ip(), Instant::now(), stream);
    }
    ensure!(hello.speaks(ALPN_CONTROL), "it speaks none of our protocols");
    let config = agent.config.pki().server(&[ALPN_CONTROL])?;
    let handshake = TlsAcceptor::from(config).accept(stream);
    let stream = timeout(HANDSHAKE_LIMIT, handshake).await.context("no handshake within 5 s")??;
    let peer = peer_name(stream.get_ref().1.peer_certificates().unwrap_or(&[]))?;
    let accepted = &agent.config.accept_from;
    ensure!(accepted.is_empty() || accepted.contains(&peer), "{peer} is not listed in accept_from");
    drop(stranger);
    let link = Link::new(stream, agent.config.silence(0));
    destination::serve(&agent, link, peer, from.ip()).await;
    Ok(())
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
        Request::Version => {
            let result = ps::version(agent).await;
            reporter.end(result);
        }
    }
}
