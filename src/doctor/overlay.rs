//! overlayfs: a real mount in a mount namespace of its own, and a deletion that must leave a whiteout in the upper layer.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Finding;

/// What [`gather`] saw: `Err` says at which step the trial failed.
pub type Facts = Result<(), String>;

/// Tries it on a tmpfs that vanishes with the thread's mount namespace.
pub fn gather() -> Facts {
    // A thread of its own: its mount namespace ends with it, and nothing that is mounted can stay behind.
    std::thread::spawn(|| trial().map_err(|e| format!("{e:#}")))
        .join()
        .unwrap_or_else(|_| Err("the trial panicked".into()))
}

/// The rule.
pub fn verdict(facts: &Facts) -> Finding {
    match facts {
        Ok(()) => Finding::ok("overlayfs", "mounts, and a deletion makes a whiteout"),
        Err(e) => Finding::fail(
            "overlayfs",
            e.clone(),
            "the writable layer is overlayfs' upper directory: load the module (modprobe overlay) and run as root",
        ),
    }
}

fn trial() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace for the trial")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    let dir = tempfile::tempdir().context("a directory for the trial")?;
    mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), none).context("mounting tmpfs")?;
    let result = on(dir.path());
    // The directory itself is outside of the tmpfs: uncover it so that it can be removed.
    let _ = nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH);
    result
}

fn on(dir: &Path) -> Result<()> {
    let part = |name: &str| dir.join(name);
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(part(name)).with_context(|| format!("mkdir {name}"))?;
    }
    std::fs::write(part("lower").join("gone"), b"x").context("writing into the lower layer")?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        part("lower").display(),
        part("upper").display(),
        part("work").display()
    );
    mount(Some("overlay"), &part("merged"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("mounting overlay")?;
    let removed =
        std::fs::remove_file(part("merged").join("gone")).context("deleting a file of the lower layer");
    let whiteout = std::fs::symlink_metadata(part("upper").join("gone"));
    let _ = nix::mount::umount2(&part("merged"), nix::mount::MntFlags::MNT_DETACH);
    removed?;
    let kind = whiteout.context("the deletion left nothing in the upper layer")?.file_type();
    ensure!(kind.is_char_device(), "the deletion left {kind:?} where a whiteout was expected");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn the_trial_decides() {
        assert_eq!(verdict(&Ok(())).level, Level::Ok);
        let failed = verdict(&Err("mounting overlay: ENODEV".into()));
        assert_eq!(failed.level, Level::Fail);
        assert!(failed.advice.is_some());
    }
}
