//! The node's daemon: the control plane of migrations.
//!
//! | file | what lives there |
//! |---|---|
//! | [`config`] | `/etc/transship/agent.toml` |
//! | [`api`] | the unix socket for the command line: messages, exit codes, client |
//! | [`admission`], [`tickets`], [`ticket`] | which node may move a container here at all; tickets for one move, and giving one out |
//! | [`strangers`] | connections that have not shown a certificate: how many, and who makes room |
//! | [`server`] | the port for peers and the unix socket: who gets in, and to whom they are handed |
//! | [`message`], [`link`] | what agents say to each other, and how |
//! | [`peer`] | dialling another agent |
//! | [`examine`] | what there is to know of a container before it is moved |
//! | [`source`] | `migrate`: this node gives a container away |
//! | [`setback`] | what its operator is told when that fails |
//! | [`destination`] | this node takes a container |
//! | [`filling`] | one that runs here while memory of it is still on the source |
//! | [`departed`] | what is left of containers that have gone to another node |
//! | [`placement`] | making a container here step by step |
//! | [`placed`] | the journal of that, undoing it, and what is remembered of containers that came |
//! | [`preflight`], [`host`], [`spec`], [`pod`] | does it fit here, may it leave |
//! | [`pending`], [`candidates`] | data connections that are waited for; which of them is the source's |
//! | [`layer`] | the writable layer of a container that does not run |
//! | [`outcome`] | what became of migrations whose answer was lost |
//! | [`netns`] | network namespaces of containers that come and go |
//! | [`local`], [`draft`] | checkpoint, restore, resolve; a checkpoint file while it is written |
//! | [`ps`] | the list of containers |
//! | [`leftovers`] | what an earlier run left, and what goes with deleted containers |
//! | [`reporter`] | what a client is told of a request's course |
//!
//! No byte of a running container's memory passes through here: the shims speak with each other
//! ([`crate::migrate`]).

// one error a request, and it is read by a person: its size does not matter
#![allow(clippy::result_large_err)]

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::sync::Semaphore;

use crate::{control::RUN_DIR, private};

pub mod admission;
pub mod api;
pub mod candidates;
pub mod config;
pub mod departed;
pub mod destination;
pub mod draft;
pub mod examine;
pub mod filling;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod host;
pub mod layer;
pub mod leftovers;
pub mod link;
pub mod local;
pub mod message;
pub mod netns;
pub mod outcome;
pub mod peer;
pub mod pending;
pub mod placed;
pub mod placement;
pub mod pod;
pub mod preflight;
pub mod ps;
pub mod reporter;
pub mod server;
pub mod setback;
pub mod source;
pub mod spec;
pub mod strangers;
pub mod ticket;
pub mod tickets;

pub use config::Config;

/// What all of the agent's tasks share.
#[derive(Debug)]
pub struct Agent {
    /// The configuration.
    pub config: Config,
    /// This node's name.
    pub node: String,
    /// Data connections that are waited for.
    pub pending: pending::Pending,
    /// What this node's operator has allowed for once.
    pub tickets: tickets::Tickets,
    /// Containers that something is being done with.
    pub busy: Busy,
    /// Room for containers that arrive.
    pub incoming: Semaphore,
}

impl Agent {
    /// One that does nothing yet.
    pub fn new(config: Config) -> Agent {
        Agent {
            node: config.node_name(),
            pending: pending::Pending::default(),
            tickets: tickets::Tickets::default(),
            busy: Busy::default(),
            incoming: Semaphore::new(config.max_incoming),
            config,
        }
    }

    /// This node's name as others see it: in its certificate, whatever the configuration calls it.
    pub fn certified_name(&self) -> String {
        self.config.pki().node_name().unwrap_or_else(|_| self.node.clone())
    }
}

/// Containers that something is being done with, and what. One thing at a time.
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<Mutex<HashMap<(String, String), String>>>);

impl Busy {
    /// Takes a container, if it is free; it is free again when the answer is dropped.
    pub fn enter(&self, namespace: &str, id: &str, what: &str) -> Option<BusyGuard> {
        let key = (namespace.to_string(), id.to_string());
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(&key) {
            return None;
        }
        all.insert(key.clone(), what.into());
        Some(BusyGuard { busy: self.clone(), key })
    }

    /// [`Busy::enter`], for which somebody who is doing one of `ending` is waited for up to `patience`.
    pub async fn enter_after(
        &self,
        namespace: &str,
        id: &str,
        what: &str,
        ending: &[&str],
        patience: Duration,
    ) -> Option<BusyGuard> {
        let since = std::time::Instant::now();
        loop {
            if let Some(guard) = self.enter(namespace, id, what) {
                return Some(guard);
            }
            let now = self.what(namespace, id);
            if now.is_some_and(|now| !ending.contains(&now.as_str())) || since.elapsed() > patience {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What is being done with a container.
    pub fn what(&self, namespace: &str, id: &str) -> Option<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&(namespace.to_string(), id.to_string())).cloned()
    }
}

/// See [`Busy::enter`].
#[derive(Debug)]
pub struct BusyGuard {
    busy: Busy,
    key: (String, String),
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.busy.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Runs the agent until SIGINT or SIGTERM, on a runtime of its own with one thread: nearly all of its time it waits.
///
/// # Errors
/// As [`serve`].
pub fn run(config: Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting the runtime")?.block_on(serve(config))
}

/// Serves until SIGINT or SIGTERM. Needs a tokio runtime with I/O and time; either flavour.
///
/// # Errors
/// A socket cannot be opened, or the certificates cannot be read.
pub async fn serve(config: Config) -> Result<()> {
    // better now than at the first migration
    config.pki().server(&[crate::tls::ALPN_CONTROL])?;
    let agent = Arc::new(Agent::new(config));
    private::dir(Path::new(RUN_DIR))?;
    let images = &agent.config.images_dir;
    private::refuse_shared(images)
        .with_context(|| format!("images_dir = {}: name a directory of root's", images.display()))?;
    match admission::in_words(&agent.config) {
        (policy, true) => log::warn!("{policy} (accept_from has \"*\")"),
        (policy, false) => log::info!("{policy}"),
    }
    leftovers::sweep(&agent).await;
    if let Err(error) = outcome::resume(&agent).await {
        log::warn!("looking for undecided migrations: {error:#}");
    }
    let peers = server::bind_peers(&agent).await?;
    let cli = server::bind_cli(&agent)?;
    log::info!(
        "agent of {}: peers on {}, command line on {}",
        agent.node,
        agent.config.listen,
        agent.config.socket.display()
    );
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("listening for SIGTERM")?;
    tokio::select! {
        _ = server::serve_peers(agent.clone(), peers) => {}
        _ = server::serve_cli(agent.clone(), cli) => {}
        () = leftovers::follow_deletions(agent.clone()) => {}
        () = leftovers::tidy(agent.clone()) => {}
        _ = terminate.recv() => log::info!("SIGTERM: going"),
        _ = tokio::signal::ctrl_c() => log::info!("SIGINT: going"),
    }
    let _ = std::fs::remove_file(&agent.config.socket);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_at_a_time() {
        let busy = Busy::default();
        let guard = busy.enter("default", "c", "leaving").unwrap();
        assert!(busy.enter("default", "c", "x").is_none());
        assert!(busy.enter("other", "c", "x").is_some());
        assert_eq!(busy.what("default", "c").as_deref(), Some("leaving"));
        drop(guard);
        assert!(busy.enter("default", "c", "x").is_some());
    }

    #[tokio::test]
    async fn only_what_comes_to_its_end_is_waited_for() {
        let busy = Busy::default();
        let patience = Duration::from_secs(60);
        let enter = || busy.enter_after("default", "c", "new", &["undone", "tidied"], patience);
        let guard = busy.enter("default", "c", "leaving").unwrap();
        // at once
        let soon = tokio::time::timeout(patience / 4, enter()).await;
        assert!(soon.is_ok_and(|entered| entered.is_none()));
        drop(guard);
        let guard = busy.enter("default", "c", "undone").unwrap();
        let ends = async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            drop(guard);
        };
        let (entered, ()) = tokio::join!(enter(), ends);
        assert!(entered.is_some());
        assert_eq!(busy.what("default", "c").as_deref(), Some("new"));
    }
}
