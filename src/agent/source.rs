//! This node gives a container away: `transship migrate`, from the request to the report.
//!
//! Until the shim has committed, every failure leaves the container running here as before; afterwards what is left of
//! it here is removed. A command line that hangs up changes nothing.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, Result, bail};

use super::{
    Agent,
    api::{ErrorReport, Event, ExitCode, MigrateRequest, Reply, Report},
    departed::clean_up,
    examine::{Subject, examine},
    layer::{self, name},
    leftovers,
    link::{Frame, Link, MAX_DATA, MAX_OFFER},
    message::{Message, MoveAsked, Offer, Ready, Started},
    outcome::{Fate, Undecided},
    peer::{self, Peer},
    reporter::Reporter,
    setback::{self, cancel, failed_here, failed_there, follow_undecided, lost, lost_after},
};
use crate::{
    control::{self, SendRequest},
    migrate::{fault, loss, protocol::Failure, tuning::OnPostCopyFailure},
    tls::{migration_name, migration_of},
};

type Outcome<T> = Result<T, ErrorReport>;

/// Carries out a migration; the reporter gets everything, the end too.
pub async fn migrate(agent: &Agent, request: MigrateRequest, reporter: &mut Reporter) {
    let (namespace, id) = (request.namespace.clone(), request.container.clone());
    reporter.phase("preflight");
    let result = match agent.busy.enter(&namespace, &id, &format!("leaving for {}", request.to)) {
        None => Err(ErrorReport::new(
            ExitCode::Busy,
            format!("{id} is busy with another migration or checkpoint"),
        )
        .advice("wait for its end; see `transship ps`")
        .state(format!("{id} is {}", agent.busy.what(&namespace, &id).unwrap_or_default()))),
        Some(_busy) => attempt(agent, &request, reporter).await,
    };
    match result {
        Ok(report) => {
            log::info!("{namespace}/{id} moved to {} ({})", report.to, report.migration);
            reporter.end(Ok(Reply::Migrated(Box::new(report))));
        }
        Err(mut error) => {
            if error.node.is_empty() {
                error.node = agent.node.clone();
            }
            if error.phase.is_empty() {
                error.phase = reporter.phase_name();
            }
            if error.advice.is_empty() {
                error.advice =
                    "the agents' logs of both nodes say more; `transship doctor` examines a node".into();
            }
            log::warn!("moving {namespace}/{id} to {}: {error} [{}]", request.to, error.state);
            reporter.end(Err(error));
        }
    }
}

async fn attempt(agent: &Agent, request: &MigrateRequest, reporter: &mut Reporter) -> Outcome<Report> {
    reporter.phase("preflight");
    let subject = examine(agent, request).await.map_err(|mut error| {
        if error.state.is_empty() {
            error.state = format!("nothing was changed on {}, and no other node was asked", agent.node);
        }
        error
    })?;
    let unchanged = match subject.offer.cold {
        true => format!(
            "{} is on {} as before; nothing was left on the other node",
            request.container, agent.node
        ),
        false => format!(
            "{} runs on {} as before; nothing was left on the other node",
            request.container, agent.node
        ),
    };
    let as_before = |mut error: ErrorReport| {
        if error.state.is_empty() {
            error.state.clone_from(&unchanged);
        }
        error
    };
    let silence = agent.config.silence(request.silence_seconds);
    let moving = MoveAsked {
        namespace: subject.offer.namespace.clone(),
        container: subject.record.id.clone(),
        ticket: request.ticket.clone(),
    };
    check_size(&subject.offer).map_err(as_before)?;
    let dialled =
        peer::dial_to_move(&request.to, &agent.config.pki(), &agent.node, silence, Some(moving)).await;
    let Peer { mut link, name: peer, address } = dialled.map_err(as_before)?;
    fault::pause("offer", &request.container).await;
    let offer = Message::Offer(Box::new(subject.offer.clone()));
    let ready = prepare(&mut link, offer, &subject, reporter, &peer).await.map_err(|mut error| {
        if error.code == ExitCode::Unreachable {
            // said only of what is known
            let id = &request.container;
            error.state = format!("{id} is on {} as before; {peer} undoes its part by itself", agent.node);
        }
        as_before(error)
    })?;
    reporter.phase("transfer");
    let mut report = Report {
        migration: ready.migration.clone(),
        namespace: request.namespace.clone(),
        container: request.container.clone(),
        from: agent.node.clone(),
        to: peer.clone(),
        cold: subject.offer.cold,
        blob_bytes: ready.blob_bytes,
        stdio: ready.stdio.clone(),
        ..Report::default()
    };
    if subject.offer.cold {
        send_cold(&mut link, &subject, &mut report, reporter, &peer).await.map_err(as_before)?;
    } else {
        let early = send(agent, request, &mut link, &subject, &ready, address, &mut report, reporter)
            .await
            .map_err(as_before)?;
        let heard = match early {
            Some(started) => Ok(started),
            None => started(&mut link).await,
        };
        let started = match heard {
            Ok(started) => started,
            Err(error) => {
                report.warnings.push(format!(
                    "it runs on {peer}, but that node's agent has not said that all is in order there: {error:#}"
                ));
                Started::default()
            }
        };
        report.pid = started.pid;
        report.warnings.extend(started.warnings);
    }
    drop(link);
    reporter.phase("cleanup");
    fault::pause("moved", &request.container).await;
    let task = subject.task.is_some() || subject.inspected.is_some();
    let notes = clean_up(&subject.containerd, &subject.record, task, subject.offer.cold).await;
    report.warnings.extend(notes);
    reporter.fill(&mut report);
    Ok(report)
}

/// No destination takes a larger offer; better said here than by a connection that is cut.
fn check_size(offer: &Offer) -> Outcome<()> {
    let length = serde_json::to_vec(offer).map_or(usize::MAX, |json| json.len());
    if length + 1024 > MAX_OFFER {
        let message = format!("its record has {length} bytes, and at most {MAX_OFFER} can be offered");
        return Err(ErrorReport::new(ExitCode::Failed, message).advice("remove labels or extensions from it"));
    }
    Ok(())
}

/// From the offer to the destination's `Ready`; serves the blobs that it lacks.
async fn prepare(
    link: &mut Link,
    offer: Message,
    subject: &Subject,
    reporter: &mut Reporter,
    peer: &str,
) -> Outcome<Ready> {
    reporter.phase("prepare");
    link.say(offer).await.map_err(|e| lost(peer, &e))?;
    loop {
        match link.hear().await.map_err(|e| lost(peer, &e))? {
            Message::Need { digests } => {
                send_blobs(link, subject, &digests, reporter).await.map_err(|e| lost(peer, &e))?;
            }
            Message::Progress { what, done, total } if what != "blobs" => {
                reporter.say(Event::Progress { what, done, total: Some(total) });
            }
            Message::Progress { .. } => {}
            Message::Warning { message } => reporter.say(Event::Warning { message }),
            // it becomes the name of files here, and of a host in TLS
            Message::Ready(ready) if migration_of(&migration_name(&ready.migration)).is_none() => {
                return Err(lost(peer, &anyhow::anyhow!("it calls the migration {:?}", ready.migration)));
            }
            Message::Ready(ready) => return Ok(ready),
            Message::Refused(refusal) => return Err(peer::refused(peer, refusal)),
            Message::Failed { failure, left } => return Err(failed_there(failure, &left, peer)),
            other => {
                let error = anyhow::anyhow!("it sent {} out of turn", name(&other));
                return Err(lost(peer, &error));
            }
        }
    }
}

async fn send_blobs(
    link: &mut Link,
    subject: &Subject,
    digests: &[String],
    reporter: &mut Reporter,
) -> Result<()> {
    let offered: BTreeMap<_, _> = subject.offer.blobs.iter().map(|b| (b.digest.as_str(), b.size)).collect();
    let sizes = digests.iter().map(|d| offered.get(d.as_str()).copied());
    let sizes: Option<Vec<u64>> = sizes.collect();
    let sizes = sizes.context("it asked for a blob that was not offered")?;
    let total = sizes.iter().sum();
    let mut done = 0;
    for (digest, size) in digests.iter().zip(sizes) {
        link.say(Message::Blob { digest: digest.clone(), size }).await?;
        let mut reader = subject.containerd.blob_reader(digest).await?;
        while let Some(data) = reader.next().await? {
            for piece in data.chunks(MAX_DATA) {
                link.send(Frame::Data(piece.to_vec())).await?;
                done += piece.len() as u64;
                reporter.progress("blobs", done, Some(total));
            }
        }
    }
    Ok(())
}

/// Has the shim send the container, to its end.
#[allow(clippy::too_many_arguments)] // one call, and each of them is something else
async fn send(
    agent: &Agent,
    request: &MigrateRequest,
    link: &mut Link,
    subject: &Subject,
    ready: &Ready,
    address: SocketAddr,
    report: &mut Report,
    reporter: &mut Reporter,
) -> Outcome<Option<Started>> {
    let peer = report.to.clone();
    let start = async {
        fault::pause("dial", &request.container).await;
        let connection = peer::tcp(address).await?.into_std()?;
        // the shim's threads read and write blocking
        connection.set_nonblocking(false)?;
        let send = SendRequest {
            migration_id: ready.migration.clone(),
            ticket: ready.ticket.clone(),
            node: agent.node.clone(),
            peer: peer.clone(),
            address: request.to.clone(),
            tls: agent.config.pki().material()?,
            tuning: agent.config.migration.tuning(&request.tuning),
            limits: agent.config.limits(request.silence_seconds, request.ghost_limit, u64::MAX),
        };
        let id = &subject.record.id;
        control::client::call(&request.namespace, id, control::Request::Send(send), vec![connection.into()])
            .await
    };
    let mut events = match start.await {
        Ok(events) => events,
        Err(error) => {
            cancel(link, &format!("{error:#}")).await;
            return Err(lost(&peer, &error));
        }
    };
    let (mut there, mut early) = (None, None);
    let mut abort: Option<tokio::task::JoinHandle<()>> = None;
    let undecided = || {
        let undecided = Undecided {
            containerd: subject.containerd.clone(),
            record: subject.record.clone(),
            migration: ready.migration.clone(),
            to: request.to.clone(),
        };
        (undecided, agent.config.silence(request.silence_seconds))
    };
    loop {
        // whoever prepared the container there is gone: nobody would tell its containerd that it runs
        if let (Some(Err(_)), None, None) = (&there, &early, &abort) {
            let (namespace, id) = (request.namespace.clone(), subject.record.id.clone());
            abort = Some(tokio::spawn(async move { control::client::abort(&namespace, &id).await }));
        }
        let event = tokio::select! {
            event = events.recv() => event,
            // what goes wrong there reaches the shim too; kept for the words
            heard = link.hear(), if there.is_none() => {
                match heard {
                    Ok(Message::Failed { failure, left }) => there = Some(Ok((failure, left))),
                    Ok(Message::Warning { message }) => reporter.say(Event::Warning { message }),
                    // the other agent may be faster than this node's shim
                    Ok(Message::Started(started)) => early = Some(started),
                    Ok(_) => {}
                    Err(error) => there = Some(Err(error)),
                }
                continue;
            }
        };
        match event {
            Some(control::Event::Phase { phase }) => match phase.as_str() {
                "prepare" => {} // of the shim; to the operator it is part of the transfer
                "clean up" => reporter.phase("running"),
                other => reporter.phase(other),
            },
            Some(control::Event::Progress { bytes, total }) => reporter.progress("memory", bytes, total),
            Some(control::Event::Round { n, total }) => reporter.round(n, total),
            Some(control::Event::RoundDone { round }) => reporter.say(Event::RoundDone { round }),
            Some(control::Event::PostCopy { bytes, total }) => {
                reporter.phase("post-copy");
                reporter.progress("following", bytes, Some(total));
            }
            Some(control::Event::Warning { message }) => reporter.say(Event::Warning { message }),
            Some(control::Event::Undecided { message }) => {
                let (undecided, silence) = undecided();
                follow_undecided(agent, &undecided, message, &peer, silence, reporter).await?;
                return Ok(Some(early.unwrap_or_default()));
            }
            Some(control::Event::Done { report: measured }) => {
                report.freeze_ms = measured.freeze_ms;
                report.bytes_sent = measured.bytes_sent;
                report.warnings.extend(measured.warnings.iter().cloned());
                report.shim = serde_json::to_value(&measured).ok();
                return Ok(early);
            }
            // a shim that is to thaw says that it is undecided: the copy there must be dead first
            Some(control::Event::Failed { failure, .. }) if failure.phase == loss::PHASE => {
                let id = &subject.record.id;
                return Err(lost_after(failure, OnPostCopyFailure::Kill, agent, &peer, id));
            }
            Some(control::Event::Failed { failure, state }) => {
                return Err(failed_here(link, failure, &state, there, agent, &peer, subject).await);
            }
            // answers to other questions
            Some(control::Event::Inspected(_) | control::Event::Admitted) => {}
            None if reporter.phase_name() == loss::PHASE => {
                // the frozen copy here died with it, with memory that the destination does not have
                leftovers::images_of_source(&agent.config.images_dir, &ready.migration).await;
                let (undecided, silence) = undecided();
                return match undecided.hear_of_end(agent, silence * 2).await {
                    // it had everything by then
                    Some(Fate::Runs) => Ok(Some(early.unwrap_or_default())),
                    fate => Err(setback::shim_died(agent, &peer, &subject.record.id, fate)),
                };
            }
            None => {
                // its tasks ended with it; whether the commit went out before, the other side knows
                leftovers::images_of_source(&agent.config.images_dir, &ready.migration).await;
                let heard = match (early, there) {
                    (Some(started), _) => Ok(started),
                    (None, Some(Ok((failure, left)))) => Err(Some((failure, left))),
                    (None, _) => {
                        let (undecided, silence) = undecided();
                        setback::hear_of_end(agent, link, &undecided, silence).await
                    }
                };
                let id = &subject.record.id;
                return match heard {
                    Ok(mut started) => {
                        let warning = format!("the shim of {id} on {} died after the commit", agent.node);
                        started.warnings.push(warning);
                        Ok(Some(started))
                    }
                    Err(there) => Err(setback::shim_died_before(agent, &peer, id, there)),
                };
            }
        }
    }
}

async fn started(link: &mut Link) -> Result<Started> {
    if link.is_over() {
        bail!("the connection to it was lost");
    }
    loop {
        match link.hear().await? {
            Message::Started(started) => return Ok(started),
            Message::Failed { failure, .. } => return Err(failure.into()),
            _ => {}
        }
    }
}

/// Sends the layer of a container that does not run.
async fn send_cold(
    link: &mut Link,
    subject: &Subject,
    report: &mut Report,
    reporter: &mut Reporter,
    peer: &str,
) -> Outcome<()> {
    reporter.phase("layer");
    let (containerd, record) = (&subject.containerd, &subject.record);
    let sent = async {
        let mounts = containerd.snapshot_mounts(&record.snapshotter, &record.snapshot_key).await?;
        layer::send(link, layer::of_mounts(&mounts)?).await
    };
    let stats = match sent.await {
        Ok(stats) => stats,
        Err(error) => {
            cancel(link, &format!("{error:#}")).await;
            return Err(lost(peer, &error));
        }
    };
    report.bytes_sent = stats.bytes_data;
    // from here on it may be complete there without us hearing of it; it runs on neither side
    match started(link).await {
        Ok(started) => {
            report.warnings.extend(started.warnings);
            Ok(())
        }
        Err(error) => match error.downcast::<Failure>() {
            Ok(failure) => Err(failed_there(failure, &[], peer)),
            Err(error) => {
                let mut report = lost(peer, &error);
                report.state =
                    format!("{} is here as before; look on {peer} whether it is there too", record.id);
                Err(report)
            }
        },
    }
}
