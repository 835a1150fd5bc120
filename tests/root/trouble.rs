//! What the scenarios about trouble share: a container whose life is watched, the shape of an error, faults.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bed::{Bed, Node, wait_for};
use crate::client::Client;
use crate::container;
use crate::moves::{self, Outcome, Redis};

/// A redis on node a, with a client on one connection: whatever is tried with it, it must run on as if nothing had happened.
pub struct Witness<'a> {
    bed: &'a Bed,
    /// The container and its pod.
    pub redis: Redis,
    client: Client,
    pid: u32,
}

impl<'a> Witness<'a> {
    /// Starts it; `id` is the container's.
    pub fn start(bed: &'a Bed, id: &str) -> Result<Witness<'a>> {
        Self::with_data(bed, id, 1)
    }

    /// With so many MB of data in it.
    pub fn with_data(bed: &'a Bed, id: &str, mb: u32) -> Result<Witness<'a>> {
        let redis = moves::start_redis(bed, Node::A, id, "10.77.6.1")?;
        let client = Client::start(bed, &redis.ip, &["--fill-mb", &mb.to_string(), "--timeout", "60"])?;
        let pid = container::pid(bed, Node::A, id)?;
        Ok(Witness { bed, redis, client, pid })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.redis.id
    }

    /// It runs on node a as before: the same process, answering, nothing frozen, no rule in its network; and nothing of it is
    /// on node b.
    pub fn untouched(&self) -> Result<()> {
        let (bed, id) = (self.bed, self.id());
        let status = container::status(bed, Node::A, id)?;
        ensure!(status.as_deref() == Some("RUNNING"), "{id} on node a: {status:?}");
        let pid = container::pid(bed, Node::A, id)?;
        ensure!(pid == self.pid, "{id} was process {}, is now {pid}", self.pid);
        let ping = ["timeout", "5", "ctr", "task", "exec", "--exec-id", "ping", id, "redis-cli", "ping"];
        let mut said = String::new();
        // the shim may still be at the end of its part
        let answers = wait_for(Duration::from_secs(40), "an answer", || {
            let ping = bed.run(Node::A, &ping)?;
            said = format!("{ping:?}");
            Ok(ping.stdout.starts_with(b"PONG"))
        });
        answers.map_err(|_| anyhow::anyhow!("{id} does not answer: {said}"))?;
        let rules = bed.ok(Node::A, &["ip", "netns", "exec", id, "nft", "list", "ruleset"])?;
        ensure!(rules.trim().is_empty(), "rules were left in the network of {id}: {rules}");
        let ours =
            bed.sh(Node::A, "ls /run/transship/images 2>/dev/null | grep -v -- '-dump.log$' || true")?;
        ensure!(ours.trim().is_empty(), "images were left on node a: {ours}");
        nothing_on(bed, Node::B)
    }

    /// [`Witness::untouched`], then the client's verdict on all of it, and it is removed.
    pub fn finish_untouched(self) -> Result<Value> {
        self.untouched()?;
        self.finish(Node::A)
    }

    /// The client's verdict; then it is removed from the node where it runs.
    pub fn finish(self, node: Node) -> Result<Value> {
        // a client whose peer was away waits longer and longer between its attempts
        let mut last = None;
        wait_for(Duration::from_secs(40), "the client goes on", || {
            let line =
                ["ctr", "task", "exec", "--exec-id", "count", self.id(), "redis-cli", "get", "counter"];
            let now = self.bed.run(node, &line)?.stdout;
            let before = last.replace(now.clone());
            Ok(before.is_some_and(|before| before != now && !now.is_empty()))
        })?;
        let report = self.client.finish_intact()?;
        moves::stop_redis(self.bed, node, &self.redis)?;
        Ok(report)
    }

    /// An attempt to move it to node b that must fail so, leaving it untouched.
    pub fn refused(&self, options: &[&str], code: u8, words: &[&str]) -> Result<Value> {
        let error = refused(self.bed, self.id(), Node::B.address(), options, code, words)?;
        self.untouched()?;
        Ok(error)
    }
}

/// An attempt to move a container from node a that must fail with this exit status and with all of these words in its error.
pub fn refused(bed: &Bed, id: &str, to: &str, options: &[&str], code: u8, words: &[&str]) -> Result<Value> {
    let outcome = moves::attempt(bed, id, Node::A, to, options)?;
    failed(&outcome, code, words)
}

/// The attempt failed with this exit status, and its error is complete: what, where, when, in which state all is, what to do.
pub fn failed(outcome: &Outcome, code: u8, words: &[&str]) -> Result<Value> {
    let all = format!("exit {}: {} {}", outcome.code, outcome.json, outcome.stderr);
    ensure!(outcome.code == i32::from(code) && outcome.json["ok"] == false, "wanted exit {code}, got {all}");
    let error = &outcome.json["error"];
    for part in ["code", "message", "node", "phase", "state", "advice"] {
        ensure!(error[part].as_str().is_some_and(|s| !s.is_empty()), "no {part} in {all}");
    }
    for word in words {
        ensure!(error.to_string().contains(word), "{word:?} is not in {all}");
    }
    Ok(error.clone())
}

/// A migration that runs beside the test.
pub struct Attempt(Child);

impl Attempt {
    /// Starts it from node a.
    pub fn start(bed: &Bed, id: &str, options: &[&str]) -> Result<Attempt> {
        Self::from(bed, Node::A, id, options)
    }

    /// Starts it from a node, to the other one.
    pub fn from(bed: &Bed, from: Node, id: &str, options: &[&str]) -> Result<Attempt> {
        let line = ["transship", "migrate", id, "--to", from.other().address(), "--json"];
        let line: Vec<_> = line.iter().chain(options).copied().collect();
        let mut command = bed.command(from, &line);
        Ok(Attempt(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?))
    }

    /// Whether it is over.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }

    /// Its end.
    pub fn finish(self) -> Result<Outcome> {
        let output = self.0.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let json = stdout.lines().last().map_or(Ok(Value::Null), serde_json::from_str);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let json = json.with_context(|| format!("transship migrate said {stdout}{stderr}"))?;
        Ok(Outcome { code: output.status.code().unwrap_or(-1), json, stderr })
    }
}

/// A point of the migration at which a node's shim (or agent) stands still while this lives. Debug builds only; see
/// `src/migrate/fault.rs`.
pub struct Fault<'a> {
    bed: &'a Bed,
    node: Node,
}

impl<'a> Fault<'a> {
    /// Sets it.
    pub fn at(bed: &'a Bed, node: Node, point: &str) -> Result<Fault<'a>> {
        ensure!(transship::migrate::fault::POINTS.contains(&point), "no point {point}");
        ensure!(
            cfg!(debug_assertions),
            "release builds have no fault points: build the tests without --release"
        );
        bed.sh(node, &format!("mkdir -p /run/transship; rm -f /run/transship/fault.reached; echo {point} > /run/transship/fault"))?;
        Ok(Fault { bed, node })
    }

    /// Waits until it is reached.
    pub fn reached(&self) -> Result<()> {
        let file = self.bed.path(self.node, "/run/transship/fault.reached")?;
        wait_for(Duration::from_secs(20), "the fault point", || Ok(file.exists()))
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        let _ =
            self.bed.run(self.node, &["rm", "-f", "/run/transship/fault", "/run/transship/fault.reached"]);
    }
}

/// Nothing of a container is on a node (soon): what the bed looks for, and leases and what the agent remembers.
pub fn nothing_on(bed: &Bed, node: Node) -> Result<()> {
    let mut left = String::new();
    let clean = wait_for(Duration::from_secs(12), "a clean node", || {
        left = bed.hack(["leaks", node.name()])?;
        // a scenario's own
        left = left.replace("mount /run/transship/images\n", "");
        left.push_str(&bed.sh(
            node,
            "ctr leases ls -q | sed 's/^/lease /'; ctr content active | sed 1d; \
             find /run/transship/placed /run/transship/incoming /run/transship/images -mindepth 1 -type f 2>/dev/null || true",
        )?);
        Ok(left.trim().is_empty())
    });
    clean.map_err(|_| anyhow::anyhow!("left on node {}:\n{left}", node.name()))
}

/// The bed's prefix, as in the names of its network namespaces.
pub fn prefix(bed: &Bed) -> Result<String> {
    let shared = bed.shared()?;
    let folder = shared.parent().and_then(|d| d.file_name()).context("the bed's folder")?;
    Ok(folder.to_string_lossy().into_owned())
}

/// The bed's own folder.
pub fn folder(bed: &Bed) -> Result<PathBuf> {
    Ok(bed.shared()?.parent().context("the bed's folder")?.to_owned())
}

/// Plugs a node's cable in or out.
pub fn cable(bed: &Bed, node: Node, up: bool) -> Result<()> {
    let switch = format!("{}-sw", prefix(bed)?);
    let line = ["-n", &switch, "link", "set", &format!("p{}", node.name()), if up { "up" } else { "down" }];
    ensure!(Command::new("ip").args(line).status()?.success(), "ip {line:?}");
    Ok(())
}

/// A cable that is out while this lives.
pub struct Unplugged<'a>(&'a Bed, Node);

impl<'a> Unplugged<'a> {
    /// Pulls it.
    pub fn pull(bed: &'a Bed, node: Node) -> Result<Unplugged<'a>> {
        cable(bed, node, false)?;
        Ok(Unplugged(bed, node))
    }
}

impl Drop for Unplugged<'_> {
    fn drop(&mut self) {
        if let Err(e) = cable(self.0, self.1, true) {
            eprintln!("{e:#}");
        }
    }
}

/// The processes in a node whose command line begins so, as this machine numbers them.
pub fn processes(bed: &Bed, node: Node, command: &str) -> Result<Vec<i32>> {
    let netns = std::fs::read_link(format!("/proc/{}/ns/pid", bed.pid(node)?))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let same = std::fs::read_link(entry.path().join("ns/pid")).is_ok_and(|ns| ns == netns);
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program =
            line.split(' ').next().unwrap_or_default().rsplit('/').next().unwrap_or_default().to_owned();
        let rest = line.split_once(' ').map_or("", |(_, rest)| rest);
        // the same executable as something else than a shim
        let helps = HELPERS.iter().any(|helper| rest.starts_with(helper));
        if same && !helps && format!("{program} {rest}").starts_with(command) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Sends SIGKILL to a node's only process of that command line.
pub fn kill(bed: &Bed, node: Node, command: &str) -> Result<()> {
    let found = processes(bed, node, command)?;
    let [pid] = found[..] else { bail!("{command} on node {}: processes {found:?}", node.name()) };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

/// A node's agent.
pub const AGENT: &str = "transship agent";
/// What a shim starts of itself beside shims.
const HELPERS: [&str; 2] = [transship::migrate::filling::KEEPER, transship::memory::inject::helper::ARG];
/// A node's shim.
pub const SHIM: &str = "containerd-shim-transship-v2";

/// Runs `work` in the network of a node (`a`, `b`) or of the client (`c`).
pub fn in_network<T: Send>(bed: &Bed, of: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = std::fs::File::open(format!("/run/netns/{}-{of}", prefix(bed)?))?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            // only this thread, which ends with the work
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work()
        });
        inside.join().unwrap_or_else(|_| bail!("panicked"))
    })
}

/// Something mounted in a node while this lives.
pub struct Mounted<'a> {
    bed: &'a Bed,
    node: Node,
    at: String,
}

impl<'a> Mounted<'a> {
    /// `mount ARGS AT`.
    pub fn new(bed: &'a Bed, node: Node, args: &str, at: &str) -> Result<Mounted<'a>> {
        bed.sh(
            node,
            &format!("mkdir -p {}; mount {args} {at}", at.rsplit_once('/').map_or("/", |(d, _)| d)),
        )?;
        Ok(Mounted { bed, node, at: at.into() })
    }

    /// Another text in the place of a file below /proc.
    pub fn text(bed: &'a Bed, node: Node, text: &str, at: &str) -> Result<Mounted<'a>> {
        let name = format!("/run/node/{}", at.replace('/', "_"));
        std::fs::write(bed.path(node, &name)?, text)?;
        Mounted::new(bed, node, &format!("--bind {name}"), at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = self.bed.run(self.node, &["umount", "-l", &self.at]);
    }
}

/// More configuration for a node's agent while this lives; the agent is started anew.
pub struct Configured<'a> {
    bed: &'a Bed,
    node: Node,
}

impl<'a> Configured<'a> {
    /// Adds lines to agent.toml.
    pub fn new(bed: &'a Bed, node: Node, lines: &str) -> Result<Configured<'a>> {
        let configured = Configured { bed, node };
        configured.apply(lines)?;
        Ok(configured)
    }

    fn apply(&self, lines: &str) -> Result<()> {
        let extra = folder(self.bed)?.join(format!("agent-{}.toml", self.node.name()));
        std::fs::write(extra, lines)?;
        restart(self.bed, self.node)
    }
}

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.apply("") {
            eprintln!("{e:#}");
        }
    }
}

/// Ends the agent (if it is there) and starts it.
pub fn restart(bed: &Bed, node: Node) -> Result<()> {
    for pid in processes(bed, node, AGENT)? {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    }
    wait_for(Duration::from_secs(5), "the agent's end", || Ok(processes(bed, node, AGENT)?.is_empty()))?;
    // a killed one's, which would look like the new one's
    bed.ok(node, &["rm", "-f", "/run/transship/agent.sock"])?;
    bed.start_agent(node)
}
