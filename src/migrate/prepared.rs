//! What the source finds out before the freeze: CRIU, cgroup, namespaces, options of the dump, a directory for its images.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use oci_spec::runtime::LinuxNamespaceType;
use serde_json::Value;

use super::protocol::{FORMAT, Manifest};
use super::source::{Options, SourceTask};
use crate::cgroup::Freezer;
use crate::control::RUN_DIR;
use crate::criu::options::{Facts, dump_options, namespace};
use crate::criu::{self, Criu};
use crate::net;
use crate::private;
use crate::rootfs::WritableLayer;

/// Below a migration's directory: CRIU's images.
pub(super) const IMAGES: &str = "images";
/// Below a migration's directory: CRIU's log and statistics.
pub(super) const WORK: &str = "work";

/// What can be found out before the freeze.
pub(super) struct Prepared {
    pub criu: Criu,
    pub freezer: Freezer,
    pub netns: OwnedFd,
    pub dir: ImagesDir,
    pub layer: WritableLayer,
    pub rootfs: PathBuf,
    pub opts: criu::rpc::CriuOpts,
    pub descriptors: [String; 3],
    /// The init's pid.
    pub init: i32,
    /// The container has a user namespace of its own.
    pub userns: bool,
}

impl Prepared {
    pub fn new(task: &dyn SourceTask, options: &Options) -> Result<Prepared> {
        let pid = i32::try_from(task.pid()).context("the container's pid")?;
        let criu = Criu::find(options.limits.criu.as_deref()).context("looking for CRIU on the source")?;
        let freezer = Freezer::of_pid(pid).context("looking for the container's cgroup")?;
        let netns = net::netns_of_pid(pid).context("opening the container's network namespace")?;
        let dir = ImagesDir::create(&options.limits.images_dir, &format!("{}-source", options.migration_id))?;
        for sub in [IMAGES, WORK] {
            private::dir(&dir.0.join(sub)).context("creating the images directory")?;
        }
        let config = task.bundle().join("config.json");
        let spec = oci_spec::runtime::Spec::load(&config)
            .with_context(|| format!("reading {}", config.display()))?;
        let facts = Facts::gather(&spec, pid, &task.rootfs(), freezer.path())?;
        let limits = criu::options::Limits {
            ghost_limit: options.limits.ghost_limit,
            log_level: 2,
            ..criu::options::Limits::default()
        };
        let opts = dump_options(&spec, &facts, &limits).context("preparing CRIU's dump")?;
        let descriptors = criu::stdio::descriptors(Some(&task.runc_state()), pid)?;
        Ok(Prepared {
            criu,
            freezer,
            netns,
            dir,
            layer: task.layer()?,
            rootfs: task.rootfs(),
            opts,
            descriptors,
            init: pid,
            userns: namespace(&spec, LinuxNamespaceType::User).is_some(),
        })
    }

    /// What the destination is told first; `container` is the agents' part of a checkpoint file.
    pub fn manifest(&self, task: &dyn SourceTask, container: Value) -> Manifest {
        Manifest {
            version: FORMAT,
            criu: self.criu.version.to_string(),
            stdio: task.stdio_kinds(),
            container,
            ..Manifest::default()
        }
    }

    /// Mounts that are not the container's own: the restore finds them on the destination.
    pub fn external_mounts(&self) -> HashSet<String> {
        self.opts.ext_mnt.iter().map(|m| m.key.clone()).collect()
    }

    /// Where CRIU's images go.
    pub fn images(&self) -> PathBuf {
        self.dir.0.join(IMAGES)
    }

    /// Where CRIU's log goes.
    pub fn work(&self) -> PathBuf {
        self.dir.0.join(WORK)
    }
}

/// Logs of failed dumps that are kept.
const LOGS: usize = 16;

/// CRIU's log outlives the images: whoever reads the error wants to see the rest of it. Returns the error with the place.
pub(super) fn keep_log(error: anyhow::Error, work: &Path, options: &Options) -> anyhow::Error {
    if !error.is::<criu::dump::DumpFailed>() {
        return error;
    }
    let dir = Path::new(RUN_DIR).join("logs");
    let to = dir.join(format!("{}-dump.log", options.migration_id));
    let keep = || -> Result<()> {
        private::dir(&dir)?;
        std::io::copy(&mut File::open(work.join(criu::dump::LOG_FILE))?, &mut private::create(&to)?)?;
        let mut all: Vec<_> = std::fs::read_dir(&dir)?
            .flatten()
            .filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f.path())))
            .collect();
        all.sort();
        all.iter().rev().skip(LOGS).try_for_each(|(_, path)| Ok(std::fs::remove_file(path)?))
    };
    match keep() {
        Ok(()) => anyhow!("{error:#} (log: {})", to.display()),
        Err(e) => {
            log::warn!("keeping CRIU's log as {}: {e:#}", to.display());
            error
        }
    }
}

/// A directory for images that goes away with its owner.
pub(super) struct ImagesDir(pub PathBuf);

impl ImagesDir {
    /// Makes `parent/name`, for root only.
    pub fn create(parent: &Path, name: &str) -> Result<ImagesDir> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = parent.join(name);
        private::refuse_shared(parent)?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("creating the images directory {}", dir.display()))?;
        Ok(ImagesDir(dir))
    }
}

impl Drop for ImagesDir {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            log::warn!("removing {}: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_directory_goes_away_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let dir = ImagesDir::create(&parent.path().join("images"), "m-1").unwrap();
        let path = dir.0.clone();
        std::fs::write(path.join("core-1.img"), b"x").unwrap();
        assert!(ImagesDir::create(&parent.path().join("images"), "m-1").is_err(), "never shared");
        drop(dir);
        assert!(!path.exists());
    }
}
