//! This node takes a container: one connection of another node's agent, from its hello to its end.
//!
//! ```text
//!  Hello, Offer -> preflight -> blobs -> [Placement: lease, image, snapshot, netns, record, task] -> Ready
//!     Ready -> data connection -> shim's Receive -> Done   -> task started, lease dropped -> Started
//!                    |                 |
//!                    +---- failure ----+-> everything undone -> Failed
//! ```
//!
//! The source's agent going away is a failure until the shim says that the migration is committed; from then on the
//! container is this node's, whoever is still there to hear it.

use std::{net::IpAddr, time::Instant};

use anyhow::{Context, Result, bail};
use tokio::task::JoinHandle;

use super::{
    Agent, filling,
    layer::{self, name},
    link::{Frame, Link},
    message::{Hello, Message, Offer, Ready, Refusal, Started, VERSIONS},
    outcome::{self, Fate},
    pending::{Expected, Ticket},
    placement::{Placement, plain, situation},
    preflight,
};
use crate::{
    containerd::{Containerd, image::Blob},
    control::{self, ReceiveRequest},
    migrate::protocol::{Failure, select},
};

/// Speaks with one authenticated peer until it is done.
pub async fn serve(agent: &Agent, mut link: Link, peer: String, from: IpAddr) {
    match converse(agent, &mut link, &peer, from).await {
        Ok(()) => {}
        Err(error) => log::warn!("peer {peer} ({from}): {error:#}"),
    }
    link.close().await;
}

async fn converse(agent: &Agent, link: &mut Link, peer: &str, from: IpAddr) -> Result<()> {
    let Message::Hello(theirs) = link.hear().await? else { bail!("it did not say hello") };
    link.say(Message::Hello(hello(&agent.node))).await?;
    if let Err(message) = select(VERSIONS, (theirs.oldest, theirs.newest)) {
        let advice = "install the same version of transship on both nodes".to_string();
        link.say(Message::Refused(Refusal { code: "version".into(), message, advice })).await?;
        return Ok(());
    }
    let offer = match link.hear().await {
        Ok(Message::Offer(offer)) => *offer,
        Ok(Message::Ask { migration }) => return link.say(outcome::answer(&migration, peer).await).await,
        Ok(other) => bail!("it sent {} in place of an offer", name(&other)),
        Err(_) => return Ok(()), // only looked whether we are here
    };
    let (namespace, id) = (offer.namespace.clone(), offer.record.id.clone());
    log::info!("{peer} offers {namespace}/{id}{}", if offer.cold { ", cold" } else { "" });
    let refuse = |code: &str, message: String| {
        Message::Refused(Refusal { code: code.into(), message, advice: String::new() })
    };
    if !plain(&namespace) || !plain(&id) {
        return link.say(refuse("name", format!("{namespace}/{id} is no name of a container"))).await;
    }
    let Some(_busy) = agent.busy.enter(&namespace, &id, &format!("arriving from {peer}")) else {
        return link.say(refuse("name", format!("{namespace}/{id} is arriving or leaving already"))).await;
    };
    let Ok(_slot) = agent.incoming.try_acquire() else {
        return link.say(refuse("busy", "too many containers arrive at once".into())).await;
    };
    let containerd = match Containerd::connect(&agent.config.containerd).await {
        Ok(connection) => connection.namespace(&namespace)?,
        Err(error) => return link.say(refuse("containerd", format!("{error:#}"))).await,
    };
    let found = situation(&agent.config, &containerd, &offer).await;
    let verdict = match &found {
        Ok(found) => preflight::check(&offer, found),
        Err(error) => Err(Refusal {
            code: "preflight".into(),
            message: format!("{error:#}"),
            advice: "run `transship doctor` there".into(),
        }),
    };
    if let Err(refusal) = verdict {
        log::info!("refused {namespace}/{id} of {peer}: {}", refusal.message);
        return link.say(Message::Refused(refusal)).await;
    }
    let ticket = Ticket::issue(peer, &namespace, &id, Instant::now())?;
    let cold = offer.cold;
    let begun = Placement::begin(&agent.config, &containerd, offer, &ticket.migration, peer).await;
    let mut placement = match begun {
        Ok(placement) => placement,
        Err(error) => return link.say(refuse("containerd", format!("{error:#}"))).await,
    };
    placement.memory_cap = found.map_or(0, |f| f.memory_cap());
    let taken = if cold {
        take_cold(agent, link, &mut placement).await
    } else {
        take(agent, link, &mut placement, ticket, from).await
    };
    match taken {
        Ok(mut started) => {
            log::info!("{namespace}/{id} of {peer} is here now (migration {})", placement.migration);
            started.left = filling::begun(&namespace, &id, &placement.migration, peer).await;
            match placement.keep().await {
                Ok(warnings) => started.warnings.extend(warnings),
                Err(error) => started.warnings.push(format!("{error:#}")),
            }
            link.say(Message::Started(started)).await
        }
        Err(failed) => {
            log::warn!("taking {namespace}/{id} from {peer}: {failed:#}");
            let migration = placement.migration.clone();
            let left = placement.undo().await;
            if left.is_empty() {
                outcome::keep(&migration, peer, Fate::Aborted);
            }
            let failure = match failed.downcast::<Failure>() {
                Ok(failure) => failure,
                Err(error) => Failure {
                    phase: "prepare".into(),
                    node: agent.node.clone(),
                    message: format!("{error:#}"),
                    ..Failure::default()
                },
            };
            link.say(Message::Failed { failure, left }).await
        }
    }
}

/// This side's hello.
pub fn hello(node: &str) -> Hello {
    Hello {
        oldest: VERSIONS.0,
        newest: VERSIONS.1,
        software: env!("CARGO_PKG_VERSION").into(),
        node: node.into(),
    }
}

/// Blobs, image and snapshot, which both kinds of move need. Returns the bytes of blobs that came.
async fn image(link: &mut Link, placement: &mut Placement<'_>) -> Result<u64> {
    let missing = placement.missing_blobs().await?;
    link.say(Message::Need { digests: missing.iter().map(|b| b.digest.clone()).collect() }).await?;
    let total: u64 = missing.iter().map(|b| b.size).sum();
    let mut done = 0;
    for blob in &missing {
        take_blob(link, placement, blob).await.with_context(|| format!("blob {}", blob.digest))?;
        done += blob.size;
        link.say(Message::Progress { what: "blobs".into(), done, total }).await?;
    }
    let out = link.sender();
    let unpacking = placement.image_and_snapshot(|number, count| {
        let (done, total) = (number as u64, count as u64);
        let progress = Message::Progress { what: "unpack".into(), done, total };
        let _ = out.try_send(Frame::Message(Box::new(progress)));
    });
    unpacking.await?;
    Ok(total)
}

async fn take_blob(link: &mut Link, placement: &mut Placement<'_>, blob: &Blob) -> Result<()> {
    match link.hear().await? {
        Message::Blob { digest, size } if digest == blob.digest && size == blob.size => {}
        Message::Cancel { reason } => bail!("the source gave up: {reason}"),
        other => bail!("the source sent {} in its place", name(&other)),
    }
    let reference = placement.blob_reference(&blob.digest)?;
    let mut writer = placement.containerd().blob_writer(&reference, &blob.digest, blob.size).await?;
    let mut got = 0;
    while got < blob.size {
        let Frame::Data(data) = link.frame().await? else { bail!("the source stopped in the middle of it") };
        got += data.len() as u64;
        if got > blob.size || data.is_empty() {
            bail!("the source sent more or less than it said");
        }
        if let Some(writer) = &mut writer {
            writer.write(data).await?;
        }
    }
    match writer {
        // which others it refers to is read in it when all of them are here; until then the lease keeps them
        Some(writer) => writer.commit(Default::default()).await,
        None => Ok(()),
    }
}

async fn take_cold(agent: &Agent, link: &mut Link, placement: &mut Placement<'_>) -> Result<Started> {
    let blob_bytes = image(link, placement).await?;
    let target = layer::of_mounts(&placement.mounts)?;
    let migration = placement.migration.clone();
    link.say(Message::Ready(Ready { migration, blob_bytes, ..Ready::default() })).await?;
    let nodes = agent.config.policy.nodes(&placement.offer.record.spec);
    layer::receive(link, target, nodes).await.context("the writable layer")?;
    placement.container().await?;
    Ok(Started::default())
}

async fn take(
    agent: &Agent,
    link: &mut Link,
    placement: &mut Placement<'_>,
    ticket: Ticket,
    from: IpAddr,
) -> Result<Started> {
    let blob_bytes = image(link, placement).await?;
    placement.network().await?;
    placement.container().await?;
    placement.task().await?;
    let (secret, source) = (ticket.secret.clone(), ticket.source.clone());
    let mut expected = agent.pending.expect(ticket, from);
    link.say(Message::Ready(Ready {
        migration: placement.migration.clone(),
        ticket: secret.clone(),
        stdio: placement.stdio.clone(),
        blob_bytes,
        netns: placement.netns.clone(),
    }))
    .await?;
    let offer = &placement.offer;
    let limit = agent.config.silence(offer.silence_seconds);
    let connection = tokio::select! {
        connection = wait(&mut expected, limit) => connection?,
        gone = gave_up(link) => bail!("{gone}"),
    };
    let request = control::Request::Receive(ReceiveRequest {
        migration_id: placement.migration.clone(),
        ticket: secret,
        node: agent.node.clone(),
        peer: source,
        tls: Some(agent.config.pki().material()?),
        limits: agent.config.limits(offer.silence_seconds, offer.ghost_limit, placement.memory_cap),
        netns: placement.netns.clone(),
        net: offer.net.clone(),
        on_post_copy_failure: offer.on_post_copy_failure,
    });
    let (namespace, id) = (offer.namespace.clone(), offer.record.id.clone());
    let warnings = follow(&namespace, &id, request, vec![connection.into()], Some(link)).await?;
    // the shim has it running; this tells containerd
    let pid = placement.containerd().task_start(&id).await.map_err(|error| {
        log::error!("{namespace}/{id} runs, but containerd could not be told: {error:#}");
        error
    });
    let mut started = Started { pid: *pid.as_ref().unwrap_or(&0), warnings, left: 0 };
    if let Err(error) = pid {
        started.warnings.push(format!("it runs, but containerd does not know: {error:#}"));
    }
    Ok(started)
}

async fn wait(expected: &mut Expected, limit: std::time::Duration) -> Result<std::net::TcpStream> {
    expected.connection(limit).await
}

/// Ends when the source gives up or goes away.
async fn gave_up(link: &mut Link) -> String {
    loop {
        match link.frame().await {
            Ok(Frame::Message(message)) => match *message {
                Message::Cancel { reason } => return format!("the source gave up: {reason}"),
                _ => continue,
            },
            Ok(_) => continue,
            Err(error) => return format!("the source's agent is gone: {error:#}"),
        }
    }
}

/// Has the shim take a container in, and follows it to the end; returns warnings. When the source's agent gives up or goes
/// away, the shim is asked to abort, which it does unless the migration is committed.
///
/// # Errors
/// A [`Failure`]; nothing runs here then.
pub async fn follow(
    namespace: &str,
    id: &str,
    request: control::Request,
    fds: Vec<std::os::fd::OwnedFd>,
    mut link: Option<&mut Link>,
) -> Result<Vec<String>> {
    let mut events = control::client::call(namespace, id, request, fds).await?;
    let (mut warnings, mut phase) = (Vec::new(), String::from("transfer"));
    let mut abort: Option<JoinHandle<()>> = None;
    loop {
        let watch = async {
            match &mut link {
                Some(link) if abort.is_none() => gave_up(link).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.recv() => match event {
                Some(control::Event::Done { report }) => {
                    warnings.extend(report.warnings);
                    return Ok(warnings);
                }
                Some(control::Event::Failed { failure, .. }) => return Err(failure.into()),
                Some(control::Event::Phase { phase: next }) => phase = next,
                Some(control::Event::Warning { message }) => warnings.push(message),
                Some(_) => {}
                None if phase == "running" => {
                    warnings.push(format!("the shim of {id} ended just after the container ran"));
                    return Ok(warnings);
                }
                None => {
                    let message = format!("the shim of {id} died");
                    return Err(Failure { phase, message, ..Failure::default() }.into());
                }
            },
            why = watch => {
                log::warn!("{namespace}/{id}: {why}; aborting unless it is committed");
                let (namespace, id) = (namespace.to_string(), id.to_string());
                abort = Some(tokio::spawn(async move { control::client::abort(&namespace, &id).await }));
            }
        }
    }
}

/// An offer's blobs that are not here, where no peer can send them.
pub fn no_blobs(missing: &[Blob], offer: &Offer) -> Result<()> {
    if let Some(blob) = missing.first() {
        bail!(
            "image {} is not complete on this node (blob {} and {} more are missing): fetch it first",
            offer.image.name,
            blob.digest,
            missing.len() - 1
        );
    }
    Ok(())
}
