//! A container's memory and environment are secrets: while it moves, and afterwards, nobody but root can look at them, and they are in no
//! log and no core dump.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;
use crate::trouble::{self, AGENT, Attempt, Fault, Mounted, SHIM};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "secrets_of_a_move", needs: Needs::Migration, run: of_a_move },
    Scenario { name: "secrets_in_no_core_dump", needs: Needs::Migration, run: in_no_core_dump },
];

/// What nobody has seen before.
fn random() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

/// Agents that log everything they can while this lives.
struct Talkative<'a>(&'a Bed);

impl<'a> Talkative<'a> {
    fn new(bed: &'a Bed) -> Result<Self> {
        let all = Talkative(bed);
        for node in Node::ALL {
            bed.stop_agent(node)?;
            let started = bed.nodes(["agent", node.name(), "start"]).env("RUST_LOG", "trace").output()?;
            ensure!(started.status.success(), "{started:?}");
        }
        Ok(all)
    }
}

impl Drop for Talkative<'_> {
    fn drop(&mut self) {
        for node in Node::ALL {
            if let Err(e) = self.0.stop_agent(node).and_then(|()| self.0.start_agent(node)) {
                eprintln!("{e:#}");
            }
        }
    }
}

/// Shims that say everything they can, while this lives: what is in their place starts them so.
fn talkative_shims(bed: &Bed) -> Result<Vec<Mounted<'_>>> {
    use std::os::unix::fs::PermissionsExt;
    let wrapper = bed.shared()?.join("talkative-shim");
    std::fs::write(&wrapper, format!("#!/bin/sh\nexec {REAL} -debug \"$@\"\n"))?;
    std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755))?;
    let installed = crate::requirements::bin_dir().join(SHIM);
    let (wrapper, installed) = (wrapper.display().to_string(), installed.display().to_string());
    let mut mounted = Vec::new();
    for node in Node::ALL {
        bed.sh(node, &format!("touch {REAL}"))?;
        mounted.push(Mounted::new(bed, node, &format!("--bind {installed}"), REAL)?);
        mounted.push(Mounted::new(bed, node, &format!("--bind {wrapper}"), &installed)?);
    }
    Ok(mounted)
}

/// Where the shim itself is meanwhile.
const REAL: &str = "/run/node/the-shim-itself";

/// Where we, runc and CRIU keep what is a container's. The roots of containers are containers' own affair: they are behind their bundles.
const PLACES: &str = "/run/transship /run/containerd/io.containerd.runtime.v2.task /run/containerd/runc \
    /var/lib/containerd/io.containerd.runtime.v2.task /var/log/transship";

/// Nobody but root can read, write or connect to anything that has to do with a container; what is ours says so itself.
fn private(bed: &Bed, node: Node, when: &str) -> Result<()> {
    let lax = bed.sh(
        node,
        "find /run/transship ! -type l ! -path '/run/transship/fault*' -perm /077 -printf '%M %p\\n'; true",
    )?;
    ensure!(lax.is_empty(), "{when}, node {}: for others too:\n{lax}", node.name());
    // what is not ours is as containerd and runc make it: asked for as somebody else
    let open = bed.sh(
        node,
        &format!(
            "find {PLACES} -xdev \\( -type f -o -type s -o -type p \\) -print0 2> /dev/null | \
             setpriv --reuid 65534 --regid 65534 --clear-groups xargs -0 sh -c \
             'for f; do if [ -r \"$f\" ] || [ -w \"$f\" ]; then echo \"$f\"; fi; done' _"
        ),
    )?;
    ensure!(open.is_empty(), "{when}, node {}: user nobody reaches\n{open}", node.name());
    Ok(())
}

/// Files that hold one of the secrets and have no reason to.
fn told(bed: &Bed, node: Node, secrets: &[&str]) -> Result<String> {
    let words: String = secrets.iter().map(|s| format!(" -e {s}")).collect();
    let logs = trouble::folder(bed)?.join(node.name()).join("log");
    let run = bed.path(node, "/run/transship")?;
    let log = bed.path(node, "/var/log/transship")?;
    let bundles = bed.path(node, "/run/containerd/io.containerd.runtime.v2.task")?;
    let work = bed.path(node, "/var/lib/containerd/io.containerd.runtime.v2.task")?;
    // of a bundle only the logs: config.json has the environment, as it must
    let script = format!(
        "grep -rlaF{words} {} {} {}; find {} {} -xdev -name '*log*' -type f -exec grep -laF{words} {{}} +; true",
        logs.display(),
        run.display(),
        log.display(),
        bundles.display(),
        work.display()
    );
    let output = std::process::Command::new("sh").args(["-c", &script]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn of_a_move(bed: &Bed) -> Result<()> {
    let (in_memory, in_environment) = (random()?, random()?);
    let secrets = [in_memory.as_str(), in_environment.as_str()];
    let _talkative = Talkative::new(bed)?;
    let _talkative_too = talkative_shims(bed)?;
    container::pod(bed, Node::A, "s1", "10.77.6.9")?;
    let env = format!("PASSWORD={in_environment}");
    let run = Run::new(bed, "s1", "redis").pod("s1");
    run.options(&["--null-io", "--env", &env]).start(Node::A)?;
    let set = || container::exec(bed, Node::A, "s1", &["redis-cli", "set", "secret", &in_memory]);
    crate::bed::wait_for(std::time::Duration::from_secs(10), "redis", || {
        Ok(set()?.stdout.starts_with(b"OK"))
    })?;
    private(bed, Node::A, "before")?;

    // in the freeze, with the dump's images on the source; and before CRIU restores, with all that has come on the destination
    let (here, there) = (Fault::at(bed, Node::A, "frozen")?, Fault::at(bed, Node::B, "restoring")?);
    let page = bed.shared()?.join("secrets.html");
    let attempt = Attempt::start(bed, "s1", &["--report", page.to_str().context("path")?])?;
    here.reached()?;
    private(bed, Node::A, "in the freeze")?;
    drop(here);
    there.reached()?;
    let held = bed.sh(Node::B, "ls /run/transship/images/*")?;
    ensure!(held.contains(".img"), "nothing has come that could be looked at: {held}");
    private(bed, Node::A, "before the restore")?;
    private(bed, Node::B, "before the restore")?;
    drop(there);
    let outcome = attempt.finish()?;
    ensure!(outcome.code == 0, "exit {}: {}{}", outcome.code, outcome.json, outcome.stderr);

    let value = container::exec(bed, Node::B, "s1", &["redis-cli", "get", "secret"])?.stdout;
    ensure!(String::from_utf8_lossy(&value).trim() == in_memory, "it is not what was moved");
    private(bed, Node::B, "afterwards")?;
    let drawn = std::fs::read_to_string(&page)?;
    std::fs::remove_file(&page)?;
    let said = format!("{}{}{drawn}", outcome.json, outcome.stderr);
    // a checkpoint that fails: CRIU's log is kept, and its words are in an error
    let refused = bed.run(Node::B, &["transship", "checkpoint", "s1", "--json", "-o", "/proc/x"])?;
    let said = format!("{said}{}", String::from_utf8_lossy(&refused.stdout));
    ensure!(!secrets.iter().any(|s| said.contains(s)), "the command line tells a secret:\n{said}");
    for node in Node::ALL {
        let told = told(bed, node, &secrets)?;
        ensure!(told.is_empty(), "node {}: a secret is in\n{told}", node.name());
        let images = bed.sh(node, "ls /run/transship/images 2> /dev/null || true")?;
        ensure!(images.is_empty(), "node {}: left behind: {images}", node.name());
    }
    // what was looked through is what they did say
    for (word, log) in [("TRACE", "agent.log"), ("restoring", "containerd.log"), ("TLS13_", "containerd.log")]
    {
        ensure!(told(bed, Node::B, &[word])?.contains(log), "node b's {log} was to have {word}");
    }
    container::delete(bed, Node::B, "s1")?;
    container::unpod(bed, Node::B, "s1")
}

/// Kills a process by SIGABRT (std takes the first SIGSEGV for itself), its limit of core dumps lifted; whether the kernel says that it left one.
fn crash(pid: i32) -> Result<bool> {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: reads one struct, writes nothing.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_CORE, &unlimited, std::ptr::null_mut()) };
    ensure!(set == 0, "lifting the limit of {pid}: {}", std::io::Error::last_os_error());
    // as its tracer we hear of its end before everybody else, with the kernel's word about the core
    let pid = Pid::from_raw(pid);
    ptrace::seize(pid, ptrace::Options::empty()).with_context(|| format!("tracing {pid}"))?;
    kill(pid, Signal::SIGABRT)?;
    loop {
        match waitpid(pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGABRT) => ptrace::cont(pid, Signal::SIGABRT)?,
            WaitStatus::Stopped(_, other) => ptrace::cont(pid, other)?,
            WaitStatus::PtraceEvent(..) => ptrace::cont(pid, None)?,
            WaitStatus::Signaled(_, Signal::SIGABRT, core) => return Ok(core),
            other => bail!("{pid} ended otherwise: {other:?}"),
        }
    }
}

/// What this machine does with a process that dies so: without a core of anybody's, nothing is shown by ours having none.
fn cores_are_written(bed: &Bed) -> Result<bool> {
    let dir = tempfile::tempdir_in(bed.shared()?)?;
    let mut usual = std::process::Command::new("sleep").arg("60").current_dir(&dir).spawn()?;
    crash(i32::try_from(usual.id())?).inspect_err(|_| {
        usual.kill().ok();
        usual.wait().ok();
    })
}

fn in_no_core_dump(bed: &Bed) -> Result<()> {
    if !cores_are_written(bed)? {
        eprintln!("secrets_in_no_core_dump: SKIP: no process gets a core dump on this machine");
        return Ok(());
    }
    let redis = moves::start_redis(bed, Node::A, "s2", "10.77.6.8")?;
    // memory in the store, the page daemon and its keeper running, buffers that were full
    let fault = Fault::at(bed, Node::B, "restoring")?;
    let attempt = Attempt::start(bed, "s2", &["--mode", "post-copy"])?;
    fault.reached()?;
    let mut died = Vec::new();
    let mut crash_all = |node: Node, command: &str| -> Result<()> {
        let found = trouble::processes(bed, node, command)?;
        ensure!(!found.is_empty(), "no {command} on node {}", node.name());
        for pid in found {
            let core = crash(pid).with_context(|| command.to_owned())?;
            ensure!(!core, "{command} on node {} left a core dump", node.name());
            died.push(pid);
        }
        Ok(())
    };
    crash_all(Node::A, "transship migrate")?;
    crash_all(Node::B, SHIM)?;
    crash_all(Node::B, AGENT)?;
    drop(fault);
    drop(attempt);
    trouble::restart(bed, Node::B)?;
    trouble::nothing_on(bed, Node::B)?;
    crash_all(Node::A, AGENT)?;
    trouble::restart(bed, Node::A)?;
    // the source's shim has had the same memory in its hands; with it goes the container
    crash_all(Node::A, SHIM)?;
    ensure!(died.len() >= 5, "{died:?}");
    let end = || Ok(container::status(bed, Node::A, "s2")?.is_none_or(|s| s == "STOPPED"));
    crate::bed::wait_for(std::time::Duration::from_secs(10), "the end of s2", end)?;
    moves::stop_redis(bed, Node::A, &redis)
}
