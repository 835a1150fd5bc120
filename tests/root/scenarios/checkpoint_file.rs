//! `transship checkpoint` and `transship restore`: a container's state in one file, and back, on this node and on the other one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves::{self, Redis};
use crate::requirements::Needs;
use crate::transship;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "checkpoint_restored_here", needs: Needs::Migration, run: restored_here },
    Scenario { name: "checkpoint_restored_on_the_other_node", needs: Needs::Migration, run: restored_there },
    Scenario { name: "checkpoint_and_stop", needs: Needs::Migration, run: and_stop },
    Scenario { name: "checkpoint_encrypted", needs: Needs::Migration, run: encrypted },
    Scenario { name: "checkpoint_needs_the_image", needs: Needs::Migration, run: needs_the_image },
    Scenario {
        name: "checkpoint_of_a_paused_container",
        needs: Needs::Migration,
        run: of_a_paused_container,
    },
];

/// A path for a checkpoint, nothing there; both nodes see it.
fn file(bed: &Bed, name: &str) -> Result<String> {
    let path = bed.shared()?.join(name);
    let _ = std::fs::remove_file(&path);
    Ok(path.to_str().context("path")?.to_owned())
}

fn redis_cli(bed: &Bed, node: Node, args: &[&str]) -> Result<String> {
    let line: Vec<&str> = ["redis-cli"].iter().chain(args).copied().collect();
    let output = container::exec(bed, node, "r1", &line)?;
    ensure!(output.status.success(), "redis-cli {args:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Memory and a file in the writable layer, both saying `value`.
fn put(bed: &Bed, node: Node, value: &str) -> Result<()> {
    redis_cli(bed, node, &["set", "key", value])?;
    let output = container::exec(bed, node, "r1", &["sh", "-c", &format!("echo {value} > /data/file")])?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// Fails unless memory, writable layer and network are there as [`put`] left them.
fn expect(bed: &Bed, node: Node, redis: &Redis, value: &str) -> Result<()> {
    let key = redis_cli(bed, node, &["get", "key"])?;
    let output = container::exec(bed, node, "r1", &["sh", "-c", "read x < /data/file; echo $x"])?;
    let file = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(key == value && file == value, "wanted {value}, memory has {key:?}, the layer {file:?}");
    // from outside, over the pod's address
    let ping = format!("exec 3<>/dev/tcp/{}/6379; echo PING >&3; read -t 5 x <&3; echo $x", redis.ip);
    let output = bed.nodes(["client", "bash", "-c", &ping]).output()?;
    ensure!(output.stdout.starts_with(b"+PONG"), "from outside: {output:?}");
    Ok(())
}

/// What any running container can do.
fn expect_normal(bed: &Bed, node: Node) -> Result<()> {
    let metrics = bed.ok(node, &["ctr", "task", "metrics", "r1"])?;
    ensure!(metrics.contains("memory"), "{metrics}");
    let pids = bed.ok(node, &["ctr", "task", "ps", "r1"])?;
    ensure!(pids.lines().count() >= 2, "{pids}");
    bed.ok(node, &["ctr", "task", "pause", "r1"])?;
    container::wait_status(bed, node, "r1", "PAUSED")?;
    bed.ok(node, &["ctr", "task", "resume", "r1"])?;
    container::wait_status(bed, node, "r1", "RUNNING")
}

fn restored_here(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.1")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c1.ckpt")?;
    let json = transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path])?;
    ensure!(json["report"]["running"] == true, "{json}");
    let meta = std::fs::metadata(&path)?;
    ensure!(
        meta.permissions().mode() & 0o7777 == 0o600 && json["report"]["bytes"] == meta.len(),
        "{meta:?} {json}"
    );
    expect(bed, Node::A, &redis, "one").context("after the checkpoint")?;
    put(bed, Node::A, "two")?;
    transship::refused(bed, Node::A, &["restore", &path], 5, "a container r1 is there already")?;
    container::delete(bed, Node::A, "r1")?;
    transship::refused(bed, Node::A, &["restore", &path], 5, "/run/netns/r1")?;
    container::unpod(bed, Node::A, "r1")?;
    let json = transship::ok(bed, Node::A, &["restore", &path])?;
    ensure!(json["report"]["container"] == "r1" && json["report"]["namespace"] == "default", "{json}");
    ensure!(json["report"]["pid"] == container::pid(bed, Node::A, "r1")?, "{json}");
    expect(bed, Node::A, &redis, "one").context("after the restore")?;
    expect_normal(bed, Node::A)?;
    // again, from the restored one; the file of before can be restored any number of times
    put(bed, Node::A, "three")?;
    let again = file(bed, "c2.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "r1", "-o", &again])?;
    for (path, value) in [(&again, "three"), (&path, "one")] {
        moves::stop_redis(bed, Node::A, &redis)?;
        transship::ok(bed, Node::A, &["restore", path])?;
        expect(bed, Node::A, &redis, value)?;
    }
    moves::stop_redis(bed, Node::A, &redis)
}

fn restored_there(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.2")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c3.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path])?;
    moves::stop_redis(bed, Node::A, &redis)?;
    transship::ok(bed, Node::B, &["restore", &path])?;
    expect(bed, Node::B, &redis, "one")?;
    expect_normal(bed, Node::B)?;
    moves::migrate(bed, "r1", Node::B, Node::A)?;
    expect(bed, Node::A, &redis, "one").context("after a migration of the restored container")?;
    moves::stop_redis(bed, Node::A, &redis)
}

fn and_stop(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.3")?;
    put(bed, Node::A, "one")?;
    let path = file(bed, "c4.ckpt")?;
    let json = transship::ok(bed, Node::A, &["checkpoint", "r1", "--output", &path, "--stop"])?;
    ensure!(json["report"]["running"] == false, "{json}");
    container::wait_status(bed, Node::A, "r1", "STOPPED")?;
    moves::stop_redis(bed, Node::A, &redis)?;
    // under another name
    transship::ok(bed, Node::A, &["restore", &path, "--name", "r2"])?;
    let output = container::exec(bed, Node::A, "r2", &["redis-cli", "get", "key"])?;
    ensure!(output.stdout == b"one\n", "{output:?}");
    container::delete(bed, Node::A, "r2")?;
    container::unpod(bed, Node::A, "r1")
}

/// Writes a new identity's file; its public key.
fn identity(path: &Path) -> Result<String> {
    use age::secrecy::ExposeSecret;
    let made = age::x25519::Identity::generate();
    std::fs::write(path, made.to_string().expose_secret())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(made.to_public().to_string())
}

fn encrypted(bed: &Bed) -> Result<()> {
    let redis = moves::start_redis(bed, Node::A, "r1", "10.77.5.4")?;
    let secret = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let secret = secret.trim();
    put(bed, Node::A, secret)?;
    let fill =
        "for i = 1, 20000 do redis.call('set', 'k' .. i, string.rep(i, 20)) end return redis.call('dbsize')";
    let size = redis_cli(bed, Node::A, &["eval", fill, "0"])?;
    let dir = bed.shared()?.join("sealed");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir)?;
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let (ours, others) = (identity(&dir.join("ours"))?, identity(&dir.join("others"))?);
    let (file, plain) = (path("c.age"), path("plain"));
    let checkpoint = ["checkpoint", "r1", "-o", &file, "--stop", "--encrypt-to"];
    transship::refused(bed, Node::A, &[&checkpoint[..], &[&path("ours")]].concat(), 2, "secret key")?;
    let json = transship::ok(bed, Node::A, &[&checkpoint[..], &[&ours]].concat())?;
    ensure!(json["report"]["encrypted"] == true, "{json}");
    let (meta, bytes) = (std::fs::metadata(&file)?, std::fs::read(&file)?);
    ensure!(meta.permissions().mode() & 0o7777 == 0o600 && json["report"]["bytes"] == meta.len(), "{meta:?}");
    ensure!(bytes.starts_with(b"age-encryption.org/v1\n"), "it is not encrypted");
    let holds = |bytes: &[u8], word: &str| bytes.windows(word.len()).any(|w| w == word.as_bytes());
    ensure!(!holds(&bytes, secret) && !holds(&bytes, "redis"), "it can be read");
    ensure!(std::fs::read_dir(&dir)?.count() == 3, "something was left beside it");
    moves::stop_redis(bed, Node::A, &redis)?;

    // nothing is made of what cannot be opened, or is not whole
    let restore = ["restore", file.as_str()];
    transship::refused(bed, Node::B, &restore, 2, "--identity")?;
    transship::refused(
        bed,
        Node::B,
        &["restore", &file, "--identity", &path("others")],
        2,
        "not encrypted to",
    )?;
    transship::refused(
        bed,
        Node::B,
        &["restore", &file, "--passphrase-file", "/no/such"],
        2,
        "No such file",
    )?;
    let mut changed = bytes.clone();
    let last = changed.len() - 9;
    changed[last] ^= 1;
    for (what, bad) in [("cut short", &bytes[..bytes.len() - 100]), ("changed at its end", &changed)] {
        std::fs::write(&plain, bad)?;
        let bad = ["restore", &plain, "--identity", &path("ours")];
        transship::refused(bed, Node::B, &bad, 12, "damaged").context(what)?;
        bed.expect_clean().context(what)?;
    }
    std::fs::remove_file(&plain)?;
    transship::ok(bed, Node::B, &["restore", &file, "--identity", &path("ours")])?;
    expect(bed, Node::B, &redis, secret)?;
    let now = container::exec(bed, Node::B, "r1", &["redis-cli", "dbsize"])?.stdout;
    ensure!(String::from_utf8_lossy(&now).trim() == size, "{size} keys, now {now:?}");
    moves::stop_redis(bed, Node::B, &redis)?;

    // age itself reads it, and what it finds is a checkpoint file
    let age = crate::requirements::opt().join("age/bin/age");
    if age.exists() {
        let age = age.to_string_lossy().into_owned();
        bed.sh(Node::B, &format!("umask 077; {age} --decrypt -i {} -o {plain} {file}", path("ours")))?;
        ensure!(holds(&std::fs::read(&plain)?, secret), "age has found something else");
        transship::refused(
            bed,
            Node::B,
            &["restore", &plain, "--identity", &path("ours")],
            2,
            "not encrypted",
        )?;
        // and the other way round
        std::fs::remove_file(&file)?;
        bed.sh(Node::B, &format!("{age} --encrypt -r {others} -o {file} {plain}"))?;
        transship::ok(bed, Node::B, &["restore", &file, "--identity", &path("others")])?;
        expect(bed, Node::B, &redis, secret)?;
        moves::stop_redis(bed, Node::B, &redis)?;
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn needs_the_image(bed: &Bed) -> Result<()> {
    bed.ok(Node::A, &["ctr", "image", "tag", "localhost/probe:1", "localhost/gone:1"])?;
    Run::new(bed, "t1", "gone").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let path = file(bed, "c5.ckpt")?;
    transship::ok(bed, Node::A, &["checkpoint", "t1", "--output", &path])?;
    container::delete(bed, Node::A, "t1")?;
    bed.ok(Node::A, &["ctr", "image", "rm", "--sync", "localhost/gone:1", "localhost/probe:1"])?;
    let refused = transship::refused(bed, Node::A, &["restore", &path], 8, "localhost/gone:1");
    bed.hack(["import", "a"])?;
    refused?;
    // its blobs are here again, under another name: enough
    transship::ok(bed, Node::A, &["restore", &path])?;
    container::wait_status(bed, Node::A, "t1", "RUNNING")?;
    container::delete(bed, Node::A, "t1")?;
    let _ = bed.run(Node::A, &["ctr", "image", "rm", "localhost/gone:1"])?;
    Ok(())
}

fn of_a_paused_container(bed: &Bed) -> Result<()> {
    let probe = Run::new(bed, "t1", "probe").log()?;
    probe.args(&["ts-probe", "count", "--every", "10"]).start(Node::A)?;
    container::wait_log(bed, "t1", "out 3\n")?;
    bed.ok(Node::A, &["ctr", "task", "pause", "t1"])?;
    let before = container::log(bed, "t1")?;
    let path = file(bed, "c6.ckpt")?;
    transship::refused(bed, Node::A, &["checkpoint", "t1", "--output", &path], 4, "task resume t1")?;
    ensure!(!Path::new(&path).exists(), "a file was left");
    ensure!(container::status(bed, Node::A, "t1")?.as_deref() == Some("PAUSED"), "it was resumed");
    ensure!(container::log(bed, "t1")? == before, "it ran while it was paused");
    container::delete(bed, Node::A, "t1")
}
