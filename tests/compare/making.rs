//! Making containers: records, snapshots, tasks.

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, containers_client::ContainersClient,
};
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;
use tokio::time::timeout;

use crate::bed::patient;
use crate::calls::{Call, Failure, Field, Stdio};
use crate::daemon::create_request;
use crate::spec::{self, Spec};
use crate::stage::Side;
use crate::subject::{CALL, ID, Subject};

/// How containerd is told of the runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Named {
    /// By its type.
    #[default]
    Type,
    /// By the path of its program.
    Path,
    /// By runc's type, with the program's path beside it.
    AsRunc,
}

/// A container to be made.
#[derive(Clone)]
pub struct New {
    /// Its id.
    pub id: &'static str,
    /// Its specification.
    pub spec: Spec,
    /// Its streams.
    pub stdio: Stdio,
    /// The runtime's options.
    pub options: Option<Any>,
    /// Mounts in place of the image's snapshot.
    pub rootfs: Option<Vec<Mount>>,
    /// What it is restored from.
    pub checkpoint: Option<Descriptor>,
    /// How its runtime is named.
    pub named: Named,
}

impl New {
    /// The usual one, without streams.
    pub fn of(spec: Spec) -> New {
        let (stdio, named) = Default::default();
        New { id: ID, spec, stdio, options: None, rootfs: None, checkpoint: None, named }
    }

    /// With streams.
    pub fn stdio(self, stdio: Stdio) -> New {
        New { stdio, ..self }
    }

    /// With another id.
    pub fn id(self, id: &'static str) -> New {
        New { id, ..self }
    }

    /// With the runtime's options.
    pub fn options(self, options: Any) -> New {
        New { options: Some(options), ..self }
    }
}

impl Subject<'_> {
    /// Makes a container's record and its snapshot, if there are none yet.
    pub fn record_container(&mut self, new: &New) -> Result<Vec<Mount>> {
        let stage = self.stage;
        let name = match new.named {
            Named::Type => stage.side.runtime().to_owned(),
            Named::AsRunc => Side::Theirs.runtime().to_owned(),
            Named::Path => self.program(),
        };
        let container = Container {
            id: new.id.to_owned(),
            runtime: Some(Runtime { name, options: new.options.clone() }),
            spec: Some(spec::any(spec::SPEC, new.spec.json(stage.side.namespace(), new.id).into_bytes())),
            snapshotter: "overlayfs".into(),
            snapshot_key: new.id.to_owned(),
            ..Default::default()
        };
        let request = stage.daemon.request(CreateContainerRequest { container: Some(container) });
        let mut containers = ContainersClient::new(stage.channel.clone());
        self.ids.push(new.id);
        stage.handle.block_on(async {
            timeout(CALL, containers.create(request)).await?.context("making the container's record")?;
            stage.namespace.snapshot_prepare("overlayfs", new.id, &stage.parent, Default::default()).await
        })
    }

    /// Makes a container and its task; whether that worked.
    pub fn create(&mut self, new: New) -> Result<bool> {
        let mounts = self.record_container(&new)?;
        Ok(self.create_task(&new, mounts))
    }

    /// Makes a task of a container that is there; whether that worked.
    pub fn create_task(&mut self, new: &New, mounts: Vec<Mount>) -> bool {
        let rootfs = new.rootfs.clone().unwrap_or(mounts);
        // options of other types come with the container only, as CRI passes them: containerd refuses them here
        let options = new.options.clone().filter(|o| o.type_url != spec::GENERIC_OPTIONS);
        let mut request = create_request(new.id, rootfs, &new.stdio, options);
        request.checkpoint = new.checkpoint.clone();
        if new.named == Named::AsRunc && self.ours() {
            request.runtime_path = self.program();
        }
        let outcome = self.stage.handle.block_on(async {
            let done = timeout(patient(CALL), self.stage.daemon.create(request)).await;
            done.unwrap_or_else(|_| Err(Failure::broken("not in time")))
        });
        let outcome = outcome.map(|pid| vec![Field::Pid("pid", pid)]);
        self.settle(format!("create {}", new.id), new.id, Some(new.id), outcome).is_ok()
    }

    /// The path of this side's shim in the node.
    pub fn program(&self) -> String {
        let opt = std::env::var("TRANSSHIP_OPT").unwrap_or_else(|_| "/opt/transship".into());
        match self.stage.side {
            Side::Ours => self.stage.our_program.clone(),
            side => format!("{opt}/containerd-{}/bin/{}", self.bed.containerd().version(), side.program()),
        }
    }

    /// Makes a container and starts it.
    pub fn run(&mut self, new: New) -> Result<()> {
        let id = new.id;
        ensure!(self.create(new)?, "{id} could not be made: {}", self.record.text());
        let started = self.call_for(id, Call::Start(""));
        ensure!(started.is_ok(), "{id} could not be started: {started:?}");
        Ok(())
    }

    /// The container of a shell script, running, after it has printed `ready`. Its output is in the scratch file `t1.log`.
    pub fn run_ready(&mut self, spec: Spec) -> Result<()> {
        let log = self.log("t1.log");
        self.run(New::of(spec).stdio(log))?;
        self.until("it is ready", |s| s.scratched("t1.log").contains("ready"));
        Ok(())
    }
}
