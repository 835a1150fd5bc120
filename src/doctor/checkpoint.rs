//! CRIU: found, its version, and whether it works here, by really dumping a process with connected sockets. `criu check` is not
//! asked: it looks good on kernels where every dump of a connected socket fails.

use std::path::{Path, PathBuf};

use super::Finding;
use crate::criu::Criu;
use crate::criu::log::{Cause, Finding as Failure};

/// What [`gather`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Facts {
    /// No CRIU, or one that does not answer.
    Missing(String),
    /// CRIU answered.
    Found {
        /// Where.
        path: PathBuf,
        /// Its version.
        version: String,
        /// The trial dump.
        trial: Trial,
        /// The shim finds a CRIU by itself, or is told by the agent's configuration.
        shim_finds: bool,
    },
}

/// How the dump of a process with connected sockets ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// As it should.
    Worked,
    /// CRIU failed, with its own first error line and what is known of it.
    Failed(Failure),
    /// The trial itself could not be made.
    NotMade(String),
}

/// Finds CRIU and tries it. `explicit`: the path in the agent's configuration; `shim_path`: PATH in containerd's environment, which
/// the shim inherits.
pub fn gather(explicit: Option<&Path>, shim_path: Option<&str>) -> Facts {
    let criu = match Criu::find(explicit) {
        Ok(criu) => criu,
        Err(e) => return Facts::Missing(format!("{e:#}")),
    };
    no_descriptor_for_children();
    let trial = match criu.works() {
        Ok(Ok(())) => Trial::Worked,
        Ok(Err(failure)) => Trial::Failed(failure),
        Err(e) => Trial::NotMade(format!("{e:#}")),
    };
    let shim_finds =
        explicit.is_some() || shim_path.is_none_or(|p| super::runtime::on_path("criu", p).is_some());
    Facts::Found { path: criu.path.clone(), version: criu.version.to_string(), trial, shim_finds }
}

/// Descriptors that this process was started with (a shell's, a CI runner's) must not reach the process that is dumped: they may be
/// of another mount namespace, which CRIU rightly refuses.
fn no_descriptor_for_children() {
    // SAFETY: no pointers; nothing is closed, the descriptors only stay behind at an exec.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc < 0 {
        log::debug!("close_range: {}", std::io::Error::last_os_error());
    }
}

/// The rules.
pub fn verdict(facts: &Facts) -> Vec<Finding> {
    let (path, version, trial, shim_finds) = match facts {
        Facts::Missing(e) => {
            return vec![Finding::fail(
                "criu",
                e.clone(),
                "install CRIU (apt install criu; on kernels from 6.16 on it must be 4.2 or newer) and name it by `criu` \
                 in /etc/transship/agent.toml when it is not on PATH",
            )];
        }
        Facts::Found { path, version, trial, shim_finds } => (path, version, trial, *shim_finds),
    };
    let found = format!("{version} ({})", path.display());
    let found = if shim_finds {
        Finding::ok("criu", found)
    } else {
        Finding::warn(
            "criu",
            format!("{found}, not on containerd's PATH"),
            "the shim looks on containerd's PATH: name it by `criu` in /etc/transship/agent.toml",
        )
    };
    let trial = match trial {
        Trial::Worked => Finding::ok("criu dump", "a process with connected TCP and unix sockets was dumped"),
        Trial::Failed(failure) => Finding::fail(
            "criu dump",
            failure.line.clone(),
            match (&failure.hint, failure.cause) {
                (Some(hint), _) => hint.clone(),
                (None, Cause::Other | Cause::CriuTooOld) => {
                    "this CRIU cannot dump a process with connected sockets on this kernel, whatever `criu check` says: \
                     from Linux 6.16 on CRIU 4.2 or newer is needed"
                        .into()
                }
                (None, cause) => format!("a process with connected sockets could not be dumped ({cause:?})"),
            },
        ),
        Trial::NotMade(e) => {
            Finding::fail("criu dump", e.clone(), "the trial dump needs root and a network namespace")
        }
    };
    vec![found, trial]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn found(trial: Trial) -> Facts {
        Facts::Found { path: "/x/criu".into(), version: "4.2.1".into(), trial, shim_finds: true }
    }

    #[test]
    fn only_a_dump_that_worked_makes_criu_fit() {
        let last = |facts: &Facts| verdict(facts).pop().unwrap();
        assert_eq!(last(&found(Trial::Worked)).level, Level::Ok);
        let failed = last(&found(Trial::Failed(Failure::new("sockets.c: Can't get 1:16 opt"))));
        assert_eq!(failed.level, Level::Fail);
        assert!(failed.found.contains("1:16"), "CRIU's own line is shown");
        assert_eq!(last(&found(Trial::NotMade("x".into()))).level, Level::Fail);
        assert_eq!(last(&Facts::Missing("x".into())).level, Level::Fail);
    }

    #[test]
    fn a_criu_that_the_shim_does_not_find_is_said() {
        let Facts::Found { path, version, trial, .. } = found(Trial::Worked) else { unreachable!() };
        let hidden = Facts::Found { path, version, trial, shim_finds: false };
        assert_eq!(verdict(&hidden)[0].level, Level::Warn);
    }
}
