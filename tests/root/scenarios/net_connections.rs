//! TCP connections of a container that moves: none breaks and no byte is lost, whoever opened it and whatever is under way.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::client::Client;
use crate::container;
use crate::moves;
use crate::requirements::Needs;
use crate::traffic::{self, CLIENT, Outside, expect_right, last_number, tail};
use crate::trouble::{self, Attempt, Fault};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "net_redis_four_moves", needs: Needs::Migration, run: redis_four_moves },
    Scenario { name: "net_container_is_the_client", needs: Needs::Migration, run: container_is_the_client },
    Scenario { name: "net_peer_on_the_nodes", needs: Needs::Migration, run: peer_on_the_nodes },
    Scenario { name: "net_ipv6_connection", needs: Needs::Migration, run: ipv6_connection },
    Scenario { name: "net_idle_connection", needs: Needs::Migration, run: idle_connection },
    Scenario { name: "net_datagrams_into_the_freeze", needs: Needs::Migration, run: datagrams },
    Scenario { name: "net_full_buffers", needs: Needs::Migration, run: full_buffers },
];

fn redis_four_moves(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.4.1")?;
    let client = Client::start(bed, &redis.ip, &["--fill-mb", "16"])?;
    let mut from = Node::A;
    for _ in 0..4 {
        moves::migrate(bed, &redis.id, from, from.other())?;
        from = from.other();
    }
    let report = client.finish_intact()?;
    ensure!(report["replies"].as_u64().is_some_and(|n| n > 100), "{report}");
    moves::stop_redis(bed, from, &redis)
}

/// A pod at `ip` on node a with ts-probe ARGS, its output in the log.
fn probe(bed: &Bed, ip: &str, args: &[&str]) -> Result<()> {
    container::pod(bed, Node::A, "n1", ip)?;
    let command: Vec<&str> = ["ts-probe"].iter().chain(args).copied().collect();
    traffic::start(bed, Node::A, "n1", &["--with-ns", "network:/run/netns/n1"], &command)
}

fn remove(bed: &Bed, node: Node) -> Result<()> {
    container::delete(bed, node, "n1")?;
    container::unpod(bed, node, "n1")
}

/// Moves it there and back; both sides must receive more than they had after every move.
fn moves_under_traffic(bed: &Bed, outside: &Outside) -> Result<()> {
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "n1", from, from.other())?;
        let (inside, outside_log) = (traffic::inside(bed, "n1")?, outside.said()?);
        let before = [last_number(&inside, "received")?, last_number(&outside_log, "received")?];
        let more = |log: String, before: u64| last_number(&log, "received").map(|now| now > before + 3);
        let limit = Duration::from_secs(10);
        let all = wait_for(limit, "both sides receive", || {
            let inside = more(traffic::inside(bed, "n1")?, before[0])?;
            Ok(inside && more(outside.said()?, before[1])?)
        });
        all.map_err(|e| {
            let inside = traffic::inside(bed, "n1").unwrap_or_default();
            e.context(format!(
                "inside {}\noutside {}",
                tail(&inside),
                tail(&outside.said().unwrap_or_default())
            ))
        })?;
    }
    expect_right(&traffic::inside(bed, "n1")?)?;
    expect_right(&outside.said()?)
}

fn container_is_the_client(bed: &Bed) -> Result<()> {
    let mut outside = Outside::start(bed, &["tcp-echo", "7001", "--every", "5"])?;
    outside.wait("tcp listening")?;
    probe(bed, "10.77.5.1", &["tcp-connect", CLIENT, "7001", "--every", "5"])?;
    outside.receives()?;
    moves_under_traffic(bed, &outside)?;
    remove(bed, Node::A)
}

/// The peer is another container, first on the same node, then on the other one.
fn peer_on_the_nodes(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "n2", "10.77.5.2")?;
    let echo = ["ts-probe", "tcp-echo", "7002", "--every", "5"];
    traffic::start(bed, Node::A, "n2", &["--with-ns", "network:/run/netns/n2"], &echo)?;
    traffic::wait_inside(bed, "n2", "tcp listening")?;
    probe(bed, "10.77.5.1", &["tcp-connect", "10.77.5.2", "7002", "--every", "5"])?;
    traffic::receives_inside(bed, "n2")?;
    // away from its peer, the peer after it, and back beside where both began
    let steps = [("n1", Node::A), ("n2", Node::A), ("n1", Node::B)];
    for (id, from) in steps {
        moves::migrate(bed, id, from, from.other())?;
        for side in ["n1", "n2"] {
            let wanted = last_number(&traffic::inside(bed, side)?, "received")? + 5;
            wait_for(Duration::from_secs(10), &format!("{side} receives after {id}'s move"), || {
                Ok(last_number(&traffic::inside(bed, side)?, "received")? >= wanted)
            })?;
        }
    }
    for id in ["n1", "n2"] {
        expect_right(&traffic::inside(bed, id)?)?;
    }
    for (id, node) in [("n1", Node::A), ("n2", Node::B)] {
        container::delete(bed, node, id)?;
        container::unpod(bed, node, id)?;
    }
    Ok(())
}

/// Datagrams are sent once: what comes while nobody runs must be kept for whoever runs afterwards.
fn datagrams(bed: &Bed) -> Result<()> {
    probe(bed, "10.77.5.1", &["udp-echo", "7005"])?;
    traffic::wait_inside(bed, "n1", "udp listening")?;
    let socket = trouble::in_network(bed, "c", || {
        let socket = UdpSocket::bind((CLIENT, 0))?;
        socket.connect("10.77.5.1:7005")?;
        Ok(socket)
    })?;
    let mut said = 0;
    let mut word = [0; 16];
    let mut hear = |wanted: u32, limit: Duration| -> Result<bool> {
        socket.set_read_timeout(Some(limit))?;
        let Ok(len) = socket.recv(&mut word) else { return Ok(false) };
        let heard = String::from_utf8_lossy(&word[..len]).into_owned();
        ensure!(heard == wanted.to_string(), "{heard:?} came back instead of {wanted}");
        Ok(true)
    };
    socket.send(b"0")?;
    ensure!(hear(0, Duration::from_secs(10))?, "no answer before the first move");
    for moves in [true, false] {
        let fault = Fault::at(bed, Node::B, "held")?;
        let attempt = Attempt::start(bed, "n1", &[])?;
        fault.reached()?;
        for n in said + 1..=said + 5 {
            socket.send(n.to_string().as_bytes())?;
        }
        ensure!(!hear(0, Duration::from_millis(300))?, "something answered in the freeze");
        if !moves {
            // the destination ends: the container runs on where it was
            trouble::kill(bed, Node::B, trouble::SHIM)?;
        }
        drop(fault);
        let outcome = attempt.finish()?;
        ensure!((outcome.code == 0) == moves, "{outcome:?}");
        for n in said + 1..=said + 5 {
            ensure!(hear(n, Duration::from_secs(10))?, "datagram {n} of the freeze is lost (moved: {moves})");
        }
        said += 5;
        ensure!(!hear(0, Duration::from_millis(300))?, "a datagram came twice");
        if moves {
            moves::migrate(bed, "n1", Node::B, Node::A)?;
        }
    }
    remove(bed, Node::A)
}

fn ipv6_connection(bed: &Bed) -> Result<()> {
    probe(bed, "10.77.5.1", &["tcp-echo", "7003", "--every", "5"])?;
    traffic::wait_inside(bed, "n1", "tcp listening")?;
    let mut outside = Outside::start(bed, &["tcp-connect", "fd77::5:1", "7003", "--every", "5"])?;
    outside.receives()?;
    moves_under_traffic(bed, &outside)?;
    remove(bed, Node::A)
}

/// Nothing is sent while it moves; the first bytes afterwards come from outside, or from the container.
fn idle_connection(bed: &Bed) -> Result<()> {
    probe(bed, "10.77.5.1", &["tcp-echo", "7004", "--every", "600000"])?;
    traffic::wait_inside(bed, "n1", "tcp listening")?;
    let mut outside = Outside::start(bed, &["tcp-connect", "10.77.5.1", "7004", "--every", "600000"])?;
    outside.wait("tcp round=1")?;
    traffic::wait_inside(bed, "n1", "tcp round=1")?;
    let wake = |node: Node| bed.ok(node, &["ctr", "task", "kill", "--signal", "USR1", "n1"]).map(drop);
    moves::migrate(bed, "n1", Node::A, Node::B)?;
    outside.wake()?; // sends the second line
    outside.wait("tcp round=2 sent=2 ")?;
    std::thread::sleep(Duration::from_millis(50)); // it is on its way
    wake(Node::B)?;
    traffic::wait_inside(bed, "n1", "tcp round=2 sent=2 received=2 wrong=0")?;
    moves::migrate(bed, "n1", Node::B, Node::A)?;
    wake(Node::A)?;
    traffic::wait_inside(bed, "n1", "tcp round=3 sent=3 ")?;
    std::thread::sleep(Duration::from_millis(50));
    outside.wake()?;
    outside.wait("tcp round=3 sent=3 received=3 wrong=0")?;
    expect_right(&traffic::inside(bed, "n1")?)?;
    expect_right(&outside.said()?)?;
    remove(bed, Node::A)
}

/// Both send as fast as they go and read slowly: at the freeze all four queues are full.
fn full_buffers(bed: &Bed) -> Result<()> {
    let options = ["--every", "20", "--blocks", "3000"];
    probe(bed, "10.77.5.1", &[&["stream", "7005"], &options[..]].concat())?;
    traffic::wait_inside(bed, "n1", "stream listening")?;
    let mut outside =
        Outside::start(bed, &[&["stream-connect", "10.77.5.1", "7005"], &options[..]].concat())?;
    outside.wait("received=")?;
    traffic::wait_inside(bed, "n1", "received=")?;
    for from in [Node::A, Node::B] {
        let waiting =
            last_number(&outside.said()?, "sent")? > last_number(&traffic::inside(bed, "n1")?, "received")?;
        ensure!(waiting, "nothing is on its way: {}", tail(&outside.said()?));
        ensure!(!traffic::inside(bed, "n1")?.contains("whole"), "it was over before the move");
        moves::migrate(bed, "n1", from, from.other())?;
    }
    outside.wait(" whole")?;
    traffic::wait_inside(bed, "n1", " whole")?;
    expect_right(&traffic::inside(bed, "n1")?)?;
    expect_right(&outside.said()?)?;
    remove(bed, Node::A)
}
