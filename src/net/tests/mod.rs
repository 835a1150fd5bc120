//! Tests with real namespaces. Each runs on a thread with a network and a mount namespace of its own, which plays the
//! node: nothing of the machine is touched and nothing can be left on it. Without root they say `SKIP: reason`.

mod backlog;
mod build;
mod segment;
mod tcp;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` on a node made for it: bridge `br0` is up, /run is empty.
fn on_node(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let body = || {
            if let Err(error) = become_node() {
                println!("SKIP: needs root, to create network namespaces: {error}");
                return;
            }
            test();
        };
        if let Err(panic) = scope.spawn(body).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn become_node() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    sh("ip link set lo up; ip link add br0 type bridge mcast_snooping 0; ip link set br0 up");
    Ok(())
}

/// Runs a shell script in the calling thread's namespaces; its output.
fn sh(script: &str) -> String {
    let done = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{script}\n{out}{err}");
    out.into_owned()
}

/// Makes the namespace `name` with `eth0` in bridge br0.
fn container(name: &str, mac: &str) -> OwnedFd {
    sh(&format!(
        "ip netns add {name}; ip link add {name}-h type veth peer name eth0 netns {name} address {mac} mtu 1400
         ip link set {name}-h master br0 up; ip -n {name} link set lo up; ip -n {name} link set eth0 up"
    ));
    open(&path(name)).expect("ip netns add made it")
}

fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

fn attach() -> Attach {
    Attach { bridge: Some("br0".into()) }
}

/// Waits until no address in `name` is tentative.
fn settle(name: &str) {
    for _ in 0..400 {
        if sh(&format!("ip -n {name} -6 addr show tentative")).is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("addresses stay tentative in {name}");
}

fn has(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|o| o.status.success())
}

/// Reports how long `work` took.
fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = std::time::Instant::now();
    let result = work();
    println!("{what}: {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}
