//! A running redis moves while its client stays connected.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::client::Client;
use crate::container;
use crate::moves;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[Scenario {
    name: "redis_moves_there_and_back",
    needs: Needs::Migration,
    run: redis_moves_there_and_back,
}];

fn redis_moves_there_and_back(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.4.1")?;
    let client = Client::start(bed, &redis.ip, &["--fill-mb", "16"])?;
    for (from, to) in [(Node::A, Node::B), (Node::B, Node::A)] {
        let report = moves::migrate(bed, &redis.id, from, to)?;
        ensure!(report["freeze_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
        let ping = container::exec(bed, to, &redis.id, &["redis-cli", "ping"])?;
        ensure!(ping.stdout.starts_with(b"PONG"), "{ping:?}");
    }
    client.finish_intact()?;
    moves::stop_redis(bed, Node::A, &redis)
}
