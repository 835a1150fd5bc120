//! The migration service of the shim: one control socket per container (see [`transship::control`]), on which the node's
//! agent asks to send, receive, checkpoint or restore it.
//!
//! | file | what lives there |
//! |---|---|
//! | `mod.rs` | the sockets' life and what is known of each container's migration |
//! | `serve` | one request: read, dispatched, answered |
//! | `source` | the container as the library's `SourceTask` |
//! | `destination` | the container as the library's `DestinationTask` |
//!
//! The work itself is the library's; here it is tied to the shim's containers, runc and stdio. Each request runs in a thread
//! of its own with blocking I/O, so that a long dump stalls nobody; the shim's runtime is entered through its handle.

mod destination;
mod serve;
mod source;

use std::{
    collections::HashMap,
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::task::JoinHandle;
use transship::{
    control::{self, Event, MigrationState, ReceiveRequest},
    migrate::{
        abort::Abort,
        filling::{Filling, Whereabouts},
        source::Still,
        tuning::OnPostCopyFailure,
    },
    private,
};

use crate::{
    container::Container,
    hooks::{Abandoned, Hooks},
};

/// How long a deletion waits for the migration of a container that has not arrived: longer than an undone restore takes.
const ABANDON: Duration = Duration::from_secs(40);

/// What is known of one container's migration; shared by the threads that serve its socket.
#[derive(Default)]
pub struct Slot(Mutex<SlotState>);

#[derive(Default)]
struct SlotState {
    migration: MigrationState,
    abort: Option<Abort>,
    undecided: Option<Still>,
    filling: Option<Filling>,
    /// Where a container that arrived came from, and what is to become of it if its memory is lost there.
    origin: (String, OnPostCopyFailure),
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the container stands between two nodes.
    pub fn migration(&self) -> MigrationState {
        let state = self.state();
        let (MigrationState::Arrived { migration_id }, Some(filling)) = (&state.migration, &state.filling)
        else {
            return state.migration.clone();
        };
        let (migration_id, (peer, choice)) = (migration_id.clone(), state.origin.clone());
        match filling.whereabouts() {
            Whereabouts::Here => MigrationState::Arrived { migration_id },
            Whereabouts::Away(left) => MigrationState::Filling { migration_id, peer, left },
            Whereabouts::Lost(bytes) => MigrationState::Lost { migration_id, peer, bytes, choice },
        }
    }

    /// Notes where it stands now.
    fn set(&self, migration: MigrationState) {
        self.state().migration = migration;
    }

    /// Begins a migration that `abort` can end; refused while another one is in progress.
    fn begin(&self, migration: MigrationState, abort: Abort) -> Result<(), String> {
        let mut state = self.state();
        if state.abort.is_some() || state.undecided.is_some() {
            return Err(format!(
                "another migration of this container is in progress ({:?})",
                state.migration
            ));
        }
        (state.migration, state.abort) = (migration, Some(abort));
        Ok(())
    }

    /// It has arrived; `filling` completes its memory in the background.
    fn arrived(&self, request: &ReceiveRequest, filling: Option<Filling>) {
        let migration_id = request.migration_id.clone();
        let mut state = self.state();
        state.origin = (request.peer.clone(), request.on_post_copy_failure);
        (state.migration, state.abort) = (MigrationState::Arrived { migration_id }, None);
        state.filling = filling;
    }

    /// Waits until the memory of a container that arrived here is in its place: only then can it leave again.
    fn wait_filled(&self, say: &dyn Fn(Event)) -> anyhow::Result<()> {
        let Some(filling) = self.state().filling.take() else { return Ok(()) };
        if !filling.is_finished() {
            say(Event::Phase { phase: "wait for the last migration's memory".into() });
        }
        filling.wait()
    }

    /// Asks the migration that is in progress to end, if there is one; false: it was committed, and goes on to its end.
    fn ask_to_end(&self) -> Option<bool> {
        self.state().abort.as_ref().map(Abort::ask)
    }

    /// Ends it, however it went.
    fn end(&self, migration: MigrationState) {
        let mut state = self.state();
        (state.migration, state.abort) = (migration, None);
    }
}

struct Listening {
    path: PathBuf,
    task: JoinHandle<()>,
    slot: Arc<Slot>,
}

/// The control sockets of all containers of this shim.
#[derive(Default)]
pub struct Migrations(Mutex<HashMap<String, Listening>>);

impl Migrations {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Listening>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hooks for Migrations {
    fn created(&self, container: &Arc<Container>) {
        let path = control::socket_path(&container.shared.namespace, &container.id);
        let listener = match listen(&path) {
            Ok(listener) => listener,
            Err(e) => {
                // the container itself works; it just cannot be moved
                log::error!("control socket {} of {}: {e:#}", path.display(), container.id);
                return;
            }
        };
        let slot = Arc::new(Slot::default());
        let task = container.shared.runtime.spawn(accept(listener, container.clone(), slot.clone()));
        self.table().insert(container.id.clone(), Listening { path, task, slot });
    }

    fn abandon(&self, container: &Arc<Container>) -> Abandoned {
        let slot = self.table().get(&container.id).map(|listening| listening.slot.clone());
        let id = container.id.clone();
        Box::pin(async move {
            let Some(slot) = slot else { return };
            let since = Instant::now();
            while slot.ask_to_end().is_some() {
                if since.elapsed() > ABANDON {
                    log::error!("{id}: its migration does not end; deleting it all the same");
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    }

    fn deleted(&self, container: &Arc<Container>) {
        if let Some(listening) = self.table().remove(&container.id) {
            listening.task.abort();
            listening.slot.ask_to_end();
            fs::remove_file(&listening.path).ok();
        }
    }
}

fn listen(path: &Path) -> Result<tokio::net::UnixListener> {
    if let Some(dir) = path.parent() {
        private::dir(Path::new(control::RUN_DIR))?;
        private::dir(dir)?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(tokio::net::UnixListener::from_std(listener)?)
}

async fn accept(listener: tokio::net::UnixListener, container: Arc<Container>, slot: Arc<Slot>) {
    loop {
        let stream = match listener.accept().await.and_then(|(s, _)| s.into_std()) {
            Ok(stream) => stream,
            Err(e) => {
                log::warn!("control socket of {}: {e}", container.id);
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (container, slot) = (container.clone(), slot.clone());
        let name = format!("move-{}", &container.id[..container.id.len().min(8)]);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            if let Err(e) = stream
                .set_nonblocking(false)
                .map_err(Into::into)
                .and_then(|()| serve::serve(&stream, &container, &slot))
            {
                log::warn!("control request for {}: {e:#}", container.id);
            }
        });
        if let Err(e) = spawned {
            log::error!("starting a thread for a control request: {e}");
        }
    }
}
