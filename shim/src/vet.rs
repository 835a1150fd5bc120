//! Images that containerd wants restored, looked at before runc and CRIU get them: they may have come with an image from anywhere, and CRIU
//! does, as root, what they say. What is looked at is in [`transship::criu::vet`]; the measure is the bundle's config.json alone.
//!
//! Images can say more than the spec with good reason: somebody has changed the container from outside (`renice`, `prlimit`, a mount by
//! nsenter). Then the node's administrator lets them pass by a line in [`UNVETTED`]. It is a file of the node, because everything else
//! (annotations, labels, the runtime's options) can come out of the checkpoint itself: `ctr c restore` takes them from there.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use transship::criu::vet::{self, Measure, Subject};

use crate::errors::{TaskError, TaskResult};

/// Containers whose images are restored whatever they say: `NAMESPACE/ID` a line, `*` at the end means anything, `#` begins a comment.
pub const UNVETTED: &str = "/etc/transship/restore-unvetted";

/// What is to be looked at.
#[derive(Debug)]
pub struct Restore {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The images.
    pub images: PathBuf,
    /// Images of a previous pre-dump, or empty.
    pub parent: String,
    /// The file of the node that says whose images pass unseen: [`UNVETTED`].
    pub unvetted: PathBuf,
}

/// Looks, in a helper thread: the other containers of the pod shall not wait for it.
///
/// # Errors
/// The images are refused. Nothing has been made.
pub async fn check(restore: Restore) -> TaskResult<()> {
    tokio::task::spawn_blocking(move || look(&restore))
        .await
        .map_err(|e| TaskError::unknown(format!("looking at images: {e}")))?
}

fn look(restore: &Restore) -> TaskResult<()> {
    let Restore { namespace, id, bundle, images, parent, unvetted } = restore;
    let subject = Subject { images, bundle, measure: Measure::Spec { parent } };
    let Err(reason) = vet::check(&subject) else { return Ok(()) };
    let name = format!("{namespace}/{id}");
    let why_not = match is_listed(unvetted, &name) {
        Ok(true) => {
            log::warn!("{name}: restored as {} says, though {reason:#}", unvetted.display());
            return Ok(());
        }
        Ok(false) => String::new(),
        Err(e) => format!(" ({e:#})"),
    };
    Err(TaskError::failed_precondition(format!(
        "the checkpoint in {} is refused: {reason:#}. Neither runc nor CRIU was asked, nothing was restored; the container is as it was \
         created, delete it. If you trust whoever made the checkpoint, write the line `{name}` into {} on this node and try again{why_not}",
        images.display(),
        unvetted.display(),
    )))
}

/// Is the container in the file?
fn is_listed(file: &Path, name: &str) -> Result<bool> {
    let meta = match fs::metadata(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other.with_context(|| format!("reading {}", file.display()))?,
    };
    let own = meta.uid() == nix::unistd::geteuid().as_raw() && meta.mode() & 0o022 == 0;
    ensure!(own, "{} is not root's alone to write", file.display());
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(names(&text, name))
}

fn names(text: &str, name: &str) -> bool {
    let lines = text.lines().map(|l| l.split('#').next().unwrap_or_default().trim());
    lines.filter(|l| !l.is_empty()).any(|line| match line.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => line == name,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn names_and_patterns() {
        let text = "# those of the lab\nlab/*\ndefault/redis # changed by hand\n\n";
        assert!(names(text, "lab/x") && names(text, "default/redis"));
        assert!(!names(text, "default/redis2") && !names(text, "other/lab/x") && !names("", "default/x"));
        assert!(!names("#*\n# *\n", "default/x"));
        assert!(names("*", "any/thing"));
    }

    #[test]
    fn what_is_refused_is_told_and_the_nodes_file_lets_it_pass() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, images) = (dir.path().join("bundle"), dir.path().join("images"));
        for d in [&bundle, &images] {
            fs::create_dir(d).unwrap();
        }
        fs::write(bundle.join("config.json"), "{}").unwrap();
        std::os::unix::fs::symlink("/etc/shadow", images.join("pages-1.img")).unwrap();
        let file = dir.path().join("unvetted");
        let (namespace, id, parent) = ("default".into(), "c1".into(), String::new());
        let restore = Restore { namespace, id, bundle, images, parent, unvetted: file.clone() };
        let refused = look(&restore).unwrap_err().to_string();
        for word in ["pages-1.img", "nothing was restored", "`default/c1`", "unvetted", "failed precondition"]
        {
            assert!(refused.contains(word), "{refused}");
        }
        fs::write(&file, "default/c1\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        let refused = look(&restore).unwrap_err().to_string();
        assert!(refused.contains("not root's alone"), "{refused}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        look(&restore).unwrap();
    }
}
