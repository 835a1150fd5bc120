//! One of the two sides of a comparison, for as long as a bed lives: its namespace in containerd, its runtime's name, its image.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use containerd_client::tonic::transport::Channel;
use tokio::runtime::Handle;
use transship::containerd::{Containerd, Namespace};

use crate::bed::{Bed, Node};
use crate::daemon::Daemon;
use crate::events::Events;
use crate::requirements;

/// Which shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// runc's.
    Theirs,
    /// Ours.
    Ours,
}

impl Side {
    /// Both.
    pub const ALL: [Side; 2] = [Side::Theirs, Side::Ours];

    /// The runtime's type as containerd's configuration has it.
    pub fn runtime(self) -> &'static str {
        match self {
            Side::Theirs => "io.containerd.runc.v2",
            Side::Ours => "io.containerd.transship.v2",
        }
    }

    /// The shim's program.
    pub fn program(self) -> &'static str {
        match self {
            Side::Theirs => "containerd-shim-runc-v2",
            Side::Ours => "containerd-shim-transship-v2",
        }
    }

    /// The namespace of its containers; the two are equally long, because paths can be too long.
    pub fn namespace(self) -> &'static str {
        match self {
            Side::Theirs => "nsrunc",
            Side::Ours => "nsours",
        }
    }
}

/// A side on a bed.
pub struct Stage {
    /// Which one.
    pub side: Side,
    /// The node's process 1.
    pub pid: u32,
    /// The node's root.
    pub root: PathBuf,
    /// A runtime that a thread of its own drives.
    pub handle: Handle,
    /// containerd.
    pub channel: Channel,
    /// containerd's tasks.
    pub daemon: Daemon,
    /// containerd's other services, with our own client.
    pub namespace: Namespace,
    /// The events of the namespace.
    pub events: Events,
    /// The image's snapshot.
    pub parent: String,
    /// Path of our shim's program in the node.
    pub our_program: String,
}

impl Stage {
    /// Makes a side ready.
    pub fn set(bed: &Bed, side: Side) -> Result<Stage> {
        let name = side.namespace();
        let cache = std::env::var("TRANSSHIP_CACHE").unwrap_or_else(|_| "/var/cache/transship".into());
        let image = format!("{cache}/images/busybox.tar");
        bed.ok(Node::A, &["ctr", "-n", name, "images", "import", &image])?;
        let table = bed.ok(Node::A, &["ctr", "-n", name, "snapshots", "ls"])?;
        let committed = table
            .lines()
            .find(|l| l.split_whitespace().last() == Some("Committed"))
            .context("no unpacked image")?;
        let parent = committed.split_whitespace().next().context("a snapshot's key")?.to_owned();
        let pid = bed.pid(Node::A)?;
        let root = bed.path(Node::A, "/")?;

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        // scenarios are plain functions in other threads; this one drives their connections
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        let socket = root.join("run/containerd/containerd.sock");
        let channel = handle.block_on(containerd_client::connect(&socket)).context("containerd")?;
        let events = Events::subscribe(&handle, channel.clone(), &Daemon::new(channel.clone(), name))?;
        let namespace = handle.block_on(Containerd::connect(&socket))?.namespace(name)?;
        let our_program = requirements::bin_dir().canonicalize()?.join(Side::Ours.program());
        ensure!(our_program.exists(), "no {}", our_program.display());
        Ok(Stage {
            side,
            pid,
            root,
            daemon: Daemon::new(channel.clone(), name),
            handle,
            channel,
            namespace,
            events,
            parent,
            our_program: our_program.display().to_string(),
        })
    }
}
