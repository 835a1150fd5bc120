//! The binary `containerd-shim-transship-v2`: a containerd shim v2 that wraps stock runc and can move its containers to another node.
//!
//! # Layout
//!
//! | module | what lives there |
//! |---|---|
//! | `bootstrap` | the short actions: `start`, `delete`, `-info`, `-v` |
//! | `detect` | which Task API the calling containerd speaks |
//! | `group` | which containers share a shim |
//! | `server` | the long-lived process: ttrpc server, log, signals |
//! | `service` | the Task API, call by call |
//! | `container`, `lifecycle`, `control`, `exec`, `checkpoint` | a container and what is done with it |
//! | `process`, `state` | one process, its states |
//! | `runc`, `command`, `reaper` | running runc; waiting for children |
//! | `remains` | what a killed restore leaves behind |
//! | `options`, `bundle`, `mounts` | what comes with a request, the bundle's files, the root's mounts |
//! | `io`, `console`, `stdio` | stdio and terminals; opening them for a runc run |
//! | `events`, `stats`, `oom` | events to containerd, cgroup metrics, OOM kills |
//! | `cri` | what containerd's CRI expects of a checkpoint |
//! | `hooks`, `migration` | where the migration hooks in; sending and receiving containers |

mod bootstrap;
mod bundle;
mod checkpoint;
mod command;
#[allow(dead_code)] // until migration.rs moves terminals
mod console;
mod container;
mod control;
mod cri;
mod detect;
mod errors;
mod events;
mod exec;
mod group;
mod hooks;
#[allow(dead_code, unused_imports)] // until migration.rs moves streams
mod io;
mod lifecycle;
mod migration;
mod mounts;
mod oom;
mod options;
mod process;
mod reaper;
mod remains;
mod runc;
mod server;
mod service;
mod state;
mod stats;
mod stdio;
#[cfg(test)]
mod tests;

use std::{process::ExitCode, sync::Arc};

use anyhow::{Result, bail};
use transship::{
    memory::{daemon::keeper, inject::helper},
    migrate::filling::KEEPER,
};

fn main() -> ExitCode {
    // the same executable is CRIU's gate and its tar: that has to be quick
    if let Some(code) = transship::criu::gate::main_if_invoked() {
        return code;
    }
    if std::env::args_os().nth(1).is_some_and(|arg| arg == KEEPER) {
        return keeper::main();
    }
    if std::env::args_os().nth(1).is_some_and(|arg| arg == helper::ARG) {
        return helper::main();
    }
    server::save_memory();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows the stderr of a failed start to the user.
            eprintln!("{}: {e:#}", bootstrap::RUNTIME_NAME);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&args)?;
    if flags.version {
        bootstrap::version();
        return Ok(());
    }
    if flags.info {
        return bootstrap::info();
    }
    if flags.namespace.is_empty() {
        bail!("shim namespace cannot be empty");
    }
    match flags.action.as_str() {
        "start" => bootstrap::start(&flags),
        "delete" => bootstrap::delete(&flags),
        _ => {
            // the reaper waits for every child: it must not see the stops of one that is traced
            helper::through(&transship::program::own()?);
            server::run(&flags, Arc::new(migration::Migrations::default()))
        }
    }
}
