//! The actions of the short-lived shim process: `start` (hands containerd the address of the long-lived one, which it starts when
//! the group has none yet) and `delete` (cleans up after a shim that is gone). No runtime, no threads here.
//!
//! containerd-shim's own bootstrap is not used: it starts a server on which only Task v3 can be registered, and lets that server
//! bind the socket itself. Here the socket is bound and listening *before* the server is started and is inherited by it, so that
//! containerd's connection is accepted by the kernel at once. Its message types and address rules are used.

use std::{
    env, fs,
    io::{self, ErrorKind, IsTerminal, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context, Result, bail};
use containerd_shim::{
    Flags, StartOpts,
    bootstrap::{BootstrapParams, BootstrapResult, Extension},
    cgroup,
    protos::{
        protobuf::{Message, MessageField, well_known_types::any::Any},
        shim::shim::DeleteResponse,
    },
};

use crate::{
    detect::{self, TaskApi},
    group, mounts, options, process, remains, runc,
};

/// The runtime's name as containerd's configuration has it.
pub const RUNTIME_NAME: &str = "io.containerd.transship.v2";

/// Descriptor on which the server inherits its listening socket.
pub const LISTEN_FD: i32 = 3;

/// Largest message read from stdin, in bytes (containerd's own limit).
const INPUT_LIMIT: u64 = 10 << 20;

/// How `start` was called, which decides the form of the answer.
#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    /// containerd 2.3 and later: protobuf both ways.
    Bootstrap,
    /// Before: flags and environment; the answer by the caller's version.
    Legacy(TaskApi),
}

/// `start`: prints the address of the group's server.
pub fn start(flags: &Flags) -> Result<()> {
    let input = read_stdin()?;
    let (opts, protocol) = start_options(&input, flags)?;
    let bundle = env::current_dir().context("find the bundle")?;
    let group = group::of_bundle(&bundle, &opts.id)?;
    let address = opts.socket_address(&group);
    if let Some(listener) = bind(&address)? {
        let spawned = spawn_server(&opts, &listener);
        if spawned.is_err() {
            let _ = fs::remove_file(socket_path(&address));
        }
        spawned?;
    }
    // containerd 1.x finds the shim again by this file after a restart; later ones keep a bootstrap.json of their own
    if protocol == Protocol::Legacy(TaskApi::V2) {
        fs::write(bundle.join("address"), &address).context("write the address file")?;
    }
    let answer = answer(&protocol, &address)?;
    io::stdout().write_all(&answer).and_then(|()| io::stdout().flush()).context("answer containerd")
}

/// The answer to `start`, in the form that the caller understands.
fn answer(protocol: &Protocol, address: &str) -> Result<Vec<u8>> {
    match protocol {
        Protocol::Bootstrap => {
            let (address, protocol) = (address.to_string(), "ttrpc".to_string());
            let answer = BootstrapResult { version: 3, address, protocol, ..Default::default() };
            answer.write_to_bytes().context("encode the answer")
        }
        Protocol::Legacy(api) => Ok(legacy_answer(*api, address)),
    }
}

/// containerd 1.x takes a bare address for a v2 shim (all of them do); 2.x takes JSON for any.
fn legacy_answer(api: TaskApi, address: &str) -> Vec<u8> {
    match api {
        TaskApi::V2 => address.as_bytes().to_vec(),
        TaskApi::V3 => serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"})
            .to_string()
            .into_bytes(),
    }
}

/// Reads what containerd has passed, by either protocol.
fn start_options(input: &[u8], flags: &Flags) -> Result<(StartOpts, Protocol)> {
    if let Some(params) = bootstrap_message(input, &flags.id, &flags.namespace)? {
        let mut opts = StartOpts::from(params);
        opts.debug |= flags.debug;
        return Ok((opts, Protocol::Bootstrap));
    }
    let mut params = BootstrapParams {
        instance_id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        containerd_ttrpc_address: env::var("TTRPC_ADDRESS").unwrap_or_default(),
        containerd_grpc_address: flags.address.clone(),
        containerd_binary: flags.publish_binary.clone(),
        ..Default::default()
    };
    if let Ok(any) = Any::parse_from_bytes(input)
        && !any.type_url.is_empty()
    {
        params.extensions.push(Extension { value: MessageField::some(any), ..Default::default() });
    }
    let mut opts = StartOpts::from(params);
    opts.debug = flags.debug;
    if opts.ttrpc_address.is_empty() {
        bail!("TTRPC_ADDRESS is not set: started by hand? containerd runs this program");
    }
    Ok((opts, Protocol::Legacy(detect::task_api(&flags.publish_binary))))
}

/// The bootstrap message of containerd 2.3 and later. Options of the older protocol decode as one, too, so it has to name the same
/// container as the flags.
pub(crate) fn bootstrap_message(input: &[u8], id: &str, namespace: &str) -> Result<Option<BootstrapParams>> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.instance_id == id && params.namespace == namespace && !input.is_empty() {
        return Ok(Some(params));
    }
    if !params.containerd_grpc_address.is_empty() || !params.containerd_ttrpc_address.is_empty() {
        bail!(
            "the bootstrap message is for {}/{}, the flags for {namespace}/{id}",
            params.namespace,
            params.instance_id
        );
    }
    Ok(None)
}

/// Removes the socket of a shim that was killed; one that answers (of a group that others are in) stays.
fn remove_dead_socket(bundle: &Path) {
    let Some(address) = known_address(bundle) else { return };
    let path = socket_path(&address);
    if UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        let _ = fs::remove_file(path);
    }
}

/// The address in a bundle: in our own file, or in the one that containerd 2.x keeps.
fn known_address(bundle: &Path) -> Option<String> {
    let read = |name: &str| fs::read_to_string(bundle.join(name)).ok();
    if let Some(address) = read("address") {
        return Some(address.trim().to_string());
    }
    let json: serde_json::Value = serde_json::from_str(&read("bootstrap.json")?).ok()?;
    json["address"].as_str().map(str::to_string)
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Listens at `address`; None when a server of the group answers there already.
fn bind(address: &str) -> Result<Option<UnixListener>> {
    let path = socket_path(address);
    if let Some(dir) = path.parent() {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("make {}", dir.display()))?;
    }
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Left behind by a server that was killed.
            fs::remove_file(path).with_context(|| format!("remove the dead socket {}", path.display()))?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("chmod {}", path.display()))?;
    Ok(Some(listener))
}

fn spawn_server(opts: &StartOpts, listener: &UnixListener) -> Result<()> {
    let mut command = Command::new(transship::program::own()?);
    command.args(["-namespace", &opts.namespace, "-id", &opts.id, "-address", &opts.address]);
    if opts.debug {
        command.arg("-debug");
    }
    command.env("TTRPC_ADDRESS", &opts.ttrpc_address);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let fd = listener.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe; `listener` outlives the spawn. The number 3 is the listener's, or was taken when it was
    // opened: it is none of the standard library's own pipes for this spawn.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would leave the close-on-exec flag as it is.
            let done =
                if fd == LISTEN_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, LISTEN_FD) };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    share_core_scheduling()?;
    let mut child = command.spawn().context("start the shim's server")?;
    let confined = confine(opts, child.id());
    if confined.is_err() {
        let _ = child.kill();
    }
    confined
}

/// Core scheduling, when the administrator wants it: the server inherits the cookie that this process group gets.
fn share_core_scheduling() -> Result<()> {
    if env::var_os("SCHED_CORE").is_none_or(|v| v.is_empty()) {
        return Ok(());
    }
    const PR_SCHED_CORE: i32 = 62;
    const CREATE: libc::c_ulong = 1;
    const PROCESS_GROUP: libc::c_ulong = 2;
    // SAFETY: plain call.
    let done =
        unsafe { libc::prctl(PR_SCHED_CORE, CREATE, 0 as libc::c_ulong, PROCESS_GROUP, 0 as libc::c_ulong) };
    if done < 0 {
        return Err(io::Error::last_os_error()).context("enable sched core support");
    }
    Ok(())
}

/// Puts the server where the options want it, and makes it a likelier victim of the OOM killer than containerd.
fn confine(opts: &StartOpts, pid: u32) -> Result<()> {
    // either kind of options; what cannot be read is for Create to refuse
    let options = opts.extensions.iter().find_map(|any| options::runtime_options(Some(any)).ok());
    let cgroup = options.unwrap_or_default().shim_cgroup;
    if !cgroup.is_empty() {
        cgroup::add_task_to_cgroup(&cgroup, pid).with_context(|| format!("join cgroup {cgroup}"))?;
    }
    // Not fatal, unlike in the Go shim: without CAP_SYS_RESOURCE (a containerd inside a container) it may be impossible, and nothing
    // else depends on it. Not told either: containerd reads stdout and stderr of `start` as one answer.
    let _ = cgroup::adjust_oom_score(pid);
    Ok(())
}

/// `delete`: ends and cleans what a shim that is gone has left of a container, and prints what became of its task.
pub fn delete(flags: &Flags) -> Result<()> {
    let here = env::current_dir().context("find the bundle")?;
    let bundle: PathBuf = match here.parent() {
        Some(parent) if !flags.id.is_empty() => parent.join(&flags.id),
        _ => here,
    };
    let options = options::load(&bundle)?;
    // Child::wait is right here: this process has no reaper.
    let mut command = Command::new(runc::binary(&options));
    command.arg("--root").arg(runc::root(&options, &flags.namespace));
    // runc does nothing when it cannot write its log
    if bundle.exists() {
        command.arg("--log").arg(runc::log(&bundle)).args(["--log-format", "json"]);
    }
    match command.args(["delete", "--force", &flags.id]).output() {
        Ok(o) if o.status.success() => {}
        Ok(o) => eprintln!("failed to remove runc container: {}", String::from_utf8_lossy(&o.stderr).trim()),
        Err(e) => eprintln!("failed to remove runc container: {e}"),
    }
    remains::clear(&runc::root(&options, &flags.namespace), &flags.id, &bundle);
    remove_dead_socket(&bundle);
    // the agent's way to the shim that died
    let _ = fs::remove_file(transship::control::socket_path(&flags.namespace, &flags.id));
    if let Err(e) = mounts::unmount_now(&bundle.join("rootfs")) {
        eprintln!("failed to cleanup rootfs mount: {e:#}");
    }
    let pid = runc::read_pid(&bundle.join("init.pid")).unwrap_or_else(|e| {
        eprintln!("{e:#}");
        0
    });
    let response = DeleteResponse {
        pid,
        exit_status: 128 + libc::SIGKILL as u32,
        exited_at: MessageField::some(process::timestamp(Some(SystemTime::now()))),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().context("encode the answer")?;
    io::stdout().write_all(&bytes).context("answer containerd")
}

/// What the caller has passed on stdin.
pub fn read_stdin() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    // On a terminal a person is at the other end.
    if !io::stdin().is_terminal() {
        io::stdin().take(INPUT_LIMIT).read_to_end(&mut input).context("read stdin")?;
    }
    Ok(input)
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::shim::oci::Options;

    use super::*;

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            containerd_grpc_address: "/run/c.sock".into(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        }
    }

    #[test]
    fn a_bootstrap_message_for_this_container_is_taken() {
        let flags = Flags { id: "c1".into(), namespace: "ns".into(), ..Default::default() };
        let (opts, protocol) = start_options(&params().write_to_bytes().unwrap(), &flags).unwrap();
        assert_eq!(protocol, Protocol::Bootstrap);
        assert_eq!(opts.ttrpc_address, "/run/c.sock.ttrpc");
        assert!(opts.socket_address("c1").starts_with("unix:///run/s/"));
    }

    /// What containerd 2.3 sends for the container c1 in k8s.io (`pkg/shim/util.go`, `Command`), as protoc encodes it from
    /// containerd's `api/runtime/bootstrap/v1/bootstrap.proto`: log level DEBUG, version v2.3.0, the addresses, runc's options
    /// `{shim_cgroup: "/sh", binary_name: "crun", systemd_cgroup: true}` as an extension, socket_dir `/run/s`.
    const RECORDED: &[u8] = b"\n\x02c1\x12\x06k8s.io\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\"\x06v2.3.0\
        *%/run/containerd/containerd.sock.ttrpc2\x1f/run/containerd/containerd.sock:\x13/usr/bin/containerd\
        B-\n+\n\x1acontainerd.runc.v1.Options\x12\r\x1a\x03/sh2\x04crunH\x01J\x06/run/s";

    #[test]
    fn a_recorded_bootstrap_message_is_understood() {
        let flags = Flags { id: "c1".into(), namespace: "k8s.io".into(), ..Default::default() };
        let (opts, protocol) = start_options(RECORDED, &flags).unwrap();
        assert_eq!(protocol, Protocol::Bootstrap);
        assert_eq!(opts.address, "/run/containerd/containerd.sock");
        assert_eq!(opts.ttrpc_address, "/run/containerd/containerd.sock.ttrpc");
        assert_eq!((opts.publish_binary.as_str(), opts.debug), ("/usr/bin/containerd", true));
        let options = opts.extension::<Options>().unwrap().unwrap();
        assert_eq!((options.shim_cgroup.as_str(), options.binary_name.as_str()), ("/sh", "crun"));
        assert!(options.systemd_cgroup);
        let address = opts.socket_address("c1");
        assert!(address.starts_with("unix:///run/s/") && address.len() == "unix:///run/s/".len() + 64);
        assert!(bootstrap_message(RECORDED, "c2", "k8s.io").is_err(), "it is for another container");
    }

    #[test]
    fn the_bootstrap_answer_is_protobuf() {
        // as protoc decodes it: version 3, the address, the protocol
        let wanted = b"\x08\x03\x12\x0funix:///run/s/x\x1a\x05ttrpc";
        assert_eq!(answer(&Protocol::Bootstrap, "unix:///run/s/x").unwrap(), wanted);
    }

    #[test]
    fn one_for_another_container_is_an_error() {
        assert!(bootstrap_message(&params().write_to_bytes().unwrap(), "c2", "ns").is_err());
    }

    #[test]
    fn options_of_the_older_protocol_are_not_a_bootstrap_message() {
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: Options { shim_cgroup: "/x".into(), ..Default::default() }.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert!(bootstrap_message(&any.write_to_bytes().unwrap(), "c1", "ns").unwrap().is_none());
        assert!(bootstrap_message(&[], "", "").unwrap().is_none());
    }

    #[test]
    fn the_answer_fits_the_caller() {
        assert_eq!(legacy_answer(TaskApi::V2, "unix:///s"), b"unix:///s");
        let json: serde_json::Value =
            serde_json::from_slice(&legacy_answer(TaskApi::V3, "unix:///s")).unwrap();
        assert_eq!((json["version"].as_i64(), json["address"].as_str()), (Some(3), Some("unix:///s")));
    }

    #[test]
    fn a_living_server_is_found_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/s/x", dir.path().display());
        let first = bind(&address).unwrap().unwrap();
        assert!(bind(&address).unwrap().is_none());
        fs::write(dir.path().join("address"), &address).unwrap();
        remove_dead_socket(dir.path());
        assert!(socket_path(&address).exists(), "it answers");
        drop(first);
        assert!(bind(&address).unwrap().is_some());
        remove_dead_socket(dir.path());
        assert!(!socket_path(&address).exists());
        // with containerd 2.x
        drop(bind(&address).unwrap().unwrap());
        fs::remove_file(dir.path().join("address")).unwrap();
        let json = serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"});
        fs::write(dir.path().join("bootstrap.json"), json.to_string()).unwrap();
        remove_dead_socket(dir.path());
        assert!(!socket_path(&address).exists());
    }
}
