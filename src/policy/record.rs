//! containerd's record: the runtime and what it is told, labels, names.

use prost::Message;

use super::{Found, Policy, listed};
use crate::containerd::record::{Opaque, Record};

/// The type of a spec, as containerd writes it.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Labels by such names are acted on by programs of a node: containerd itself, its restart monitor, CRI, nerdctl, Docker.
const ACTIVE: [&str; 7] = [
    "containerd.io/*",
    "io.containerd.*",
    "io.cri-containerd*",
    "io.kubernetes.*",
    "nerdctl/*",
    "com.docker.*",
    "moby/*",
];

/// What of them is no more than the container may do by itself: to be started again as it is.
const HARMLESS: [&str; 5] = [
    "containerd.io/restart.status",
    "containerd.io/restart.policy",
    "containerd.io/restart.count",
    "containerd.io/restart.explicitly-stopped",
    "io.containerd.image.config.*",
];

/// `containerd.runc.v1.Options`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuncOptions {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "2")]
    no_new_keyring: bool,
    #[prost(string, tag = "3")]
    shim_cgroup: String,
    #[prost(uint32, tag = "4")]
    io_uid: u32,
    #[prost(uint32, tag = "5")]
    io_gid: u32,
    /// The OCI runtime.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    #[prost(string, tag = "7")]
    root: String,
    #[prost(bool, tag = "9")]
    systemd_cgroup: bool,
    #[prost(string, tag = "10")]
    criu_image_path: String,
    #[prost(string, tag = "11")]
    criu_work_path: String,
    #[prost(string, tag = "12")]
    task_api_address: String,
    #[prost(uint32, tag = "13")]
    task_api_version: u32,
    #[prost(string, tag = "8")]
    criu_path: String,
}

/// `runtimeoptions.v1.Options`.
#[derive(Clone, PartialEq, prost::Message)]
struct GenericOptions {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

pub(super) fn check(policy: &Policy, record: &Record, found: &mut Found) {
    if !policy.runtimes.contains(&record.runtime) {
        found.unless("runtimes", format!("has the runtime {:?}", record.runtime));
    }
    if let Some(given) = &record.runtime_options {
        options(policy, given, found);
    }
    for name in record.labels.keys() {
        if listed(&ACTIVE, name) && !listed(&HARMLESS, name) && !listed(&policy.labels, name) {
            found.unless("labels", format!("has the label {name}"));
        }
    }
    for name in record.extensions.keys().filter(|n| !listed(&policy.extensions, n)) {
        found.unless("extensions", format!("has the extension {name}"));
    }
    if !record.sandbox.is_empty() {
        found.never(format!("belongs to the sandbox {:?}", record.sandbox));
    }
    if !matches!(record.spec_type.as_str(), "" | SPEC) {
        found.never(format!("has a spec of the type {:?}", record.spec_type));
    }
    let plain = crate::agent::placement::plain;
    for (what, name) in [("snapshotter", &record.snapshotter), ("snapshot", &record.snapshot_key)] {
        if !plain(name) {
            found.never(format!("has the {what} {name:?}, which is no plain name"));
        }
    }
    if !is_image_name(&record.image) {
        found.never(format!("has the image {:?}, which is no name of an image", record.image));
    }
}

fn options(policy: &Policy, given: &Opaque, found: &mut Found) {
    let kind = given.type_url.rsplit('/').next().unwrap_or_default();
    match kind {
        "" if given.value.is_empty() => {}
        "containerd.runc.v1.Options" => match RuncOptions::decode(given.value.as_slice()) {
            Ok(options) => runc(policy, &options, found),
            Err(e) => found.never(format!("has options of its runtime that cannot be read ({e})")),
        },
        "runtimeoptions.v1.Options" => match GenericOptions::decode(given.value.as_slice()) {
            Ok(options) => generic(policy, &options, found),
            Err(e) => found.never(format!("has options of its runtime that cannot be read ({e})")),
        },
        kind => found.never(format!("has options of its runtime of the type {kind:?}")),
    }
}

fn runc(policy: &Policy, options: &RuncOptions, found: &mut Found) {
    let program = options.binary_name.as_str();
    if !program.is_empty() && !policy.oci_runtimes.iter().any(|r| r == program) {
        found.unless("oci_runtimes", format!("has the OCI runtime {program:?}"));
    }
    for (given, name) in [
        (!options.root.is_empty(), "Root"),
        (!options.criu_path.is_empty(), "CriuPath"),
        (!options.criu_image_path.is_empty(), "CriuImagePath"),
        (!options.criu_work_path.is_empty(), "CriuWorkPath"),
        (!options.shim_cgroup.is_empty(), "ShimCgroup"),
        (!options.task_api_address.is_empty(), "TaskApiAddress"),
        (options.io_uid != 0 || options.io_gid != 0, "IoUid"),
        (options.no_pivot_root, "NoPivotRoot"),
    ] {
        if given {
            found.never(format!("sets its runtime's option {name}"));
        }
    }
}

fn generic(policy: &Policy, options: &GenericOptions, found: &mut Found) {
    if !options.config_path.is_empty() {
        let path = std::path::Path::new(&options.config_path);
        if !policy.runtime_configs.iter().any(|c| c == path) {
            found.unless(
                "runtime_configs",
                format!("has its runtime's options in this node's file {}", path.display()),
            );
        }
        return; // the file's content counts, not the body
    }
    let parsed = std::str::from_utf8(&options.config_body).ok().and_then(|t| t.parse::<toml::Table>().ok());
    let Some(table) = parsed else {
        return found.never("has options of its runtime that cannot be read");
    };
    for (name, value) in &table {
        match (name.as_str(), value) {
            ("BinaryName" | "binary_name", toml::Value::String(program)) => {
                if !program.is_empty() && !policy.oci_runtimes.contains(program) {
                    found.unless("oci_runtimes", format!("has the OCI runtime {program:?}"));
                }
            }
            (
                "SystemdCgroup" | "systemd_cgroup" | "NoNewKeyring" | "no_new_keyring",
                toml::Value::Boolean(_),
            ) => {}
            // Go's zero values
            (_, toml::Value::Boolean(false) | toml::Value::Integer(0)) => {}
            (_, toml::Value::String(text)) if text.is_empty() => {}
            _ => found.never(format!("sets its runtime's option {name}")),
        }
    }
}

/// What may become an image's name: it is shown, and stands in containerd's database.
fn is_image_name(name: &str) -> bool {
    (1..=512).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

/// A name without the digest that [`image_name`] has put behind it.
fn without_digest<'a>(name: &'a str, digest: &str) -> &'a str {
    name.strip_suffix(digest).and_then(|n| n.strip_suffix('@')).unwrap_or(name)
}

/// Under which name an image that came with a container is kept here. `here` tells the digest that a name means on this node.
///
/// A name that means this very image here already stays; else it has the digest behind it, so that nobody gets the source's image who asks for
/// another. The policy may allow the bare name, as long as it is free.
pub fn image_name(policy: &Policy, name: &str, digest: &str, here: Option<&str>) -> String {
    let bare = without_digest(name, digest);
    match here {
        Some(there) if there == digest => bare.into(),
        None if listed(&policy.image_names, bare) => bare.into(),
        _ => format!("{bare}@{digest}"),
    }
}

/// The name to look up for [`image_name`].
pub fn bare_image_name<'a>(name: &'a str, digest: &str) -> &'a str {
    without_digest(name, digest)
}
