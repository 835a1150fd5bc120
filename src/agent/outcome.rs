//! What became of migrations whose answer was lost: the destination keeps it, the source asks for it.
//!
//! Only what is known for certain is kept: `Runs` once the shim has it running with all of its memory, `Aborted` once everything
//! of it was undone, `Lost` or `GivenBack` once it was killed for memory that was lost. A source that is told anything else keeps its container frozen.

use std::{
    fs,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Agent, departed::clean_up, filling, layer::name, message::Message, peer, placed::Placed};
use crate::{
    containerd::{Containerd, Namespace, record::Record},
    control::{self, Decision, MigrationState},
    journal, net,
};

/// What became of a migration.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The container runs on the destination, or did.
    Runs,
    /// Nothing of it is on the destination, and it will never run there.
    Aborted,
    /// It ran on the destination and was killed there, because memory that was still on the source was lost; its frozen copy is
    /// to be killed too.
    Lost,
    /// The same, and the source shall run it on from its freeze.
    GivenBack,
    /// It is not known, or not yet.
    #[serde(other)]
    Unknown,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    fate: Fate,
    source: String,
}

/// Between two questions to the destination.
const PAUSE: Duration = Duration::from_secs(2);
/// Between two looks whether the operator has decided.
const LOOK: Duration = Duration::from_millis(300);

/// The most outcomes that are kept; the oldest go first.
const MOST: usize = 4096;

fn path(migration: &str) -> Option<PathBuf> {
    let fine = migration.len() == 32 && migration.bytes().all(|b| b.is_ascii_hexdigit());
    fine.then(|| journal::dir("outcomes").join(format!("{migration}.json")))
}

/// Keeps the fate of a migration that came from `source`.
pub fn keep(migration: &str, source: &str, fate: Fate) {
    let Some(path) = path(migration) else { return };
    let write = || -> Result<()> {
        journal::write(&path, &Kept { fate, source: source.into() })?;
        forget(path.parent().context("no directory")?)
    };
    if let Err(error) = write() {
        log::warn!("keeping the outcome of migration {migration}: {error:#}");
    }
}

fn forget(dir: &std::path::Path) -> Result<()> {
    let mut all: Vec<_> = fs::read_dir(dir)?
        .flatten()
        .filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f.path())))
        .collect();
    let most = all.len().saturating_sub(MOST);
    all.sort();
    for (_, path) in &all[..most] {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// The fate of a migration, as far as `source` may know.
pub fn recall(migration: &str, source: &str) -> Fate {
    let kept = path(migration).and_then(|p| journal::read::<Kept>(&p));
    kept.filter(|k| k.source == source).map_or(Fate::Unknown, |k| k.fate)
}

/// A container that is frozen here since its commit was sent without an answer.
#[derive(Debug)]
pub struct Undecided {
    /// containerd's namespace.
    pub containerd: Namespace,
    /// Its record.
    pub record: Record,
    /// The migration.
    pub migration: String,
    /// Where the destination's agent is.
    pub to: String,
}

impl Undecided {
    async fn is_undecided(&self) -> bool {
        let inspected = control::client::inspect(self.containerd.name(), &self.record.id).await;
        inspected.is_ok_and(|i| matches!(i.migration, MigrationState::Undecided { .. }))
    }

    /// Ends when it was decided in another way.
    async fn decided(&self) {
        while self.is_undecided().await {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Does what follows from the destination's answer; false while there is none.
    async fn settle(&self, fate: Fate) -> Result<bool> {
        let (namespace, id) = (self.containerd.name(), &self.record.id);
        let decision = match fate {
            Fate::Runs | Fate::Lost => Decision::Moved,
            Fate::Aborted | Fate::GivenBack => Decision::Stay,
            Fate::Unknown => return Ok(false),
        };
        log::info!("{namespace}/{id}: {} says of migration {}: {fate:?}", self.to, self.migration);
        let mut events =
            control::client::call(namespace, id, control::Request::Resolve { decision }, Vec::new()).await?;
        while let Some(event) = events.recv().await {
            if let control::Event::Failed { failure, .. } = event {
                bail!(failure);
            }
        }
        Ok(true)
    }

    /// Asks for as long as the destination answers that it does not know yet, up to `limit`. `None`: it is
    /// still undecided, or the destination did not answer.
    pub async fn ask_soon(&self, agent: &Agent, limit: Duration) -> Option<Fate> {
        let start = Instant::now();
        loop {
            let fate = tokio::time::timeout(limit, self.question(agent)).await.ok()?.ok()?;
            if self.settle(fate).await.ok()? {
                return Some(fate);
            }
            if start.elapsed() > limit {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Asks until the destination knows what became of it, up to `limit`. Nothing is done about it.
    pub async fn hear_of_end(&self, agent: &Agent, limit: Duration) -> Option<Fate> {
        let start = Instant::now();
        while start.elapsed() < limit {
            match tokio::time::timeout(limit, self.question(agent)).await {
                Ok(Ok(fate)) if fate != Fate::Unknown => return Some(fate),
                Ok(Err(error)) => log::debug!("asking {}: {error:#}", self.to),
                _ => {}
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        None
    }

    async fn question(&self, agent: &Agent) -> Result<Fate> {
        let silence = agent.config.silence(0);
        let pki = agent.config.pki();
        let mut link =
            peer::dial(&self.to, &pki, &agent.node, silence).await.map_err(|e| anyhow::anyhow!("{e}"))?.link;
        link.say(Message::Ask { migration: self.migration.clone() }).await?;
        match link.hear().await? {
            Message::Fate { fate } => Ok(fate),
            other => bail!("{} answered {}", self.to, name(&other)),
        }
    }

    /// Asks until it is decided, one way or another. [`Fate::Unknown`]: by the operator.
    pub async fn pursue(&self, agent: &Agent) -> Fate {
        loop {
            // only the question can be given up: what follows from its answer is done whole
            let answer = tokio::select! {
                answer = self.question(agent) => answer,
                () = self.decided() => return Fate::Unknown,
            };
            let settled = match answer {
                Ok(fate) => self.settle(fate).await.map(|settled| settled.then_some(fate)),
                Err(error) => Err(error),
            };
            match settled {
                Ok(Some(fate)) => return fate,
                Ok(None) => {}
                Err(error) => log::debug!("asking {} for migration {}: {error:#}", self.to, self.migration),
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = self.decided() => return Fate::Unknown,
            }
        }
    }
}

/// Goes on with what an earlier run of this agent did not see the end of: asks for what is undecided, removes what is left of
/// containers that have moved.
pub async fn resume(agent: &std::sync::Arc<Agent>) -> Result<()> {
    let containerd = Containerd::connect(&agent.config.containerd).await?;
    for namespace in containerd.namespaces().await? {
        let containerd = containerd.namespace(&namespace)?;
        let records = containerd.container_list().await?;
        for record in records.into_iter().filter(|r| super::ps::is_ours(&namespace, r)) {
            let Ok(inspected) = control::client::inspect(&namespace, &record.id).await else { continue };
            let (migration_id, address) = match inspected.migration {
                MigrationState::Undecided { migration_id, address, .. } => (migration_id, address),
                MigrationState::Moved { .. } => {
                    log::info!("leftover: {namespace}/{} has moved; removing what is left of it", record.id);
                    for note in clean_up(&containerd, &record, true, false).await {
                        log::info!("{namespace}/{}: {note}", record.id);
                    }
                    continue;
                }
                MigrationState::Filling { migration_id, peer, .. }
                | MigrationState::Lost { migration_id, peer, .. } => {
                    tokio::spawn(filling::follow(namespace.clone(), record.id, migration_id, peer));
                    continue;
                }
                _ => continue,
            };
            log::warn!("{namespace}/{} is undecided; asking {address}", record.id);
            let undecided =
                Undecided { containerd: containerd.clone(), record, migration: migration_id, to: address };
            let agent = agent.clone();
            tokio::spawn(async move {
                if matches!(undecided.pursue(&agent).await, Fate::Runs | Fate::Lost) {
                    clean_up(&undecided.containerd, &undecided.record, true, false).await;
                }
            });
        }
    }
    Ok(())
}

/// The destination's answer. A container that runs is announced anew: what was sent when it came may have been lost
/// with the answer.
pub async fn answer(agent: &Agent, migration: &str, source: &str) -> Message {
    let fate = recall(migration, source);
    match fate {
        Fate::Runs => announce_again(migration).await,
        // the source runs it now that it knows: what was killed here must not be started again
        Fate::GivenBack => {
            if let Err(error) = give_back(agent, migration).await {
                log::warn!("removing what came by migration {migration} and was given back: {error:#}");
            }
        }
        _ => {}
    }
    Message::Fate { fate }
}

async fn give_back(agent: &Agent, migration: &str) -> Result<()> {
    let Some(placed) = Placed::by_migration(migration) else { return Ok(()) };
    let containerd = Containerd::connect(&agent.config.containerd).await?.namespace(&placed.namespace)?;
    let Some(record) = containerd.container(&placed.id).await? else { return Ok(()) };
    tokio::spawn(async move {
        for note in clean_up(&containerd, &record, true, false).await {
            log::info!("{}/{}, given back: {note}", placed.namespace, placed.id);
        }
    });
    Ok(())
}

/// Announces the addresses of the container that came by this migration, if it is still here.
pub async fn announce_again(migration: &str) {
    let Some(path) = Placed::by_migration(migration).and_then(|p| p.netns) else { return };
    let announced = tokio::task::spawn_blocking(move || {
        let netns = net::open(&path)?;
        let config = net::capture(netns.as_fd())?;
        net::announce(netns.as_fd(), &config)
    });
    if let Ok(Err(error)) = announced.await {
        log::warn!("announcing the addresses of migration {migration} again: {error:#}");
    }
}
