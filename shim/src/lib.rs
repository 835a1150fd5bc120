//! The binary `containerd-shim-transship-v2`: a containerd shim v2 that wraps stock runc and can move its containers to another node.
//!
//! # Layout
//!
//! | module | what lives there |
//! |---|---|
//! | `bootstrap`, `info` | the short actions: `start` and `delete`; `-info` and `-v` |
//! | `detect` | which Task API the calling containerd speaks |
//! | `group` | which containers share a shim |
//! | `server` | the long-lived process: ttrpc server, log, signals |
//! | `service` | the Task API, call by call |
//! | `container`, `lifecycle`, `control`, `exec`, `checkpoint` | a container and what is done with it |
//! | `process`, `state` | one process, its states |
//! | `runc`, `runc_error`, `runtime`, `command`, `reaper` | running runc, or crun; waiting for children |
//! | `descriptors` | how many of them the shim may have, and what its children may |
//! | `remains` | what a killed restore leaves behind |
//! | `options`, `bundle`, `mounts` | what comes with a request, the bundle's files, the root's mounts |
//! | `io`, `console`, `stdio` | stdio and terminals; opening them for a runc run |
//! | `events`, `stats`, `oom` | events to containerd, cgroup metrics, OOM kills |
//! | `vet` | whether images that containerd wants restored are looked at, and what is said when they are refused |
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
mod descriptors;
mod detect;
mod errors;
mod events;
mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod group;
mod hooks;
mod info;
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
mod runc_error;
mod runtime;
mod server;
mod service;
mod state;
mod stats;
mod stdio;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_clients;
mod vet;

use std::{process::ExitCode, sync::Arc};

use anyhow::{Result, bail};
use containerd_shim::Flags;
use transship::{
    memory::{daemon::keeper, inject::helper},
    migrate::filling::KEEPER,
    private,
};

/// What the binary does.
pub fn main() -> ExitCode {
    // the same executable is CRIU's gate and its tar: that has to be quick
    if let Some(code) = transship::criu::gate::main_if_invoked() {
        return code;
    }
    private::process();
    if std::env::args_os().nth(1).is_some_and(|arg| arg == KEEPER) {
        return keeper::main();
    }
    if std::env::args_os().nth(1).is_some_and(|arg| arg == helper::ARG) {
        return helper::main();
    }
    private::umask_for_runc();
    server::save_memory();
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = match containerd_shim::parse(&args) {
        Ok(flags) => flags,
        Err(e) => {
            eprintln!("{}: {e}", bootstrap::RUNTIME_NAME);
            // Go's status for a wrong command line
            return ExitCode::from(2);
        }
    };
    match run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows the stderr of a failed start to the user.
            eprintln!("{}: {e:#}", bootstrap::RUNTIME_NAME);
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<()> {
    if flags.version {
        info::print_version();
        return Ok(());
    }
    if flags.info {
        return info::print();
    }
    if flags.namespace.is_empty() {
        bail!("shim namespace cannot be empty");
    }
    match flags.action.as_str() {
        "start" => bootstrap::start(flags),
        "delete" => bootstrap::delete(flags),
        _ => {
            // the reaper waits for every child: it must not see the stops of one that is traced
            helper::through(&transship::program::own()?);
            server::run(flags, Arc::new(migration::Migrations::default()))
        }
    }
}
