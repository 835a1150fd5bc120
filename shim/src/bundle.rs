//! What the shim reads and writes in a container's bundle, beside the options: config.json and CRIU's config file.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use transship::{
    criu::gate_server::{CRIU_CONF, CRIU_CONF_ANNOTATION},
    private,
};

use crate::runtime;

/// runc's own default for that file; the annotation would hide what an administrator has put there.
const SYSTEM_CRIU_CONFIG: &str = "/etc/criu/runc.conf";
/// Where crun looks first.
const CRUN_CRIU_CONFIG: &str = "/etc/criu/crun.conf";

/// Makes config.json name `<bundle>/criu.conf` as CRIU's config file, unless it names one already, and makes that file exist (a copy
/// of the machine's, if there is one, and what `binary` with its `--root` needs). It has to happen before `runc create`: a checkpoint
/// reads the annotation from runc's state, and the file's content is what lets a migration pass options that runc has no flag
/// for. Returns the config file's path.
pub fn prepare_criu_config(bundle: &Path, binary: &str, root_dir: &Path) -> Result<PathBuf> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).with_context(|| format!("open {}", path.display()))?;
    let mut spec: Value =
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    let root = spec.as_object_mut().with_context(|| format!("{} is not a JSON object", path.display()))?;
    let annotations = root.entry("annotations").or_insert(Value::Null);
    if annotations.is_null() {
        *annotations = Value::Object(Default::default());
    }
    let annotations = annotations
        .as_object_mut()
        .with_context(|| format!("the annotations in {} are not an object", path.display()))?;
    if let Some(Value::String(there)) = annotations.get(CRIU_CONF_ANNOTATION) {
        return Ok(PathBuf::from(there));
    }
    let config = bundle.join(CRIU_CONF);
    let crun = runtime::named_crun(binary);
    let systems = if crun { &[CRUN_CRIU_CONFIG, SYSTEM_CRIU_CONFIG][..] } else { &[SYSTEM_CRIU_CONFIG] };
    let mut content = first_of(systems)?;
    if crun {
        content += &runtime::empty_directory(root_dir);
    }
    fs::write(&config, content).with_context(|| format!("write {}", config.display()))?;
    let name = config.to_str().with_context(|| format!("{} is not UTF-8", config.display()))?;
    annotations.insert(CRIU_CONF_ANNOTATION.into(), name.into());

    // Renamed into place: containerd and others read config.json at any time.
    let mode = fs::metadata(&path).with_context(|| format!("stat {}", path.display()))?.permissions().mode();
    let new = bundle.join(".config.json.new");
    private::write(&new, &serde_json::to_vec(&spec).context("encode config.json")?)
        .with_context(|| format!("write {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode & 0o7777))
        .with_context(|| format!("chmod {}", new.display()))?;
    fs::rename(&new, &path).with_context(|| format!("replace {}", path.display()))?;
    Ok(config)
}

/// The first of these files that there is; nothing if there is none.
fn first_of(paths: &[&str]) -> Result<String> {
    for path in paths {
        match fs::read_to_string(path) {
            Ok(text) if text.is_empty() || text.ends_with('\n') => return Ok(text),
            Ok(text) => return Ok(text + "\n"),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("read {path}")),
        }
    }
    Ok(String::new())
}

/// Whether the container's other processes must be killed when its first one ends: yes without a private pid namespace, whose
/// end kills them anyway. Also yes when config.json cannot be read, as in the Go shim.
pub fn must_kill_all(bundle: &Path) -> bool {
    #[derive(Deserialize)]
    struct Spec {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    struct Linux {
        #[serde(default)]
        namespaces: Option<Vec<Namespace>>,
    }
    #[derive(Deserialize)]
    struct Namespace {
        #[serde(rename = "type")]
        kind: String,
        #[serde(default)]
        path: String,
    }
    let spec =
        fs::read(bundle.join("config.json")).ok().and_then(|j| serde_json::from_slice::<Spec>(&j).ok());
    let Some(spec) = spec else {
        log::error!(
            "cannot read config.json in {} to see whether the pid namespace is private",
            bundle.display()
        );
        return true;
    };
    let namespaces = spec.linux.and_then(|l| l.namespaces).unwrap_or_default();
    !namespaces.iter().any(|n| n.kind == "pid" && n.path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        dir
    }

    #[test]
    fn the_annotation_is_added_once() {
        for config in
            [r#"{"process":{"args":["a"]}}"#, r#"{"annotations":null}"#, r#"{"annotations":{"a":"b"}}"#]
        {
            let dir = bundle(config);
            let path = prepare_criu_config(dir.path(), "runc", Path::new("/r")).unwrap();
            assert_eq!(path, dir.path().join("criu.conf"));
            assert!(path.exists());
            let spec: Value =
                serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
            assert_eq!(spec["annotations"][CRIU_CONF_ANNOTATION], path.to_str().unwrap());
            assert_eq!(prepare_criu_config(dir.path(), "runc", Path::new("/r")).unwrap(), path);
        }
    }

    #[test]
    fn crun_is_told_where_its_empty_directory_is() {
        let dir = bundle("{}");
        let path = prepare_criu_config(dir.path(), "/opt/crun", Path::new("/run/r/ns")).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.ends_with("mnt[/run/crun/.empty-directory]:/run/r/ns/.empty-directory\n"), "{text}");
    }

    #[test]
    fn the_first_file_that_exists_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        assert_eq!(first_of(&[&path("a"), &path("b")]).unwrap(), "");
        fs::write(path("b"), "ghost-limit 5").unwrap();
        assert_eq!(first_of(&[&path("a"), &path("b")]).unwrap(), "ghost-limit 5\n");
        fs::write(path("a"), "").unwrap();
        assert_eq!(first_of(&[&path("a"), &path("b")]).unwrap(), "");
    }

    #[test]
    fn an_annotation_of_the_users_own_stays() {
        let config = r#"{"annotations":{"org.criu.config":"/etc/mine.conf"}}"#;
        let dir = bundle(config);
        assert_eq!(
            prepare_criu_config(dir.path(), "runc", Path::new("/r")).unwrap(),
            Path::new("/etc/mine.conf")
        );
        assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), config);
        assert!(!dir.path().join("criu.conf").exists());
    }

    #[test]
    fn large_numbers_survive() {
        let dir =
            bundle(r#"{"linux":{"seccomp":{"args":[18446744073709551615,-9223372036854775808,0.25]}}}"#);
        prepare_criu_config(dir.path(), "runc", Path::new("/r")).unwrap();
        let text = fs::read_to_string(dir.path().join("config.json")).unwrap();
        assert!(text.contains("[18446744073709551615,-9223372036854775808,0.25]"), "{text}");
    }

    #[test]
    fn only_a_private_pid_namespace_ends_the_others() {
        let private = bundle(r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"pid"}]}}"#);
        let joined = bundle(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#);
        let none = bundle(r#"{"linux":{}}"#);
        let broken = bundle("{");
        assert!(!must_kill_all(private.path()));
        assert!(must_kill_all(joined.path()));
        assert!(must_kill_all(none.path()));
        assert!(must_kill_all(broken.path()));
    }
}
