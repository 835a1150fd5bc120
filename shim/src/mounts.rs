//! The root filesystem's mounts: made before the container, undone after it. The mounting itself is containerd-shim's.

use std::{
    fs::DirBuilder,
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use containerd_shim::{Error as ShimError, mount};
use containerd_shim_protos::types::mount::Mount;
use nix::errno::Errno;

/// How often and how long an unmount that finds the mount busy is tried again (containerd does the same).
const BUSY_TRIES: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Mounts `mounts` in their order on `rootfs`, which is made when missing. On an error everything is unmounted again.
pub async fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    if let Err(e) = DirBuilder::new().mode(0o711).create(rootfs)
        && e.kind() != ErrorKind::AlreadyExists
    {
        return Err(e).with_context(|| format!("make {}", rootfs.display()));
    }
    let (list, root) = (mounts.to_vec(), rootfs.to_path_buf());
    // In a thread of its own: the helper may move its thread to another working directory.
    let done = tokio::task::spawn_blocking(move || list.iter().try_for_each(|m| mount_one(m, &root)));
    let result = done.await.context("the mounting thread has ended early")?;
    if result.is_err() {
        unmount_all(rootfs).await.unwrap_or_else(|e| log::warn!("after a failed mount: {e:#}"));
    }
    result.context("failed to mount rootfs component")
}

/// Unmounts everything at and below `rootfs`. Nothing mounted is fine.
pub async fn unmount_all(rootfs: &Path) -> Result<()> {
    let root = rootfs.to_path_buf();
    tokio::task::spawn_blocking(move || unmount_now(&root))
        .await
        .context("the unmounting thread has ended early")?
}

/// [`unmount_all`] for a process without a runtime.
pub fn unmount_now(rootfs: &Path) -> Result<()> {
    let target = rootfs.to_str().with_context(|| format!("{} is not UTF-8", rootfs.display()))?;
    let mut tries = 0;
    loop {
        match mount::umount_recursive(Some(target), 0) {
            Err(ShimError::Nix(Errno::EBUSY)) if tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            other => return other.with_context(|| format!("unmount {target}")),
        }
    }
}

fn mount_one(m: &Mount, rootfs: &Path) -> Result<()> {
    let target = inside(rootfs, &m.target)?;
    let some = |s: &str| Some(s.to_string()).filter(|s| !s.is_empty());
    let (kind, source) = (some(&m.type_), some(&m.source));
    mount::mount_rootfs(kind.as_deref(), source.as_deref(), &m.options, &target)
        .with_context(|| format!("mount {} {:?} on {}", m.type_, m.source, target.display()))
}

/// `target` below `rootfs`, with no way out by `..`.
pub(crate) fn inside(rootfs: &Path, target: &str) -> Result<PathBuf> {
    let mut path = rootfs.to_path_buf();
    for part in Path::new(target).components() {
        match part {
            Component::Normal(p) => path.push(p),
            Component::RootDir | Component::CurDir => {}
            _ => bail!("mount target {target:?} leads out of the root"),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_inside() {
        let root = Path::new("/b/rootfs");
        assert_eq!(inside(root, "").unwrap(), root);
        assert_eq!(inside(root, "/a/b").unwrap(), Path::new("/b/rootfs/a/b"));
        assert!(inside(root, "a/../../x").is_err());
    }

    #[test]
    fn nothing_mounted_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        unmount_now(dir.path()).unwrap();
        unmount_now(&dir.path().join("missing")).unwrap();
    }
}
