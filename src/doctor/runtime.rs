//! runc and crun: found, which version, what is known of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Finding, version_in};

/// A program that was found on PATH, and what it calls itself.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Where.
    pub path: PathBuf,
    /// The first line of `--version`.
    pub version: String,
    /// That text has the word `+CRIU`, by which crun says that it was built with it.
    pub criu: bool,
}

/// What [`gather`] saw.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The runtime that the shim starts unless told otherwise.
    pub runc: Option<Program>,
    /// Used when the container's options name it.
    pub crun: Option<Program>,
}

/// Looks both up on `shim_path` (the shim's PATH), else on this process'.
pub fn gather(shim_path: Option<&str>) -> Facts {
    let own = std::env::var("PATH").unwrap_or_default();
    let path = shim_path.unwrap_or(&own);
    Facts { runc: find("runc", path), crun: find("crun", path) }
}

/// The first executable `name` in the directories of `path` (a PATH list).
pub fn on_path(name: &str, path: &str) -> Option<PathBuf> {
    path.split(':').filter(|d| !d.is_empty()).map(|d| Path::new(d).join(name)).find(|p| executable(p))
}

fn executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn find(name: &str, path: &str) -> Option<Program> {
    let path = on_path(name, path)?;
    let text = match Command::new(&path).arg("--version").output() {
        Ok(out) => String::from_utf8_lossy(&out.stdout).into_owned(),
        Err(e) => format!("does not run: {e}"),
    };
    let version = text.lines().next().unwrap_or_default().to_owned();
    Some(Program { path, version, criu: text.split_whitespace().any(|word| word == "+CRIU") })
}

/// The rules; the versions are those of `notes/runtimes.md`.
pub fn verdict(facts: &Facts, cgroup_v1: bool) -> Vec<Finding> {
    let mut out = Vec::new();
    out.push(match &facts.runc {
        None => Finding::fail(
            "runc",
            "not on containerd's PATH",
            "install runc 1.1.15 or newer (apt install runc), or put it where containerd finds it",
        ),
        Some(p) => {
            let found = format!("{} ({})", p.version, p.path.display());
            match version_in(&p.version) {
                None => Finding::fail("runc", found, "its version cannot be read: is it stock runc?"),
                Some(v) if v < (1, 1, 0) => Finding::fail("runc", found, "runc 1.1 or newer is needed"),
                Some(v) if v < (1, 1, 5) => {
                    Finding::warn("runc", found, "1.1.5 is the oldest that we have moved containers with")
                }
                Some(v) if v < (1, 2, 0) => Finding::ok("runc", found),
                Some(v) if v < (1, 2, 7) => Finding::warn(
                    "runc",
                    found,
                    "1.2.0 to 1.2.6: `runc exec` may fail after a restore when the container has a time namespace; \
                     fixed in 1.2.7 and 1.3.0",
                ),
                Some(_) => Finding::ok("runc", found),
            }
        }
    });
    if let Some(p) = &facts.crun {
        let found = format!("{} ({})", p.version, p.path.display());
        out.push(if cgroup_v1 {
            let why = "crun refuses cgroup v1 beside a v2 hierarchy with controllers: where there is one, containers have to use runc";
            Finding::warn("crun", found, why)
        } else if !p.criu {
            let why = "built without CRIU (no +CRIU in `crun --version`): its containers can be neither checkpointed nor moved";
            Finding::warn("crun", found, why)
        } else {
            Finding::ok("crun", found)
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn level(version: &str) -> Level {
        let runc = Some(Program { path: "/x/runc".into(), version: version.into(), criu: false });
        verdict(&Facts { runc, crun: None }, true)[0].level
    }

    #[test]
    fn known_versions_are_judged() {
        assert_eq!(level("runc version 1.1.15+ds1"), Level::Ok);
        assert_eq!(level("runc version 1.3.6"), Level::Ok);
        assert_eq!(level("runc version 1.2.4"), Level::Warn);
        assert_eq!(level("runc version 1.2.7"), Level::Ok);
        assert_eq!(level("runc version 1.0.3"), Level::Fail);
        assert_eq!(level("does not run: x"), Level::Fail);
        assert_eq!(verdict(&Facts::default(), false)[0].level, Level::Fail);
    }

    #[test]
    fn only_executables_count_on_a_path() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("runc"), "").unwrap();
        let path = format!(":/nonexistent:{}", dir.path().display());
        assert_eq!(on_path("runc", &path), None);
        assert!(on_path("sh", "/nonexistent:/bin").is_some());
    }

    #[test]
    fn crun_needs_v2_and_criu() {
        let level = |criu, v1| {
            let crun = Program { path: "/x/crun".into(), version: "crun version 1.28".into(), criu };
            verdict(&Facts { runc: None, crun: Some(crun) }, v1)[1].level
        };
        assert_eq!(level(true, false), Level::Ok);
        assert_eq!(level(false, false), Level::Warn);
        assert_eq!(level(true, true), Level::Warn);
    }
}
