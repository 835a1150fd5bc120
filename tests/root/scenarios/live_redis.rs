//! A redis with much memory under load moves again and again; its one client loses nothing and gets no wrong reply.

use anyhow::Result;

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::client::Client;
use crate::live::{self, MODES};
use crate::moves;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "live_redis_many_moves", needs: Needs::Migration, run: many_moves }];

fn many_moves(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.4.1")?;
    // the client writes the data, counts under load, and reads all of the data back at the end
    let client = Client::start(bed, &redis.ip, &["--fill-mb", "200", "--rate", "1000"])?;
    let mut at = Node::A;
    for n in 0..4 {
        let options = live::known(bed, MODES[n % MODES.len()])?;
        let outcome = moves::attempt(bed, &redis.id, at, at.other().address(), &options)?;
        anyhow::ensure!(outcome.code == 0, "move {n} {options:?}: {} {}", outcome.json, outcome.stderr);
        at = at.other();
    }
    client.finish_intact()?;
    live::no_traces(bed, at)?;
    moves::stop_redis(bed, at, &redis)
}
