//! The OCI specifications of the scenarios' containers and processes, and the names of message types.

use prost_types::Any;
use serde_json::{Value, json};

/// An OCI process.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// An OCI specification.
pub const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// OCI's LinuxResources.
pub const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// runc's options of a checkpoint.
pub const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
/// runc's options of a task.
pub const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// CRI's options for runtimes that it does not know.
pub const GENERIC_OPTIONS: &str = "runtimeoptions.v1.Options";

/// A container's specification, to be changed before it is used.
#[derive(Clone, Debug)]
pub struct Spec(Value);

/// A process in a container of busybox.
pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "user": { "uid": 0, "gid": 0 },
        "noNewPrivileges": true,
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"],
            "effective": ["CAP_KILL", "CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"],
            "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"],
        },
    })
}

/// A shell script as a process, as JSON.
pub fn script(text: &str) -> String {
    process(&["sh", "-c", text]).to_string()
}

fn mount(destination: &str, kind: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": kind, "options": options })
}

impl Spec {
    /// A container that runs a program of busybox, much as ctr describes it.
    pub fn run(args: &[&str]) -> Spec {
        let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
        Spec(json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": { "path": "rootfs" },
            "hostname": "compare",
            "mounts": [
                mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
                mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            "linux": {
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "namespaces": namespaces,
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        }))
    }

    /// A shell script.
    pub fn sh(script: &str) -> Spec {
        Self::run(&["sh", "-c", script])
    }

    /// One that does nothing, for long.
    pub fn idle() -> Spec {
        Self::run(&["sleep", "1000"])
    }

    /// Sets what is at a place (a JSON pointer), and the objects on the way to it.
    pub fn with(mut self, pointer: &str, value: Value) -> Spec {
        let mut place = &mut self.0;
        for name in pointer.trim_start_matches('/').split('/') {
            place = &mut place[name.replace("~1", "/").as_str()];
        }
        *place = value;
        self
    }

    /// On a terminal.
    pub fn terminal(self) -> Spec {
        self.with("/process/terminal", true.into())
    }

    /// Without a pid namespace of its own.
    pub fn no_pid_namespace(mut self) -> Spec {
        self.namespaces().retain(|n| n["type"] != "pid");
        self
    }

    /// In a user namespace, in which root is `id` outside.
    pub fn user_namespace(mut self, id: u32) -> Spec {
        self.namespaces().push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": id, "size": 65536 }]);
        self.with("/linux/uidMappings", map.clone()).with("/linux/gidMappings", map)
    }

    fn namespaces(&mut self) -> &mut Vec<Value> {
        self.0["linux"]["namespaces"].as_array_mut().expect("a list")
    }

    /// The text, with the place of its cgroup.
    pub fn json(&self, namespace: &str, id: &str) -> String {
        self.clone().with("/linux/cgroupsPath", format!("/{namespace}/{id}").into()).0.to_string()
    }
}

/// A message of a named type.
pub fn any(kind: &str, value: Vec<u8>) -> Any {
    Any { type_url: kind.to_owned(), value }
}

/// The exec id in what a shim tells of a process (`containerd.runc.v1.ProcessDetails`: a string in field 1).
pub fn exec_of(kind: &str, details: &[u8]) -> String {
    if kind.is_empty() {
        return String::new();
    }
    match details {
        [10, len, text @ ..] if text.len() == usize::from(*len) => String::from_utf8_lossy(text).into_owned(),
        other => format!("{kind}: {other:?}"),
    }
}
