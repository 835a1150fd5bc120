//! What the peers have in common: their folder in the nodes, the copy of images, and the destination's pod.
//!
//! An established connection needs a gate: until CRIU has put its own lock around the restored sockets, a packet for them would be
//! answered by a reset. The destination's pod is therefore made apart, and joined to the bridge by an action script at `post-restore`.

use serde_json::{Value, json};

use super::{ID, Move};
use crate::bed::{Bed, Helper, address};
use crate::workload::{IP, MAC};

/// Where bundle, root file system and images lie, in each node's own /run (a tmpfs).
pub const DIR: &str = "/run/bench";
/// CRIU's configuration, named by the container's annotation `org.criu.config`.
pub const CONF: &str = "/run/bench/criu.conf";
const COPY_PORT: u16 = 7100;

/// The host's end of the pod's link, as `hack/nodes pod` names it.
fn veth(bed: &mut Bed) -> Result<String, String> {
    Ok(format!("veth{}", bed.b.sh(&format!("printf %s {ID} | sha256sum | head -c 8"))?.trim()))
}

pub fn write(node: &mut Helper, path: &str, content: &str) -> Result<(), String> {
    node.ask(json!({"do": "write", "path": path, "content": content})).map(drop)
}

/// Starts a script in the background.
pub fn spawn(node: &mut Helper, script: &str) -> Result<u64, String> {
    let answer = node.ask(json!({"do": "spawn", "command": ["sh", "-c", script]}))?;
    answer["id"].as_u64().ok_or_else(|| "no id".into())
}

/// Waits for a background command, which must succeed.
pub fn done(node: &mut Helper, id: u64, limit_s: u64) -> Result<Value, String> {
    let answer = node.ask(json!({"do": "wait", "id": id, "limit_s": limit_s}))?;
    if answer["code"] == 0 {
        Ok(answer)
    } else {
        Err(answer["output"].as_str().unwrap_or_default().to_owned())
    }
}

/// One of the times of an answer.
pub fn time(answer: &Value, name: &str) -> f64 {
    answer[name].as_f64().unwrap_or_default()
}

pub fn ms(begin: f64, end: f64) -> f64 {
    ((end - begin) * 1e4).round() / 10.0
}

/// A move of three steps, the workload standing still from the first to the end of the last.
pub fn stopped(dump: &Value, copy: &Value, restore: &Value) -> Move {
    let (begin, end) = (time(dump, "begin"), time(restore, "end"));
    Move {
        begin,
        end,
        freeze_ms: ms(begin, end),
        detail: json!({
            "checkpoint_ms": ms(begin, time(dump, "end")),
            "copy_ms": ms(time(copy, "begin"), time(copy, "end")), "copy_bytes": copy["bytes"],
            "restore_ms": ms(time(restore, "begin"), end),
        }),
    }
}

/// DIR/images of node a to node b.
pub fn copy(bed: &mut Bed) -> Result<Value, String> {
    copy_dir(bed, &format!("{DIR}/images"))
}

/// The regular files of a folder of node a, to the one of the same name on node b.
pub fn copy_dir(bed: &mut Bed, dir: &str) -> Result<Value, String> {
    let b = format!("{}:{COPY_PORT}", address("b"));
    bed.b.ask(json!({"do": "receive", "dir": dir, "address": b}))?;
    let sent = bed.a.ask(json!({"do": "send", "dir": dir, "to": b}))?;
    bed.b.ask(json!({"do": "received"}))?;
    Ok(sent)
}

/// Makes the pod on node b as `hack/nodes pod` does, but not on the bridge: its first packet would draw the source's traffic there.
/// With `tcp`, CRIU's configuration joins it; otherwise the command that does so is returned, to be run after the restore (nobody waits
/// for it then, and the peer is spared the script).
pub fn pod_apart(bed: &mut Bed, tcp: bool) -> Result<Option<String>, String> {
    let veth = veth(bed)?;
    bed.b.sh(&format!(
        "ip netns add {ID}; ip -n {ID} link set lo up
         ip link add {veth} type veth peer name eth0 netns {ID} address {MAC}; ip link set {veth} up
         ip -n {ID} addr add {IP}/16 dev eth0; ip -n {ID} link set eth0 up; ip -n {ID} route add default via 10.77.0.254"
    ))?;
    let gate = format!("ip link set {veth} master cni0");
    if !tcp {
        return Ok(Some(gate));
    }
    let script = format!("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-restore ] || {gate}\n");
    write(&mut bed.b, &format!("{DIR}/gate"), &script)?;
    bed.b.sh(&format!("chmod +x {DIR}/gate"))?;
    write(&mut bed.b, CONF, &format!("tcp-established\naction-script {DIR}/gate\n"))?;
    Ok(None)
}
