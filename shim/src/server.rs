//! The long-lived shim process: the ttrpc server on the inherited socket, the log, the signals, and its end.
//!
//! One thread (tokio's current-thread runtime); helper threads come and go for blocking work. Memory of the idle process matters,
//! there is one for every pod, see [`save_memory`].

use std::{
    env,
    fs::OpenOptions,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use containerd_shim::{Flags, logger::FifoLogger};
use containerd_shim_protos::{
    shim_async::{Task, create_task},
    ttrpc::r#async::{Server, Service as Methods},
};
use log::LevelFilter;
use tokio::{
    runtime::{Builder, Handle},
    signal::unix::{SignalKind, signal},
};

use crate::{
    bootstrap::LISTEN_FD, container::Shared, descriptors, events::Publisher, hooks::Hooks, reaper::Reaper,
    service::Service, vet,
};

/// Time for the answer to a Shutdown call to leave before the process ends. The tasks that write it are ready by then and come first; a
/// client that deletes a container waits for our end.
const LAST_WORDS: Duration = Duration::from_millis(1);

/// Time for the last events to reach containerd before the process ends. containerd asks for the end while it starts itself, of shims
/// whose containers have ended meanwhile, and takes events only when it has started.
const LAST_EVENTS: Duration = Duration::from_secs(10);

/// The same when it is a signal that ends the process: the machine goes down, or somebody wants to be rid of it.
const LAST_EVENTS_KILLED: Duration = Duration::from_secs(2);

/// Stack of a helper thread, in bytes.
const HELPER_STACK: usize = 512 << 10;

/// Has glibc keep one arena and give free memory back: threads come and go here, and an arena for each would stay.
pub fn save_memory() {
    // SAFETY: called first thing in main, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Serves until containerd asks for the end, or SIGTERM or SIGINT do.
pub fn run(flags: &Flags, hooks: Arc<dyn Hooks>) -> Result<()> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(HELPER_STACK)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("build the runtime")?;
    runtime.block_on(serve(flags, hooks))
}

async fn serve(flags: &Flags, hooks: Arc<dyn Hooks>) -> Result<()> {
    open_log(flags.debug)?;
    descriptors::raise();
    nix::sys::prctl::set_child_subreaper(true).context("become a child subreaper")?;
    let listener = inherited_listener()?;
    let socket = listener.local_addr().ok().and_then(|a| a.as_pathname().map(ToOwned::to_owned));

    let reaper = Reaper::start()?;
    let address = env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS is not set")?;
    let events = Arc::new(Publisher::new(&address, &flags.namespace));
    let shared = Shared {
        namespace: flags.namespace.clone(),
        reaper,
        events: events.clone(),
        runtime: Handle::current(),
        unvetted: vet::UNVETTED.into(),
    };
    let service = Service::new(shared, hooks);

    let mut server = Server::new().add_listener(listener.try_into().context("listen")?);
    for (name, methods) in services(Arc::new(service.clone())) {
        server = server.register_service([(name, methods)].into());
    }
    server.start().await.context("start the ttrpc server")?;

    let mut term = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let patience = tokio::select! {
        () = service.wait_shutdown() => LAST_EVENTS,
        _ = term.recv() => LAST_EVENTS_KILLED,
        _ = int.recv() => LAST_EVENTS_KILLED,
    };
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
    events.flush(patience).await;
    tokio::time::sleep(LAST_WORDS).await;
    // Whatever still runs (waiters, copies to nobody) must not keep the process.
    std::process::exit(0)
}

/// The Task service under both names that containerd knows it by. The crate generates only `containerd.task.v3.Task`;
/// `containerd.task.v2.Task` of containerd 1.x has the same methods and the same messages, so the generated table is
/// registered a second time under that name.
pub(crate) fn services(service: Arc<dyn Task + Send + Sync>) -> Vec<(String, Methods)> {
    let v3 = create_task(service.clone()).into_values();
    let v2 = create_task(service).into_values();
    let names = |name: &'static str, tables| Iterator::zip(std::iter::repeat(name.to_string()), tables);
    names("containerd.task.v3.Task", v3).chain(names("containerd.task.v2.Task", v2)).collect()
}

fn inherited_listener() -> Result<UnixListener> {
    // SAFETY: plain call; it fails for a descriptor that is not open.
    let flags = unsafe { libc::fcntl(LISTEN_FD, libc::F_GETFD) };
    anyhow::ensure!(
        flags >= 0,
        "no socket inherited on descriptor {LISTEN_FD}: containerd starts this program with `start`"
    );
    // SAFETY: as above; our children (runc) must not inherit it in their turn.
    unsafe { libc::fcntl(LISTEN_FD, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: open, and nobody else in this process owns it.
    Ok(UnixListener::from(unsafe { OwnedFd::from_raw_fd(LISTEN_FD) }))
}

/// Sends the log, and stderr with the texts of panics, to the FIFO that containerd has put into the bundle.
fn open_log(debug: bool) -> Result<()> {
    // For reading as well: containerd can then go away and come back without us getting EPIPE or blocking in open. Nonblocking:
    // when nobody reads for long, lines are lost rather than the shim held up.
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("log");
    let fifo = opened.context("open the log FIFO")?;
    // SAFETY: both descriptors are open.
    unsafe { libc::dup2(fifo.as_raw_fd(), libc::STDERR_FILENO) };
    log::set_boxed_logger(Box::new(FifoLogger::with_file(fifo))).context("set the logger")?;
    log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::NoHooks;

    #[tokio::test]
    async fn both_versions_are_served() {
        let shared = Shared {
            namespace: "ns".into(),
            reaper: Reaper::default(),
            events: Arc::new(Publisher::new("/nonexistent", "ns")),
            runtime: Handle::current(),
            unvetted: vet::UNVETTED.into(),
        };
        let table = services(Arc::new(Service::new(shared, Arc::new(NoHooks))));
        let names: Vec<_> = table.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["containerd.task.v3.Task", "containerd.task.v2.Task"]);
        assert!(table.iter().all(|(_, m)| m.methods.len() == 17), "all methods of the Task API");
    }
}
