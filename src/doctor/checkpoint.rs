//! CRIU: found, its version, and whether it works here, by really dumping a process with connected sockets. `criu check` is not
//! asked: it looks good on kernels where every dump of a connected socket fails.

use std::path::{Path, PathBuf};

use super::Finding;
use crate::criu::Criu;

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
    /// CRIU failed, with its own first error line.
    Failed(String),
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
    let trial = match criu.works() {
        Ok(Ok(())) => Trial::Worked,
        Ok(Err(finding)) => Trial::Failed(finding.to_string()),
        Err(e) => Trial::NotMade(format!("{e:#}")),
    };
    let shim_finds =
        explicit.is_some() || shim_path.is_none_or(|p| super::runtime::on_path("criu", p).is_some());
    Facts::Found { path: criu.path.clone(), version: criu.version.to_string(), trial, shim_finds }
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
        Trial::Failed(line) => Finding::fail(
            "criu dump",
            line.clone(),
            "this CRIU cannot dump a process with a connected socket on this kernel, whatever `criu check` says: \
             from Linux 6.16 on CRIU 4.2 or newer is needed",
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
        let failed = last(&found(Trial::Failed("sockets.c: Can't get 1:16 opt".into())));
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
