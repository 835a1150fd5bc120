//! One side of one scenario: calls, and notes of everything that comes back. The scenarios are written over this.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::Result;
use containerd_client::services::v1::{DeleteContainerRequest, containers_client::ContainersClient};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::bed::{Bed, Node, patient};
use crate::calls::{self, Call, Failure, Field, NewExec, Outcome, Stdio};
use crate::left;
use crate::normal::Normal;
use crate::record::Record;
use crate::shim::{Address, Shim};
use crate::stage::{Side, Stage};
use crate::streams::{self, Reader, Streams};

/// The container that most scenarios have only one of.
pub const ID: &str = "t1";
/// How long one call may take.
pub const CALL: Duration = Duration::from_secs(30);
/// Scratch folder of the scenarios in the node.
const SCRATCH: &str = "/run/compare";

/// One side of a running scenario.
pub struct Subject<'a> {
    /// The bed.
    pub bed: &'a Bed,
    /// The side.
    pub stage: &'a Stage,
    /// What has been seen.
    pub record: Record,
    /// How this side's names are written.
    pub normal: Normal,
    /// Where runc keeps its state.
    pub roots: Vec<&'static str>,
    since: usize,
    /// The containers that were made.
    pub ids: Vec<&'static str>,
    shims: HashMap<String, Shim>,
}

impl<'a> Subject<'a> {
    /// Nothing has happened yet.
    pub fn new(bed: &'a Bed, stage: &'a Stage) -> Result<Subject<'a>> {
        let mut normal = Normal::default();
        normal.word(stage.side.namespace(), "NS");
        for side in Side::ALL {
            normal.word(side.program(), "SHIM");
            normal.word(side.runtime(), "RUNTIME");
        }
        let mut s = Subject {
            bed,
            stage,
            record: Record::default(),
            normal,
            roots: vec!["/run/containerd/runc"],
            since: stage.events.count(),
            ids: Vec::new(),
            shims: HashMap::new(),
        };
        let program = PathBuf::from(s.program());
        s.normal.word(&program.parent().unwrap_or(&program).display().to_string(), "BIN");
        std::fs::create_dir_all(s.host(&s.scratch("")))?;
        Ok(s)
    }

    /// Whether this is our side: for what has to be asked in another way of each, never for what is seen.
    pub fn ours(&self) -> bool {
        self.stage.side == Side::Ours
    }

    /// A path of the node, as this process reaches it.
    pub fn host(&self, path: &str) -> PathBuf {
        self.stage.root.join(path.trim_start_matches('/'))
    }

    /// A path in this side's scratch folder in the node.
    pub fn scratch(&self, name: &str) -> String {
        format!("{SCRATCH}/{}/{name}", self.stage.side.namespace())
    }

    /// A container's bundle in the node.
    pub fn bundle(&self, id: &str) -> String {
        format!("{}/{}/{id}", left::BUNDLES, self.stage.side.namespace())
    }

    /// Adds an observation.
    pub fn note(&mut self, name: impl Into<String>, value: impl AsRef<str>) {
        self.record.note(name, self.normal.text(value.as_ref()));
    }

    /// Waits until something holds, and notes whether it ever did.
    pub fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        let mut held = holds(self);
        while !held && start.elapsed() < patient(Duration::from_secs(10)) {
            std::thread::sleep(Duration::from_millis(5));
            held = holds(self);
        }
        self.note(what, if held { "yes" } else { "never" });
    }

    /// Gives a process that was started its name, and notes the outcome.
    pub fn settle(&mut self, name: String, id: &str, started: Option<&str>, outcome: Outcome) -> Outcome {
        for field in outcome.iter().flatten() {
            match (field, started) {
                (Field::Pid("pid", pid), Some(process)) => self.normal.name_pid(*pid, process),
                (Field::Pid("shim", pid), _) => self.normal.name_pid(*pid, &format!("shim of {id}")),
                _ => {}
            }
        }
        self.record.note(name, calls::shown(&outcome, &self.normal));
        outcome
    }

    fn starts(id: &str, call: &Call) -> Option<String> {
        match call {
            Call::Start("") => Some(id.to_owned()),
            Call::Start(exec) => Some(format!("{id}/{exec}")),
            _ => None,
        }
    }

    /// A call through containerd.
    pub fn call(&mut self, call: Call) -> Outcome {
        self.call_for(ID, call)
    }

    /// A call through containerd for a container.
    pub fn call_for(&mut self, id: &str, call: Call) -> Outcome {
        let (name, started) = (call.name(id), Self::starts(id, &call));
        let outcome = self.stage.handle.block_on(async {
            let done = timeout(patient(CALL), self.stage.daemon.call(id, call)).await;
            done.unwrap_or_else(|_| Err(Failure::broken("not in time")))
        });
        self.settle(name, id, started.as_deref(), outcome)
    }

    /// A call to the shim itself.
    pub fn direct(&mut self, call: Call) -> Outcome {
        self.direct_for(ID, call)
    }

    /// A call for a container to its shim itself.
    pub fn direct_for(&mut self, id: &str, call: Call) -> Outcome {
        let (name, started) = (format!("shim: {}", call.name(id)), Self::starts(id, &call));
        let outcome = match self.shim(id) {
            Ok(shim) => self.stage.handle.block_on(async {
                let done = timeout(patient(CALL), shim.call(id, call)).await;
                done.unwrap_or_else(|_| Err(Failure::broken("not in time")))
            }),
            Err(e) => Err(e),
        };
        self.settle(name, id, started.as_deref(), outcome)
    }

    /// The connection to a container's shim, made when it is first asked for.
    pub fn shim(&mut self, id: &str) -> Result<Shim, Failure> {
        if let Some(shim) = self.shims.get(id) {
            return Ok(shim.clone());
        }
        let bundle = self.host(&self.bundle(id));
        let address = Address::of_bundle(&bundle).map_err(|_| Failure::broken("no address in the bundle"))?;
        let shim = self.connect(&address)?;
        self.shims.insert(id.to_owned(), shim.clone());
        Ok(shim)
    }

    /// A connection to a socket.
    pub fn connect(&self, address: &Address) -> Result<Shim, Failure> {
        let namespace = self.stage.side.namespace();
        self.stage.handle.block_on(Shim::connect(&self.stage.root, address, namespace))
    }

    /// Describes a process and starts it, if it could be described.
    pub fn exec(&mut self, id: &'static str, spec: String, stdio: Stdio) -> Outcome {
        self.call(Call::Exec(Box::new(NewExec { id, spec, stdio })))?;
        self.call(Call::Start(id))
    }

    /// Begins a call that will take its time; through containerd or to the shim itself.
    pub fn begin(&mut self, call: Call, direct: bool) -> JoinHandle<Outcome> {
        let (shim, daemon) = (self.shim(ID), self.stage.daemon.clone());
        self.stage.handle.spawn(async move {
            let work = async {
                match shim {
                    Ok(shim) if direct => shim.call(ID, call).await,
                    Err(e) if direct => Err(e),
                    _ => daemon.call(ID, call).await,
                }
            };
            timeout(patient(CALL), work).await.unwrap_or_else(|_| Err(Failure::broken("not in time")))
        })
    }

    /// Notes how a call that was begun has ended.
    pub fn ended(&mut self, name: impl Into<String>, begun: JoinHandle<Outcome>) {
        let outcome = self.stage.handle.block_on(begun).unwrap_or_else(|e| Err(Failure::broken(e)));
        let _ = self.settle(name.into(), ID, None, outcome);
    }

    /// Whether an event of this topic has come for the usual container.
    pub fn heard(&self, topic: &str) -> bool {
        self.stage.events.heard(self.since, topic, ID)
    }

    /// A command in the node; notes its status and what it printed.
    pub fn command(&mut self, name: &str, script: &str) -> Result<Output> {
        let output = self.bed.run(Node::A, &["sh", "-c", script])?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.note(format!("{name}: status"), format!("{:?}", output.status.code()));
        // the first line: how to use it is another matter
        let said = text(&output.stderr);
        self.note(format!("{name}: stderr"), said.lines().next().unwrap_or_default());
        Ok(output)
    }

    /// Kills the usual container, waits for its end and deletes its task.
    pub fn end(&mut self) {
        let _ = self.call(Call::Kill("", 9));
        let _ = self.call(Call::Wait(""));
        let _ = self.call(Call::Delete(""));
    }

    /// Streams that are FIFOs, and the client's ends of them.
    pub fn fifos(&mut self, name: &str, stdin: bool, terminal: bool) -> Result<(Stdio, Streams)> {
        let path = |end: &str| self.scratch(&format!("{name}-{end}"));
        let (input, out, err) = (path("in"), path("out"), path("err"));
        let streams = Streams {
            stdin: if stdin { Some(streams::stdin(&self.host(&input))?) } else { None },
            stdout: Reader::make(&self.host(&out))?,
            stderr: if terminal { None } else { Some(Reader::make(&self.host(&err))?) },
        };
        let some = |there: bool, path: String| if there { path } else { String::new() };
        let stdio = Stdio { stdin: some(stdin, input), stdout: out, stderr: some(!terminal, err), terminal };
        Ok((stdio, streams))
    }

    /// Both streams into one file of the scratch folder.
    pub fn log(&self, name: &str) -> Stdio {
        let uri = format!("file://{}", self.scratch(name));
        Stdio { stdout: uri.clone(), stderr: uri, ..Default::default() }
    }

    /// What a file of the node holds; nothing if there is none.
    pub fn read(&self, path: &str) -> String {
        let bytes = std::fs::read(self.host(path)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What a file of the scratch folder holds.
    pub fn scratched(&self, name: &str) -> String {
        self.read(&self.scratch(name))
    }

    /// Notes the entries of the usual container's bundle, each by itself.
    pub fn note_bundle(&mut self, when: &str) {
        let bundle = self.bundle(ID);
        for dir in [bundle.clone(), format!("{bundle}/work")] {
            let shown = dir.replace(&bundle, "bundle");
            // the link leads to a place that only the node has
            let place = if dir == bundle {
                dir
            } else {
                format!("{}/{}/{ID}", left::WORK, self.stage.side.namespace())
            };
            for (name, kind) in left::entries(&self.host(&place)) {
                self.note(format!("{when}: {shown}/{name}"), kind);
            }
        }
    }

    /// Ends everything, and notes the events and what is left.
    pub fn finish(mut self) -> Record {
        let stage = self.stage;
        let ids = self.ids.clone();
        for id in &ids {
            let gone = stage.handle.block_on(async {
                let gone = stage.namespace.task_remove(id, patient(Duration::from_secs(10))).await;
                let request = DeleteContainerRequest { id: (*id).to_owned() };
                let mut containers = ContainersClient::new(stage.channel.clone());
                let record = containers.delete(stage.daemon.request(request)).await;
                let snapshot = stage.namespace.snapshot_remove("overlayfs", id).await;
                gone.and(snapshot).and(record.map(drop).map_err(anyhow::Error::from))
            });
            if let Err(e) = gone {
                self.note(format!("cleaning up {id}"), format!("{e:#}"));
            }
        }
        for id in &ids {
            // what was never made is not deleted
            if stage.events.heard(self.since, "/tasks/create", id) {
                stage.events.await_deletion(self.since, id);
            }
            stage.events.note(self.since, id, &self.normal, &mut self.record);
        }
        let start = Instant::now();
        let roots = self.roots.clone();
        let mut found = left::findings(stage.pid, stage.side.namespace(), &roots);
        while found.values().any(|f| !f.is_empty()) && start.elapsed() < patient(Duration::from_secs(5)) {
            std::thread::sleep(Duration::from_millis(20));
            found = left::findings(stage.pid, stage.side.namespace(), &roots);
        }
        for (kind, names) in found {
            self.note(
                format!("left: {kind}"),
                if names.is_empty() { "nothing".into() } else { names.join(" ") },
            );
        }
        let _ = std::fs::remove_dir_all(self.host(&self.scratch("")));
        self.record
    }
}
