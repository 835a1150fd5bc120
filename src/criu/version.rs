//! Finding CRIU and asking it for its version.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::rpc::{CriuReq, ReqType, VersionResp};
use super::swrk::{Spawn, Swrk};

/// The variable that names a CRIU, after the configuration and before PATH.
pub const CRIU_ENV: &str = "TRANSSHIP_CRIU";

/// CRIU's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 4 in 4.2.1.
    pub major: u32,
    /// 2 in 4.2.1.
    pub minor: u32,
    /// 1 in 4.2.1, 0 in 4.2.
    pub sublevel: u32,
}

impl Version {
    /// A version from its three numbers.
    pub const fn new(major: u32, minor: u32, sublevel: u32) -> Self {
        Self { major, minor, sublevel }
    }

    fn from_rpc(v: &VersionResp) -> Result<Self> {
        let number = |n: i32| u32::try_from(n).context("CRIU reports a negative version number");
        Ok(Self {
            major: number(v.major_number)?,
            minor: number(v.minor_number)?,
            sublevel: number(v.sublevel.unwrap_or(0))?,
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 {
            write!(f, ".{}", self.sublevel)?;
        }
        Ok(())
    }
}

/// A CRIU that was found and answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
}

impl Criu {
    /// Finds CRIU: the explicit path if there is one, else `$TRANSSHIP_CRIU`, else PATH; then asks it for its version.
    pub fn find(explicit: Option<&Path>) -> Result<Self> {
        let path = locate(
            explicit,
            std::env::var_os(CRIU_ENV).map(PathBuf::from).as_deref(),
            std::env::var_os("PATH").as_deref(),
        )?;
        let version =
            ask_version(&path).with_context(|| format!("asking {} for its version", path.display()))?;
        Ok(Self { path, version })
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Where CRIU is, without running it.
pub fn locate(
    explicit: Option<&Path>,
    env: Option<&Path>,
    path: Option<&std::ffi::OsStr>,
) -> Result<PathBuf> {
    for (named, by) in [(explicit, "the configuration"), (env, CRIU_ENV)] {
        if let Some(named) = named.filter(|p| !p.as_os_str().is_empty()) {
            ensure!(is_program(named), "{by} names {} as CRIU, which is no program", named.display());
            return std::path::absolute(named).context("making CRIU's path absolute");
        }
    }
    let dirs = path.map(|p| std::env::split_paths(p).collect::<Vec<_>>()).unwrap_or_default();
    match dirs.iter().map(|d| d.join("criu")).find(|p| is_program(p)) {
        Some(found) => std::path::absolute(found).context("making CRIU's path absolute"),
        None => bail!("no criu in PATH; install it, or name it by {CRIU_ENV} or in the configuration"),
    }
}

fn ask_version(path: &Path) -> Result<Version> {
    let worker = Swrk::spawn(path, &Spawn::default())?;
    let answer = worker.call(&CriuReq::new(ReqType::Version), &mut |_| true);
    worker.finish();
    let answer = answer?;
    let version = answer.version.filter(|_| answer.success).context("CRIU does not tell its version")?;
    Version::from_rpc(&version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_and_print() {
        assert!(Version::new(4, 2, 0) > Version::new(4, 1, 1));
        assert_eq!(Version::new(4, 2, 1).to_string(), "4.2.1");
        assert_eq!(Version::new(3, 17, 0).to_string(), "3.17");
    }

    #[test]
    fn the_explicit_path_wins_and_must_be_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("criu");
        std::fs::write(&program, "").unwrap();
        assert!(locate(Some(&program), None, None).unwrap_err().to_string().contains("no program"));
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(locate(Some(&program), Some(Path::new("/nonexistent")), None).unwrap(), program);
        assert_eq!(locate(None, None, Some(dir.path().as_os_str())).unwrap(), program);
        assert!(locate(None, None, None).is_err());
    }
}
