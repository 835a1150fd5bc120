//! What containerd's CRI expects of a checkpoint of a pod's container: CRIU's statistics and log in the folder where it keeps the container.
//! It tells only runtimes of runc's own name to work there, and then takes no checkpoint without them.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// The files that it wants.
const FILES: [&str; 2] = ["stats-dump", "dump.log"];

/// The annotations by which CRI tells a pod's containers, and a container's sandbox.
const KIND: (&str, &str) = ("io.kubernetes.cri.container-type", "container");
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Where CRI makes the archive, in the container's folder. Newer ones make it before they ask for the checkpoint and want the files there;
/// older ones take them from the folder itself, where they stay.
const ARCHIVE: &str = "ctrd-checkpoint";

#[derive(Deserialize, Default)]
#[serde(default)]
struct Spec {
    annotations: std::collections::HashMap<String, String>,
    mounts: Vec<Mount>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Mount {
    source: String,
}

/// Copies what CRIU left in `work` to where CRI looks for it. Does nothing for containers that are not CRI's. Failures are logged: the
/// checkpoint is complete without.
pub fn keep(bundle: &Path, id: &str, work: &Path) {
    let Some(home) = fs::read(bundle.join("config.json")).ok().and_then(|json| home(&json, id)) else {
        return;
    };
    let archive = home.join(ARCHIVE);
    // a checkpoint that was unpacked there may have brought links
    let to = if archive.symlink_metadata().is_ok_and(|m| m.is_dir()) { archive } else { home };
    for file in FILES {
        if let Err(e) = copy(&work.join(file), &to.join(file)) {
            log::warn!("{id}: {file} to {}: {e}", to.display());
        }
    }
}

/// The folder in which CRI keeps a container, told by a file of the sandbox's that it mounts into each: `ROOT/sandboxes/SANDBOX/hostname`
/// lies beside `ROOT/containers/ID`. The container's `status` is there; the sandbox's other folder, below /run, has none.
pub(crate) fn home(config: &[u8], id: &str) -> Option<PathBuf> {
    let spec: Spec = serde_json::from_slice(config).ok()?;
    if spec.annotations.get(KIND.0)? != KIND.1 {
        return None;
    }
    let middle = Path::new("sandboxes").join(spec.annotations.get(SANDBOX)?);
    let roots = spec.mounts.iter().filter_map(|m| {
        let folder = Path::new(&m.source).parent()?;
        folder.ends_with(&middle).then(|| folder.parent()?.parent()).flatten()
    });
    roots.map(|root| root.join("containers").join(id)).find(|home| home.join("status").is_file())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut fs::File::open(from)?, &mut file).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_container_gets_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let (root, bundle, work) =
            (dir.path().join("cri"), dir.path().join("bundle"), dir.path().join("work"));
        let home = root.join("containers/c1");
        for d in [&home, &bundle, &work] {
            fs::create_dir_all(d).unwrap();
        }
        for file in FILES {
            fs::write(work.join(file), file).unwrap();
        }
        let config = |kind: &str| {
            serde_json::json!({
                "annotations": {KIND.0: kind, SANDBOX: "s1"},
                "mounts": [
                    {"source": "proc"},
                    {"source": "/run/cri/sandboxes/s1/shm"},
                    {"source": root.join("sandboxes/other/hostname")},
                    {"source": root.join("sandboxes/s1/hostname")}
                ]
            })
        };
        let kept = |kind: &str| {
            fs::write(bundle.join("config.json"), config(kind).to_string()).unwrap();
            keep(&bundle, "c1", &work);
            fs::read_to_string(home.join("stats-dump")).ok()
        };
        assert_eq!(kept("container"), None, "without its status it is not known there");
        fs::write(home.join("status"), "").unwrap();
        assert_eq!(kept("sandbox"), None);
        assert_eq!(kept("container").as_deref(), Some("stats-dump"));
        // where a link points stays as it is
        let victim = dir.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        fs::remove_file(home.join("stats-dump")).unwrap();
        std::os::unix::fs::symlink(&victim, home.join("stats-dump")).unwrap();
        std::os::unix::fs::symlink(dir.path(), home.join(ARCHIVE)).unwrap();
        assert_eq!(kept("container").as_deref(), Some("stats-dump"));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(!dir.path().join("dump.log").exists());
        fs::remove_file(home.join(ARCHIVE)).unwrap();
        fs::create_dir(home.join(ARCHIVE)).unwrap();
        fs::remove_file(home.join("stats-dump")).unwrap();
        assert_eq!(kept("container"), None, "not in both places");
        assert!(
            home.join(ARCHIVE).join("stats-dump").exists() && home.join(ARCHIVE).join("dump.log").exists()
        );
    }
}
