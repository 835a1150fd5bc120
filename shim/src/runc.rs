//! The driver of the OCI runtime (stock runc, or what `BinaryName` names): one method per verb. What differs by runtime is in
//! [`crate::runtime`]. No state of ours lives here.
//!
//! What a run that failed has said is in [`crate::runc_error`].

use std::{
    ffi::OsString,
    fs,
    io::{Seek, SeekFrom, Write},
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::OnceCell;
use transship::private;

use crate::{
    command::{self, Finished},
    io::ChildStdio,
    options::RuncOptions,
    reaper::Reaper,
    runc_error::{self, RuncError},
    runtime::{self, Runtime},
};

/// Where runc keeps its state, one folder per containerd namespace: the Go shim's default.
const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// How long a runtime may take to say its version.
const VERSION: Duration = Duration::from_secs(10);

/// How `runc create` makes the container.
#[derive(Debug, Default)]
pub struct CreateArgs {
    /// Socket that gets the pty's master, for a terminal.
    pub console_socket: Option<PathBuf>,
    /// `--no-pivot`.
    pub no_pivot: bool,
    /// `--no-new-keyring`.
    pub no_new_keyring: bool,
}

/// How `runc checkpoint` dumps. CRIU's log is `dump.log` in `work_dir`.
#[derive(Debug, Default, Clone)]
pub struct CheckpointArgs {
    /// Where the images go.
    pub image_path: PathBuf,
    /// Where the log and CRIU's scratch files go.
    pub work_dir: PathBuf,
    /// Images of a previous pre-dump, relative to `image_path`.
    pub parent_path: Option<String>,
    /// Leave the tasks running afterwards.
    pub leave_running: bool,
    /// `--tcp-established`.
    pub open_tcp: bool,
    /// `--ext-unix-sk`.
    pub external_unix_sockets: bool,
    /// `--shell-job`.
    pub terminal: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--empty-ns`, each.
    pub empty_namespaces: Vec<String>,
    /// `--manage-cgroups-mode`, when not empty.
    pub cgroups_mode: String,
}

/// How `runc restore` restores. CRIU's log is `restore.log` in `work_dir`. Everything but the paths may be left at its default.
#[derive(Debug, Default, Clone)]
pub struct RestoreArgs {
    /// The images.
    pub image_path: PathBuf,
    /// Where the log and CRIU's scratch files go (and where it looks for `lazy-pages.socket`).
    pub work_dir: PathBuf,
    /// Images of a previous pre-dump.
    pub parent_path: Option<String>,
    /// Socket that gets the pty's master, for a terminal.
    pub console_socket: Option<PathBuf>,
    /// `--no-pivot`.
    pub no_pivot: bool,
    /// `--tcp-established`.
    pub open_tcp: bool,
    /// `--ext-unix-sk`.
    pub external_unix_sockets: bool,
    /// `--shell-job`.
    pub terminal: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--lazy-pages`.
    pub lazy_pages: bool,
    /// `--empty-ns`, each.
    pub empty_namespaces: Vec<String>,
    /// `--manage-cgroups-mode`, when not empty (`ignore` needs runc 1.2).
    pub cgroups_mode: String,
    /// `--lsm-profile TYPE:NAME`.
    pub lsm_profile: Option<String>,
    /// More flags, as they are.
    pub extra_flags: Vec<String>,
    /// More environment for runc and the criu it starts, e.g. a PATH that has a gate named `criu` first.
    pub env: Vec<(OsString, OsString)>,
    /// After this time runc and its criu are killed: `runc restore` can hang when CRIU fails. None: never.
    pub deadline: Option<Duration>,
}

/// The driver for one container's bundle. Cheap to clone.
#[derive(Clone)]
pub struct Runc {
    binary: String,
    root: PathBuf,
    bundle: PathBuf,
    systemd_cgroup: bool,
    reaper: Reaper,
    runtime: OnceCell<Runtime>,
}

impl Runc {
    /// The driver that `options` ask for.
    pub fn new(options: &RuncOptions, bundle: &Path, namespace: &str, reaper: Reaper) -> Self {
        Self {
            binary: binary(options).to_string(),
            root: root(options, namespace),
            bundle: bundle.to_path_buf(),
            systemd_cgroup: options.systemd_cgroup,
            reaper,
            runtime: OnceCell::new(),
        }
    }

    /// runc's state folder for this namespace (`--root`); the container's is below, by its id.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The runtime's program, as found through PATH.
    pub fn binary(&self) -> &str {
        &self.binary
    }

    /// Which runtime the program is. It is asked once, and only when a checkpoint or a restore has to know.
    async fn runtime(&self) -> Result<&Runtime> {
        let ask = async || {
            if runtime::named_runc(&self.binary) {
                return Ok(Runtime::Runc);
            }
            let mut c = Command::new(&self.binary);
            c.arg("--version");
            let said = command::capture(&self.reaper, c, None, Some(VERSION)).await?;
            anyhow::Ok(Runtime::from_version(&String::from_utf8_lossy(&said.stdout)))
        };
        self.runtime.get_or_try_init(ask).await
    }

    /// Whether the program is crun. Asks it the first time.
    pub async fn is_crun(&self) -> Result<bool> {
        Ok(self.runtime().await?.is_crun())
    }

    /// The runtime, if it can checkpoint and restore.
    async fn criu_runtime(&self) -> Result<&Runtime> {
        let runtime = self.runtime().await?;
        match runtime.without_criu(&self.binary) {
            Some(why) => bail!(why),
            None => Ok(runtime),
        }
    }

    /// Where `create` and `restore` leave the init's pid.
    pub fn pid_file(&self) -> PathBuf {
        self.bundle.join("init.pid")
    }

    /// `runc create`; `stdio` becomes the container's.
    pub async fn create(&self, id: &str, args: &CreateArgs, stdio: ChildStdio) -> Result<()> {
        let mut c = self.command("create");
        c.arg("--bundle").arg(&self.bundle).arg("--pid-file").arg(self.pid_file());
        if let Some(socket) = &args.console_socket {
            c.arg("--console-socket").arg(socket);
        }
        flag(&mut c, args.no_pivot, "--no-pivot");
        flag(&mut c, args.no_new_keyring, "--no-new-keyring");
        c.arg(id);
        self.hand_over(c, stdio, None).await
    }

    /// `runc start`.
    pub async fn start(&self, id: &str) -> Result<()> {
        let mut c = self.command("start");
        c.arg(id);
        self.run(c, None).await.map(drop)
    }

    /// `runc exec --detach` of the process described by the JSON in `process` (an OCI process), its pid into `pid_file`.
    pub async fn exec(
        &self,
        id: &str,
        process: &Path,
        pid_file: &Path,
        console_socket: Option<&Path>,
        stdio: ChildStdio,
    ) -> Result<()> {
        let mut c = self.command("exec");
        c.arg("--process").arg(process);
        if let Some(socket) = console_socket {
            c.arg("--console-socket").arg(socket);
        }
        c.arg("--detach").arg("--pid-file").arg(pid_file).arg(id);
        self.hand_over(c, stdio, None).await
    }

    /// `runc kill`; `all` reaches every process of the container.
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let mut c = self.command("kill");
        flag(&mut c, all, "--all");
        c.arg(id).arg(signal.to_string());
        self.run(c, None).await.map(drop)
    }

    /// `runc delete`.
    pub async fn delete(&self, id: &str, force: bool) -> Result<()> {
        let mut c = self.command("delete");
        flag(&mut c, force, "--force");
        c.arg(id);
        self.run(c, None).await.map(drop)
    }

    /// `runc pause`.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let mut c = self.command("pause");
        c.arg(id);
        self.run(c, None).await.map(drop)
    }

    /// `runc resume`.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let mut c = self.command("resume");
        c.arg(id);
        self.run(c, None).await.map(drop)
    }

    /// `runc update` with the OCI resources in the JSON `resources`.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let mut c = self.command("update");
        c.arg("--resources=-").arg(id);
        let mut file = tempfile::tempfile_in(&self.bundle).context("make a file for the resources")?;
        file.write_all(resources).context("write the resources")?;
        file.seek(SeekFrom::Start(0)).context("rewind the resources")?;
        self.run(c, Some(file.into())).await.map(drop)
    }

    /// `runc ps`: the pids in the container's cgroup.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let mut c = self.command("ps");
        c.arg("--format").arg("json").arg(id);
        let done = self.run(c, None).await?;
        // runc prints `null` for an empty cgroup.
        let pids: Option<Vec<u32>> = serde_json::from_slice(&done.stdout).context("read runc ps")?;
        Ok(pids.unwrap_or_default())
    }

    /// `runc checkpoint`.
    pub async fn checkpoint(&self, id: &str, args: &CheckpointArgs) -> Result<()> {
        let crun = self.criu_runtime().await?.is_crun();
        let mut c = self.command("checkpoint");
        c.arg("--image-path").arg(&args.image_path).arg("--work-path").arg(&args.work_dir);
        if let Some(parent) = args.parent_path.as_ref().filter(|p| !p.is_empty()) {
            c.arg("--parent-path").arg(parent);
        }
        flag(&mut c, args.open_tcp, "--tcp-established");
        flag(&mut c, args.external_unix_sockets, "--ext-unix-sk");
        flag(&mut c, args.terminal, "--shell-job");
        flag(&mut c, args.file_locks, "--file-locks");
        criu_common(&mut c, &args.cgroups_mode, &args.empty_namespaces, crun)?;
        flag(&mut c, args.leave_running, "--leave-running");
        c.arg(id);
        private::under_private_umask(&mut c);
        self.run(c, None).await.map(drop)
    }

    /// `runc restore --detach`; `stdio` becomes the container's. The init's pid is then in [`Runc::pid_file`]. Fails when runc still
    /// knows a container of this id.
    pub async fn restore(&self, id: &str, args: &RestoreArgs, stdio: ChildStdio) -> Result<()> {
        let crun = self.criu_runtime().await?.is_crun();
        let c = self.restore_command(id, args, crun)?;
        self.hand_over(c, stdio, args.deadline).await
    }

    fn restore_command(&self, id: &str, args: &RestoreArgs, crun: bool) -> Result<Command> {
        let mut c = self.command("restore");
        c.arg("--bundle").arg(&self.bundle).arg("--pid-file").arg(self.pid_file());
        c.arg("--image-path").arg(&args.image_path).arg("--work-path").arg(&args.work_dir);
        if let Some(socket) = &args.console_socket {
            c.arg("--console-socket").arg(socket);
        }
        flag(&mut c, args.open_tcp, "--tcp-established");
        flag(&mut c, args.external_unix_sockets, "--ext-unix-sk");
        flag(&mut c, args.terminal, "--shell-job");
        flag(&mut c, args.file_locks, "--file-locks");
        criu_common(&mut c, &args.cgroups_mode, &args.empty_namespaces, crun)?;
        if let Some(profile) = &args.lsm_profile {
            c.arg("--lsm-profile").arg(profile);
        }
        c.args(&args.extra_flags).arg("--detach");
        if crun {
            if args.lazy_pages {
                bail!("crun cannot restore lazily (no --lazy-pages)");
            }
            // The images name their parent themselves; pivot_root and subreapers do not concern crun's restore.
        } else {
            if let Some(parent) = args.parent_path.as_ref().filter(|p| !p.is_empty()) {
                c.arg("--parent-path").arg(parent);
            }
            flag(&mut c, args.no_pivot, "--no-pivot");
            flag(&mut c, args.lazy_pages, "--lazy-pages");
            c.arg("--no-subreaper");
        }
        c.arg(id);
        c.envs(args.env.iter().map(|(k, v)| (k, v)));
        // A group of its own, so that the deadline can end runc together with its criu.
        c.process_group(0);
        Ok(c)
    }

    fn command(&self, verb: &str) -> Command {
        let mut c = Command::new(&self.binary);
        c.arg("--root").arg(&self.root).arg("--log").arg(self.log()).arg("--log-format").arg("json");
        flag(&mut c, self.systemd_cgroup, "--systemd-cgroup");
        c.arg(verb);
        c
    }

    fn log(&self) -> PathBuf {
        log(&self.bundle)
    }

    async fn run(&self, command: Command, stdin: Option<OwnedFd>) -> Result<Finished> {
        let log_start = runc_error::log_size(&self.log());
        let done = command::capture(&self.reaper, command, stdin, None).await?;
        if done.status == 0 {
            return Ok(done);
        }
        // as it is, its last line's end included: the Go shim's errors have it too
        let mut output = String::from_utf8_lossy(&done.stderr).into_owned();
        if output.trim().is_empty() {
            output = String::from_utf8_lossy(&done.stdout).into_owned();
        }
        Err(self.error(done.status, output, log_start))
    }

    async fn hand_over(&self, command: Command, stdio: ChildStdio, deadline: Option<Duration>) -> Result<()> {
        let log_start = runc_error::log_size(&self.log());
        match command::hand_over(&self.reaper, command, stdio, deadline).await? {
            0 => Ok(()),
            status => Err(self.error(status, String::new(), log_start)),
        }
    }

    fn error(&self, status: u32, output: String, log_start: u64) -> anyhow::Error {
        anyhow!(RuncError::new(&self.binary, status, output, &self.log(), log_start))
    }
}

/// The runtime's program that `options` name; runc by default.
pub fn binary(options: &RuncOptions) -> &str {
    if options.binary_name.is_empty() { "runc" } else { &options.binary_name }
}

/// Where runc writes its errors, in a bundle.
pub fn log(bundle: &Path) -> PathBuf {
    bundle.join("log.json")
}

/// runc's `--root` for `namespace`.
pub fn root(options: &RuncOptions, namespace: &str) -> PathBuf {
    let root = if options.root.is_empty() { DEFAULT_ROOT } else { &options.root };
    Path::new(root).join(namespace)
}

/// Reads a pid that runc has left in `path`.
pub fn read_pid(path: &Path) -> Result<u32> {
    let text = fs::read_to_string(path).with_context(|| format!("read the pid file {}", path.display()))?;
    text.trim().parse().with_context(|| format!("read the pid in {}", path.display()))
}

fn flag(c: &mut Command, on: bool, name: &str) {
    if on {
        c.arg(name);
    }
}

fn criu_common(c: &mut Command, cgroups_mode: &str, empty_namespaces: &[String], crun: bool) -> Result<()> {
    if !cgroups_mode.is_empty() {
        c.arg("--manage-cgroups-mode").arg(cgroups_mode);
    }
    if crun && !empty_namespaces.is_empty() {
        bail!("crun cannot leave namespaces empty (no --empty-ns)");
    }
    for ns in empty_namespaces {
        c.arg("--empty-ns").arg(ns);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_has_the_flags_that_the_runtime_knows() {
        let runc = Runc::new(&RuncOptions::default(), Path::new("/b"), "ns", Reaper::default());
        let args = RestoreArgs {
            no_pivot: true,
            parent_path: Some("../p".into()),
            open_tcp: true,
            cgroups_mode: "ignore".into(),
            ..Default::default()
        };
        let line = |args: &RestoreArgs, crun| {
            let c = runc.restore_command("c1", args, crun)?;
            let words: Vec<_> = c.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
            anyhow::Ok(words.join(" "))
        };
        let (of_runc, of_crun) = (line(&args, false).unwrap(), line(&args, true).unwrap());
        assert!(
            of_runc.ends_with("--tcp-established --manage-cgroups-mode ignore --detach --parent-path ../p --no-pivot --no-subreaper c1"),
            "{of_runc}"
        );
        assert!(of_crun.ends_with("--tcp-established --manage-cgroups-mode ignore --detach c1"), "{of_crun}");
        for wrong in [
            RestoreArgs { lazy_pages: true, ..Default::default() },
            RestoreArgs { empty_namespaces: vec!["network".into()], ..Default::default() },
        ] {
            assert!(line(&wrong, true).is_err() && line(&wrong, false).is_ok());
        }
    }

    #[test]
    fn options_choose_program_and_root() {
        let mut options = RuncOptions::default();
        assert_eq!(
            (binary(&options), root(&options, "k8s.io")),
            ("runc", PathBuf::from("/run/containerd/runc/k8s.io"))
        );
        options.binary_name = "/usr/bin/crun".into();
        options.root = "/run/x".into();
        assert_eq!((binary(&options), root(&options, "a")), ("/usr/bin/crun", PathBuf::from("/run/x/a")));
    }
}
