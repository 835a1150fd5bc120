//! The containers of the matrix: one redis for each place, each with a client on one connection that checks every reply.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::fault::Fate;
use super::place::{self, PLACES};
use crate::bed::{Bed, Node, wait_for};
use crate::client::Client;
use crate::container::{self, Run};
use crate::moves;

/// One container with its client.
pub struct Ship {
    /// Its id, and the name of its network.
    pub id: String,
    ip: String,
    client: Option<Client>,
    /// Replies that the client has had when it was last looked at.
    replies: u64,
}

/// All of them; on node a whenever nothing happens.
pub struct Fleet<'a> {
    bed: &'a Bed,
    /// In the order of [`PLACES`].
    pub ships: Vec<Ship>,
}

/// What `transship ps` says on a node, by container.
pub fn states(bed: &Bed, node: Node) -> Result<BTreeMap<String, String>> {
    let text = bed.ok(node, &["transship", "ps", "--json"])?;
    let said: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
        .with_context(|| format!("transship ps on node {}: {text}", node.name()))?;
    let listed = said["containers"].as_array().context("no list of containers")?;
    let pair = |c: &Value| Some((c["container"].as_str()?.to_owned(), c["state"].as_str()?.to_owned()));
    Ok(listed.iter().filter_map(pair).collect())
}

/// What has become of a container, from what both nodes say of it; None: nothing that may last.
pub fn fate(here: Option<&str>, there: Option<&str>) -> Option<Fate> {
    let dead = |state: Option<&str>| matches!(state, None | Some("none" | "stopped" | "lost"));
    match (here, there) {
        (Some("running"), None) => Some(Fate::Here),
        (Some("undecided"), there) if dead(there) => Some(Fate::Frozen),
        (None, Some("running")) => Some(Fate::There),
        (here, there) if dead(here) && dead(there) => Some(Fate::Ended),
        _ => None,
    }
}

impl<'a> Fleet<'a> {
    /// Starts one for each place.
    pub fn start(bed: &'a Bed) -> Result<Fleet<'a>> {
        Self::of(bed, PLACES.len())
    }

    /// Starts so many.
    pub fn of(bed: &'a Bed, ships: usize) -> Result<Fleet<'a>> {
        let ship = |number| Ship {
            id: place::id(number),
            ip: format!("10.77.8.{}", number + 1),
            client: None,
            replies: 0,
        };
        let mut fleet = Fleet { bed, ships: (0..ships).map(ship).collect() };
        fleet.each(|bed, ship| ship.start(bed))?;
        Ok(fleet)
    }

    /// Does something with every container, three at a time.
    pub fn each(&mut self, work: impl Fn(&Bed, &mut Ship) -> Result<()> + Sync) -> Result<()> {
        let bed = self.bed;
        let size = self.ships.len().div_ceil(3);
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = self
                .ships
                .chunks_mut(size)
                .map(|ships| {
                    scope.spawn(move || {
                        ships.iter_mut().try_for_each(|s| work(bed, s).with_context(|| s.id.clone()))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
        })
    }

    /// Those that have ended are started anew on node a; those on node b come back.
    pub fn gather(&mut self, fates: &BTreeMap<String, Fate>) -> Result<()> {
        self.each(|bed, ship| match fates.get(&ship.id) {
            Some(Fate::Ended) => {
                ship.forget(bed)?;
                ship.start(bed)
            }
            Some(Fate::There) => ship.carry(bed, Node::B),
            _ => Ok(()),
        })?;
        // each client has to have its reply, but they may wait together
        self.ships.iter_mut().try_for_each(|s| s.goes_on().with_context(|| s.id.clone()))
    }

    /// Ends all, with the clients' verdicts.
    pub fn finish(mut self) -> Result<()> {
        self.each(|bed, ship| {
            let client = ship.client.take().context("no client")?;
            client.finish_intact()?;
            ship.forget(bed)
        })
    }
}

impl Ship {
    fn start(&mut self, bed: &Bed) -> Result<()> {
        container::pod(bed, Node::A, &self.id, &self.ip)?;
        Run::new(bed, &self.id, "redis").pod(&self.id).options(&["--null-io"]).start(Node::A)?;
        wait_for(Duration::from_secs(20), "redis answers", || {
            Ok(container::exec(bed, Node::A, &self.id, &["redis-cli", "ping"])?.stdout.starts_with(b"PONG"))
        })?;
        let options = ["--fill-mb", "1", "--rate", "20", "--gap-ms", "1000", "--timeout", "120"];
        self.client = Some(Client::start(bed, &self.ip, &options)?);
        self.replies = 0;
        Ok(())
    }

    /// Moves it to the other node, and sees that its client goes on.
    pub fn go(&mut self, bed: &Bed, from: Node) -> Result<()> {
        self.carry(bed, from)?;
        self.goes_on()
    }

    fn carry(&mut self, bed: &Bed, from: Node) -> Result<()> {
        self.mark()?;
        let moved = moves::attempt(bed, &self.id, from, from.other().address(), &[])?;
        ensure!(moved.code == 0, "from node {}: {} {}", from.name(), moved.json, moved.stderr);
        Ok(())
    }

    /// Removes what is left of it on both nodes.
    fn forget(&mut self, bed: &Bed) -> Result<()> {
        self.client = None;
        for node in Node::ALL {
            if bed.ok(node, &["ctr", "container", "ls", "-q"])?.lines().any(|id| id == self.id) {
                container::delete(bed, node, &self.id)?;
            }
            container::unpod(bed, node, &self.id)?;
        }
        Ok(())
    }

    /// Its client gets replies, each as it must be.
    pub fn goes_on(&mut self) -> Result<()> {
        let client = self.client.as_ref().context("no client")?;
        let before = self.replies;
        let mut last = Value::Null;
        // a client whose peer was away waits longer and longer between its attempts
        let answered = wait_for(Duration::from_secs(45), "replies", || {
            last = client.events()?.into_iter().rfind(|e| e["event"] == "tick").unwrap_or_default();
            ensure!(
                last["wrong"].as_u64().unwrap_or(0) == 0 && last["lost"].as_u64().unwrap_or(0) == 0,
                "wrong replies: {last}"
            );
            Ok(last["replies"].as_u64().is_some_and(|replies| replies > before + 2))
        });
        answered.with_context(|| format!("its client, after {before} replies: {last}"))?;
        self.replies = last["replies"].as_u64().unwrap_or(before);
        Ok(())
    }

    /// Whether it answers on a new connection, and its client has had no wrong reply.
    pub fn is_whole(&self, bed: &Bed, node: Node) -> Result<bool> {
        let pong = container::exec(bed, node, &self.id, &["redis-cli", "ping"])?;
        let events = self.client.as_ref().context("no client")?.events()?;
        let wrong = events.iter().any(|e| e["wrong"].as_u64().is_some_and(|wrong| wrong > 0));
        Ok(pong.stdout.starts_with(b"PONG") && !wrong)
    }

    /// What its client has had so far counts as old.
    pub fn mark(&mut self) -> Result<()> {
        let events = self.client.as_ref().context("no client")?.events()?;
        let last = events.iter().rfind(|e| e["event"] == "tick");
        self.replies = last.and_then(|e| e["replies"].as_u64()).unwrap_or(self.replies);
        Ok(())
    }
}
