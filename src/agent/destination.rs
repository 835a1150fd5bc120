//! This node takes a container: one connection of another node's agent, from its hello to its end.
//!
//! ```text
//!  Hello -> may it? ([`super::admission`]) -> Offer -> preflight -> blobs -> [Placement: lease, image, snapshot, netns, record, task] -> Ready
//!     Ready -> data connection -> shim's Receive -> Done   -> task started, lease dropped -> Started
//!                    |                 |
//!                    +---- failure ----+-> everything undone -> Failed
//! ```
//!
//! The source's agent going away is a failure until the shim says that the migration is committed; from then on the
//! container is this node's, whoever is still there to hear it.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Agent, admission, candidates, departed, filling,
    layer::{self, name},
    leftovers,
    link::{Frame, Link, MAX_MESSAGE, MAX_OFFER},
    message::{Hello, Message, MoveAsked, Offer, Ready, Refusal, Started, VERSIONS},
    outcome::{self, Fate},
    pending::Agreed,
    placement::{Placement, plain, situation},
    preflight,
    tickets::Held,
};
use crate::{
    containerd::{Containerd, image::Blob},
    control::{self, ReceiveRequest},
    migrate::{
        admission::LIMIT as ADMISSION_LIMIT,
        fault,
        protocol::{Failure, select},
    },
};

/// How long a peer that has shown its certificate may take for its hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long for what follows: an offer of [`MAX_OFFER`] bytes, over a slow link.
const OFFER_LIMIT: Duration = Duration::from_secs(60);

/// How long an offer waits for the end of an earlier attempt with the same container.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);

/// Speaks with one authenticated peer until it is done.
pub async fn serve(agent: &Agent, mut link: Link, peer: String, from: IpAddr) {
    match converse(agent, &mut link, &peer, from).await {
        Ok(()) => {}
        Err(error) => log::warn!("peer {peer} ({from}): {error:#}"),
    }
    link.close().await;
}

/// The peer's next message, which must be whole within the limit, however its bytes come.
async fn soon(link: &mut Link, limit: Duration) -> Result<Message> {
    let heard = tokio::time::timeout(limit, link.hear()).await;
    heard.with_context(|| format!("it said nothing that was due within {} s", limit.as_secs()))?
}

async fn converse(agent: &Agent, link: &mut Link, peer: &str, from: IpAddr) -> Result<()> {
    let Message::Hello(theirs) = soon(link, HELLO_LIMIT).await? else { bail!("it did not say hello") };
    if let Err(message) = select(VERSIONS, (theirs.oldest, theirs.newest)) {
        link.say(Message::Hello(hello(&agent.node))).await?;
        let advice = "install the same version of transship on both nodes".to_string();
        link.say(Message::Refused(Refusal { code: "version".into(), message, advice })).await?;
        return Ok(());
    }
    let Some(asked) = theirs.moving else {
        link.say(Message::Hello(hello(&agent.node))).await?;
        return match soon(link, HELLO_LIMIT).await {
            Ok(Message::Ask { migration }) => link.say(outcome::answer(agent, &migration, peer).await).await,
            Ok(other) => bail!("it sent {} in place of a question", name(&other)),
            Err(_) => Ok(()), // only looked whether we are here
        };
    };
    if !plain(&asked.namespace) || !plain(&asked.container) {
        let message = format!("{:?}/{:?} is no name of a container", asked.namespace, asked.container);
        return refuse(link, None, Refusal { code: "name".into(), message, advice: String::new() }).await;
    }
    let admitted = admission::admit(
        &agent.config,
        &agent.tickets,
        &agent.certified_name(),
        peer,
        &asked,
        Instant::now(),
    );
    let held = match admitted {
        Ok(held) => held,
        Err(denied) => {
            log::warn!("refused {peer} ({from}): {}", denied.logged);
            return refuse(link, None, denied.refusal).await;
        }
    };
    offered(agent, link, peer, from, &asked, held).await
}

/// Nothing was made: a ticket that was shown is good again.
async fn refuse(link: &Link, held: Option<Held>, refusal: Refusal) -> Result<()> {
    drop(held);
    link.say(Message::Refused(refusal)).await
}

/// The peer may move this container here: its offer, and what comes of it.
async fn offered(
    agent: &Agent,
    link: &mut Link,
    peer: &str,
    from: IpAddr,
    asked: &MoveAsked,
    held: Option<Held>,
) -> Result<()> {
    let (namespace, id) = (asked.namespace.clone(), asked.container.clone());
    let because = |code: &str, message: String| Refusal { code: code.into(), message, advice: String::new() };
    let arriving = format!("arriving from {peer}");
    // the source knows that its last attempt is over; here it may still be undone
    let ending = [arriving.as_str(), leftovers::TIDYING];
    let entered = agent.busy.enter_after(&namespace, &id, &arriving, &ending, UNDO_PATIENCE).await;
    let Some(_busy) = entered else {
        let message = format!("{namespace}/{id} is arriving or leaving already");
        return refuse(link, held, because("name", message)).await;
    };
    // before the offer is read: only so many are in memory at a time
    let Ok(_slot) = agent.incoming.try_acquire() else {
        return refuse(link, held, because("busy", "too many containers arrive at once".into())).await;
    };
    link.allow(MAX_OFFER);
    link.say(Message::Hello(hello(&agent.node))).await?;
    let offer = match soon(link, OFFER_LIMIT).await? {
        Message::Offer(offer) => *offer,
        other => bail!("it sent {} in place of an offer", name(&other)),
    };
    link.allow(MAX_MESSAGE);
    log::info!("{peer} offers {namespace}/{id}{}", if offer.cold { ", cold" } else { "" });
    if (&offer.namespace, &offer.record.id) != (&namespace, &id) {
        let message = format!("it offers another container than {namespace}/{id}, with which it was let in");
        log::warn!("refused {peer} ({from}): {message}");
        return refuse(link, held, because("policy", message)).await;
    }
    let containerd = match Containerd::connect(&agent.config.containerd).await {
        Ok(connection) => connection.namespace(&namespace)?,
        Err(error) => return refuse(link, held, because("containerd", format!("{error:#}"))).await,
    };
    if let Err(refusal) = offer.check_size(agent.config.max_image_bytes) {
        return refuse(link, held, refusal).await;
    }
    // what could not be removed after an earlier move, for want of containerd, would stand in the way of this one
    leftovers::tidy_one(&containerd, &id).await;
    departed::hurry(&containerd, &id).await;
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
        return refuse(link, held, refusal).await;
    }
    // from here on something is made
    if let Some(held) = held {
        held.use_up();
    }
    let agreed = Agreed::new(peer, &namespace, &id, Instant::now())?;
    let (cold, by_pages) = (offer.cold, offer.paged_memory > 0);
    let begun = Placement::begin(&agent.config, &containerd, offer, &agreed.migration, peer).await;
    let mut placement = match begun {
        Ok(placement) => placement,
        Err(error) => return refuse(link, None, because("containerd", format!("{error:#}"))).await,
    };
    placement.memory_cap = found.map_or(0, |f| f.memory_cap(by_pages));
    let taken = if cold {
        take_cold(agent, link, &mut placement).await
    } else {
        take(agent, link, &mut placement, agreed, from).await
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
            let failure = match failed.downcast::<Failure>() {
                Ok(failure) => failure,
                Err(error) => Failure {
                    phase: "prepare".into(),
                    node: agent.node.clone(),
                    message: format!("{error:#}"),
                    ..Failure::default()
                },
            };
            if left.is_empty() && !failure.ran {
                outcome::keep(&migration, peer, Fate::Aborted);
            }
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
        moving: None,
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
    agreed: Agreed,
    from: IpAddr,
) -> Result<Started> {
    let blob_bytes = image(link, placement).await?;
    fault::pause("prepare", &placement.offer.record.id).await;
    placement.network().await?;
    placement.container().await?;
    placement.task().await?;
    let (secret, source) = (agreed.secret.clone(), agreed.source.clone());
    let mut expected = agent.pending.expect(agreed.renewed(Instant::now()), from);
    link.say(Message::Ready(Ready {
        migration: placement.migration.clone(),
        ticket: secret.clone(),
        stdio: placement.stdio.clone(),
        blob_bytes,
        netns: placement.netns.clone(),
    }))
    .await?;
    let offer = &placement.offer;
    // it is told at once, and has to dial, to shake hands and to show the secret
    let limit = agent.config.silence(offer.silence_seconds) + ADMISSION_LIMIT;
    let (namespace, id) = (offer.namespace.clone(), offer.record.id.clone());
    let request = ReceiveRequest {
        migration_id: placement.migration.clone(),
        ticket: secret,
        node: agent.node.clone(),
        peer: source,
        tls: None,
        limits: agent.config.limits(offer.silence_seconds, offer.ghost_limit, placement.memory_cap),
        netns: placement.netns.clone(),
        net: offer.net.clone(),
        on_post_copy_failure: offer.on_post_copy_failure,
    };
    let call = |connection| {
        // the certificates as they are now
        let tls = agent.config.pki().material();
        let (request, namespace, id) = (request.clone(), namespace.clone(), id.clone());
        async move {
            let request = control::Request::Receive(ReceiveRequest { tls: Some(tls?), ..request });
            control::client::call(&namespace, &id, request, vec![connection]).await
        }
    };
    let events = tokio::select! {
        admitted = candidates::admit(&mut expected, limit, call) => admitted?,
        gone = gave_up(link) => bail!("{gone}"),
    };
    drop(expected);
    let warnings = follow(&namespace, &id, events, Some(link)).await?;
    fault::pause("arrived", &id).await;
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

/// Follows a shim that takes a container in to the end; returns warnings. When the source's agent gives up or goes
/// away, the shim is asked to abort, which it does unless the migration is committed.
///
/// # Errors
/// A [`Failure`]; nothing runs here then.
pub async fn follow(
    namespace: &str,
    id: &str,
    mut events: mpsc::Receiver<control::Event>,
    mut link: Option<&mut Link>,
) -> Result<Vec<String>> {
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
                    // it was about to open the gate, or had
                    let ran = phase == "resume";
                    return Err(Failure { phase, message, ran, ..Failure::default() }.into());
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
