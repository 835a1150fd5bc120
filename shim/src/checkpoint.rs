//! The Task API's checkpoint, and the start of a container that was created from one: `runc checkpoint` and `runc restore`. A
//! migration does not pass here.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use containerd_shim_protos::{events::task::TaskCheckpointed, protobuf::well_known_types::any::Any, topics};
use transship::private;

use crate::{
    container::{Container, Origin},
    cri,
    errors::{TaskError, TaskResult},
    lifecycle::explain,
    options,
    reaper::ExitWatch,
    runc::{self, RestoreArgs},
    state::Op,
    vet,
};

/// `runc restore` hangs on some failures of CRIU's; large memories need their time.
const RESTORE_DEADLINE: Duration = Duration::from_secs(600);

/// How much of a CRIU log is searched, in bytes.
const LOG_LIMIT: u64 = 64 << 20;

impl Container {
    /// Dumps the container into `path`. It is left running unless the options say otherwise.
    pub async fn checkpoint(&self, path: &str, call_options: Option<&Any>) -> TaskResult<()> {
        let _op = self.init.op.lock().await;
        self.refuse_while_moving()?;
        self.init.check(Op::Checkpoint)?;
        let own_work = self.bundle.join("work").join("criu-work");
        let args = options::checkpoint_args(call_options, Path::new(path), &own_work)?;
        let result = self.runc.checkpoint(&self.id, &args).await;
        if let Err(e) = result {
            let log = args.work_dir.join("dump.log");
            // The work folder may be temporary; the bundle's copy stays until the container is deleted.
            let kept = self.bundle.join("criu-dump.log");
            let reason = search_and_keep(log, kept.clone()).await;
            remove_if(&own_work, args.work_dir == own_work);
            let first = format!("{e:#}").lines().next().unwrap_or_default().to_string();
            let text = match reason {
                Some(reason) => format!("{first}: criu: {reason} path= {}", kept.display()),
                None => format!("{first} path= {}", kept.display()),
            };
            return Err(TaskError::unknown(text));
        }
        if args.work_dir == own_work {
            cri::keep(&self.bundle, &self.id, &own_work);
        }
        remove_if(&own_work, args.work_dir == own_work);
        let event = TaskCheckpointed {
            container_id: self.id.clone(),
            checkpoint: args.image_path.display().to_string(),
            ..Default::default()
        };
        self.shared.publish(topics::TASK_CHECKPOINTED_EVENT_TOPIC, event);
        Ok(())
    }

    /// Restores a container that was created from a checkpoint; its pid is set, the watch on it returned.
    pub(crate) async fn restore_checkpoint(&self) -> TaskResult<ExitWatch> {
        let Origin::Checkpoint { image, parent } = &self.origin else {
            return Err(TaskError::failed_precondition("not created from a checkpoint"));
        };
        let restore = vet::Restore {
            namespace: self.shared.namespace.clone(),
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            images: image.clone(),
            parent: parent.clone(),
            unvetted: self.shared.unvetted.clone(),
        };
        vet::check(restore).await?;
        let mut args = RestoreArgs {
            image_path: image.clone(),
            work_dir: self.criu_work_dir(),
            parent_path: Some(parent.clone()),
            no_pivot: self.options.no_pivot_root,
            deadline: Some(RESTORE_DEADLINE),
            ..Default::default()
        };
        // CRIU would make its log for everybody, in a directory that others may walk through; it keeps the mode of what is there
        if let Err(e) = private::create(&args.work_dir.join("restore.log")) {
            log::debug!("CRIU's log in {}: {e}", args.work_dir.display());
        }
        let mark = self.shared.reaper.mark();
        let stdio = self.open_stdio(&self.init).await.context("failed to create init process I/O")?;
        args.console_socket = stdio.console.as_ref().map(|c| c.path().to_path_buf());
        let restored = match self.runc.restore(&self.id, &args, stdio.child).await {
            Ok(()) => self.begin_stdio(&self.init, stdio.console).await,
            Err(e) => Err(e),
        };
        if let Err(e) = restored {
            if let Some(io) = self.init.io() {
                io.close().await;
            }
            let e = explain(e, "OCI runtime restore failed");
            return Err(match criu_error(&args.work_dir.join("restore.log")) {
                Some(reason) => TaskError::unknown(format!("{e}: criu: {reason}")),
                None => e,
            });
        }
        let pid =
            runc::read_pid(&self.runc.pid_file()).context("failed to retrieve OCI runtime container pid")?;
        self.init.set_pid(pid);
        Ok(self.shared.reaper.watch(pid as i32, mark))
    }
}

/// [`criu_error`], and a copy of the log. In a helper thread: the log of a large container has many megabytes, and the other containers of
/// the pod shall not wait for it.
async fn search_and_keep(log: PathBuf, kept: PathBuf) -> Option<String> {
    let work = move || {
        if let Err(e) = fs::copy(&log, &kept) {
            log::error!("failed to copy dump.log to criu-dump.log: {e}");
        }
        criu_error(&log)
    };
    tokio::task::spawn_blocking(work).await.ok().flatten()
}

/// CRIU's own first error in its log: what went wrong; the lines after it are mostly consequences. Without the time stamp.
pub fn criu_error(log: &Path) -> Option<String> {
    let file = fs::File::open(log).ok()?;
    let lines = BufReader::new(file.take(LOG_LIMIT)).split(b'\n');
    for line in lines.map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        if let Some(at) = line.find("Error (") {
            return Some(line[at..].trim().to_string());
        }
    }
    None
}

fn remove_if(dir: &PathBuf, remove: bool) {
    if remove && let Err(e) = fs::remove_dir_all(dir) {
        log::debug!("remove {}: {e}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_of_criu_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        assert_eq!(criu_error(&log), None);
        let text = "(00.0) Warn  (a.c:1): x\n(00.1) Error (criu/sk-inet.c:188): Connected TCP socket\n(00.2) Error (b): y\n";
        fs::write(&log, text).unwrap();
        assert_eq!(criu_error(&log).as_deref(), Some("Error (criu/sk-inet.c:188): Connected TCP socket"));
    }
}
