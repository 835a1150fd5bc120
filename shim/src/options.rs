//! The options that come with Create and Checkpoint: runc's own (`containerd.runc.v1.Options`), or those that CRI passes to runtime
//! types it does not know (`runtimeoptions.v1.Options`, TOML inside). And `options.json`/`runtime`, which the bundle keeps for
//! the `delete` action of a later process.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::{Context, Result};
use containerd_shim::util::{JsonOptions, OPTIONS_FILE_NAME, RUNTIME_FILE_NAME};
pub use containerd_shim_protos::shim::oci::Options as RuncOptions;
use containerd_shim_protos::{
    protobuf::{CodedInputStream, Message, UnknownValueRef, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use serde::Deserialize;

use crate::{
    errors::{TaskError, TaskResult},
    runc::CheckpointArgs,
};

/// Largest TOML file that is read as options, in bytes.
const CONFIG_LIMIT: u64 = 1 << 20;

/// Reads the runtime options of either kind; the defaults when there are none.
pub fn runtime_options(any: Option<&Any>) -> TaskResult<RuncOptions> {
    let Some(any) = any.filter(|a| !a.type_url.is_empty() || !a.value.is_empty()) else {
        return Ok(RuncOptions::default());
    };
    match type_name(any) {
        "containerd.runc.v1.Options" => {
            RuncOptions::parse_from_bytes(&any.value).map_err(|e| bad("runc options", e))
        }
        "runtimeoptions.v1.Options" => generic_options(&any.value),
        other => Err(TaskError::invalid_argument(format!("runtime options of unknown type {other:?}"))),
    }
}

/// Reads the options of a Checkpoint call into `runc checkpoint`'s arguments; `path` and `work_dir` are the call's defaults.
/// Without options the container is left running.
pub fn checkpoint_args(any: Option<&Any>, path: &Path, work_dir: &Path) -> TaskResult<CheckpointArgs> {
    let options = match any.filter(|a| !a.type_url.is_empty() || !a.value.is_empty()) {
        None => CheckpointOptions::default(),
        Some(any) if type_name(any) == "containerd.runc.v1.CheckpointOptions" => {
            CheckpointOptions::parse_from_bytes(&any.value).map_err(|e| bad("checkpoint options", e))?
        }
        Some(any) => {
            let kind = type_name(any);
            return Err(TaskError::invalid_argument(format!("checkpoint options of unknown type {kind:?}")));
        }
    };
    // parent_path (field 10) is newer than the crate's copy of the message.
    let parent_path = match options.special_fields.unknown_fields().get(10) {
        Some(UnknownValueRef::LengthDelimited(bytes)) => Some(String::from_utf8_lossy(bytes).into_owned()),
        _ => None,
    };
    let image = if path.as_os_str().is_empty() { options.image_path.as_ref() } else { path };
    if image.as_os_str().is_empty() {
        return Err(TaskError::invalid_argument("checkpoint without an image path"));
    }
    let work_dir = if options.work_path.is_empty() { work_dir } else { options.work_path.as_ref() };
    Ok(CheckpointArgs {
        image_path: image.to_path_buf(),
        work_dir: work_dir.to_path_buf(),
        parent_path,
        leave_running: !options.exit,
        open_tcp: options.open_tcp,
        external_unix_sockets: options.external_unix_sockets,
        terminal: options.terminal,
        file_locks: options.file_locks,
        empty_namespaces: options.empty_namespaces,
        cgroups_mode: options.cgroups_mode,
    })
}

/// Leaves the options in the bundle, for the `delete` action.
pub fn save(bundle: &Path, options: &RuncOptions) -> Result<()> {
    let json = serde_json::to_vec(&JsonOptions::from(options.clone())).context("encode the options")?;
    write_private(&bundle.join(OPTIONS_FILE_NAME), &json)?;
    write_private(&bundle.join(RUNTIME_FILE_NAME), options.binary_name.as_bytes())
}

/// Reads back what [`save`] (or the Go shim) has left in the bundle; the defaults when nothing was.
pub fn load(bundle: &Path) -> Result<RuncOptions> {
    // The Go shim leaves empty fields out, so containerd-shim's own reader (which requires most of them) cannot read its files.
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Saved {
        no_pivot_root: bool,
        no_new_keyring: bool,
        binary_name: String,
        root: String,
        systemd_cgroup: bool,
    }
    let saved: Saved = match fs::read(bundle.join(OPTIONS_FILE_NAME)) {
        Ok(json) => serde_json::from_slice(&json).context("read the bundle's options.json")?,
        Err(e) if e.kind() == ErrorKind::NotFound => Saved::default(),
        Err(e) => return Err(e).context("open the bundle's options.json"),
    };
    let mut options = RuncOptions {
        no_pivot_root: saved.no_pivot_root,
        no_new_keyring: saved.no_new_keyring,
        binary_name: saved.binary_name,
        root: saved.root,
        systemd_cgroup: saved.systemd_cgroup,
        ..Default::default()
    };
    // Older shims wrote the program's name only here.
    if let Ok(name) = fs::read_to_string(bundle.join(RUNTIME_FILE_NAME))
        && !name.is_empty()
    {
        options.binary_name = name;
    }
    Ok(options)
}

/// containerd writes bare message names, protobuf's own packing prefixes them with a host.
fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

fn bad(what: &str, e: impl std::fmt::Display) -> TaskError {
    TaskError::invalid_argument(format!("cannot read the {what}: {e}"))
}

/// `runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3. The message is not among the crate's protos.
fn generic_options(bytes: &[u8]) -> TaskResult<RuncOptions> {
    let (mut path, mut body) = (String::new(), Vec::new());
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut read = || -> containerd_shim_protos::protobuf::Result<()> {
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                18 => path = input.read_string()?,
                26 => body = input.read_bytes()?,
                other => {
                    // Wire type in the low three bits; the rest of the message is skipped field by field.
                    match other & 7 {
                        0 => drop(input.read_raw_varint64()?),
                        1 => drop(input.read_fixed64()?),
                        2 => drop(input.read_bytes()?),
                        _ => drop(input.read_fixed32()?),
                    }
                }
            }
        }
        Ok(())
    };
    read().map_err(|e| bad("runtime options", e))?;
    if !path.is_empty() {
        body = config_file(&path)?;
    }
    let text = String::from_utf8(body).map_err(|e| bad("runtime options", e))?;
    from_toml(&text)
}

/// A file of options. Anything but a plain file (a device, a pipe) would never end.
fn config_file(path: &str) -> TaskResult<Vec<u8>> {
    let meta = fs::metadata(path).map_err(|e| bad(path, e))?;
    if !meta.is_file() {
        return Err(TaskError::invalid_argument(format!("{path}: no file")));
    }
    if meta.len() > CONFIG_LIMIT {
        let size = meta.len();
        return Err(TaskError::invalid_argument(format!("{path}: too long for options ({size} bytes)")));
    }
    fs::read(path).map_err(|e| bad(path, e))
}

/// The table that containerd's config has under `runtimes.NAME.options`, keys as in the Go struct (CRI's spelling) or as in the
/// proto. Keys that are not known are ignored, as containerd does.
pub(crate) fn from_toml(text: &str) -> TaskResult<RuncOptions> {
    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "PascalCase")]
    struct Table {
        #[serde(alias = "no_pivot_root")]
        no_pivot_root: bool,
        #[serde(alias = "no_new_keyring")]
        no_new_keyring: bool,
        #[serde(alias = "shim_cgroup")]
        shim_cgroup: String,
        #[serde(alias = "io_uid")]
        io_uid: u32,
        #[serde(alias = "io_gid")]
        io_gid: u32,
        #[serde(alias = "binary_name")]
        binary_name: String,
        #[serde(alias = "root")]
        root: String,
        #[serde(alias = "systemd_cgroup")]
        systemd_cgroup: bool,
        #[serde(alias = "criu_image_path")]
        criu_image_path: String,
        #[serde(alias = "criu_work_path")]
        criu_work_path: String,
        #[serde(alias = "task_api_address")]
        task_api_address: String,
        #[serde(alias = "task_api_version")]
        task_api_version: u32,
    }
    let t: Table = toml::from_str(text).map_err(|e| bad("runtime options' TOML", e))?;
    Ok(RuncOptions {
        no_pivot_root: t.no_pivot_root,
        no_new_keyring: t.no_new_keyring,
        shim_cgroup: t.shim_cgroup,
        io_uid: t.io_uid,
        io_gid: t.io_gid,
        binary_name: t.binary_name,
        root: t.root,
        systemd_cgroup: t.systemd_cgroup,
        criu_image_path: t.criu_image_path,
        criu_work_path: t.criu_work_path,
        task_api_address: t.task_api_address,
        task_api_version: t.task_api_version,
        ..Default::default()
    })
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut f| f.write_all(bytes))
        .with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    fn any(kind: &str, value: Vec<u8>) -> Any {
        Any { type_url: kind.into(), value, ..Default::default() }
    }

    /// A length-delimited protobuf field (lengths below 128).
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(runtime_options(None).unwrap(), RuncOptions::default());
        assert_eq!(runtime_options(Some(&Any::new())).unwrap(), RuncOptions::default());
    }

    #[test]
    fn runc_options_with_and_without_a_host() {
        let o = RuncOptions { binary_name: "crun".into(), systemd_cgroup: true, ..Default::default() };
        for url in ["containerd.runc.v1.Options", "type.googleapis.com/containerd.runc.v1.Options"] {
            assert_eq!(runtime_options(Some(&any(url, o.write_to_bytes().unwrap()))).unwrap(), o);
        }
    }

    #[test]
    fn generic_options_from_body_and_file() {
        let toml = "BinaryName = \"crun\"\nSystemdCgroup = true\nUnheardOf = 3\n";
        let body = [field(1, b"x"), field(3, toml.as_bytes())].concat();
        let o = runtime_options(Some(&any("runtimeoptions.v1.Options", body))).unwrap();
        assert_eq!((o.binary_name.as_str(), o.systemd_cgroup), ("crun", true));

        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "root = \"/run/r\"\n").unwrap();
        let path = field(2, file.path().as_os_str().as_encoded_bytes());
        assert_eq!(runtime_options(Some(&any("runtimeoptions.v1.Options", path))).unwrap().root, "/run/r");
    }

    #[test]
    fn bad_options_are_invalid_arguments() {
        let garbage = field(3, b"= nonsense");
        for a in [
            any("runtimeoptions.v1.Options", garbage),
            any("some.Thing", vec![]),
            any("containerd.runc.v1.Options", vec![0xff]),
        ] {
            assert_eq!(runtime_options(Some(&a)).unwrap_err().code(), Code::INVALID_ARGUMENT);
        }
    }

    #[test]
    fn checkpoint_options_and_their_defaults() {
        let args = checkpoint_args(None, Path::new("/img"), Path::new("/work")).unwrap();
        assert!(args.leave_running && args.work_dir == Path::new("/work") && args.parent_path.is_none());
        let o = CheckpointOptions { exit: true, work_path: "/w".into(), ..Default::default() };
        let bytes = [o.write_to_bytes().unwrap(), field(10, b"../p")].concat();
        let a = any("containerd.runc.v1.CheckpointOptions", bytes);
        let args = checkpoint_args(Some(&a), Path::new("/img"), Path::new("/work")).unwrap();
        assert!(!args.leave_running);
        assert_eq!((args.work_dir.as_path(), args.parent_path.as_deref()), (Path::new("/w"), Some("../p")));
    }

    #[test]
    fn what_would_never_end_is_not_read() {
        let e = runtime_options(Some(&any("runtimeoptions.v1.Options", field(2, b"/dev/zero")))).unwrap_err();
        assert!(e.to_string().contains("no file"), "{e}");
    }

    #[test]
    fn saved_options_are_read_back_also_the_go_shims() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()).unwrap(), RuncOptions::default());
        let o = RuncOptions { binary_name: "crun".into(), root: "/r".into(), ..Default::default() };
        save(dir.path(), &o).unwrap();
        assert_eq!(load(dir.path()).unwrap(), o);
        fs::write(dir.path().join(OPTIONS_FILE_NAME), "{\"systemd_cgroup\":true}").unwrap();
        fs::write(dir.path().join(RUNTIME_FILE_NAME), "").unwrap();
        assert!(load(dir.path()).unwrap().systemd_cgroup);
    }
}
