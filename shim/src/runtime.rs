//! Which OCI runtime stands behind `BinaryName`: stock runc and whatever speaks like it, or crun. They agree on a container's life; they
//! differ in checkpoint and restore, and that is all that is decided here. Running them is [`crate::runc`]'s.

use std::path::Path;

/// Where crun's empty directory for masked paths lies when it is not told its `--root`, see [`empty_directory`].
const CRUN_ROOT: &str = "/run/crun";
/// crun's name for it.
const EMPTY_DIRECTORY: &str = ".empty-directory";

/// What a runtime is for checkpoint and restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runtime {
    /// runc, and what we know nothing better of.
    Runc,
    /// crun. Its restore knows no `--no-pivot`, `--no-subreaper`, `--parent-path`, `--lazy-pages` and `--empty-ns`, and fails on each.
    Crun {
        /// The first line of its `--version`.
        version: String,
        /// It was built with CRIU. Many distributions' is not.
        criu: bool,
    },
}

impl Runtime {
    /// From what the program prints for `--version`.
    pub fn from_version(text: &str) -> Runtime {
        let version = text.lines().next().unwrap_or_default().trim();
        if !version.starts_with("crun ") {
            return Runtime::Runc;
        }
        Runtime::Crun { version: version.into(), criu: text.split_whitespace().any(|word| word == "+CRIU") }
    }

    /// Whether it is crun.
    pub fn is_crun(&self) -> bool {
        matches!(self, Runtime::Crun { .. })
    }

    /// Why it cannot checkpoint and restore, if it cannot.
    pub fn without_criu(&self, binary: &str) -> Option<String> {
        match self {
            Runtime::Crun { version, criu: false } => Some(format!(
                "{binary} ({version}) is built without CRIU (no +CRIU in `{binary} --version`): it can neither checkpoint nor restore"
            )),
            _ => None,
        }
    }
}

/// Whether a program of this name is runc, beyond doubt: it need not be asked.
pub fn named_runc(binary: &str) -> bool {
    Path::new(binary).file_name().is_some_and(|name| name == "runc")
}

/// Whether a program of this name is crun, for what has to be known before it is worth running it.
pub fn named_crun(binary: &str) -> bool {
    Path::new(binary).file_name().is_some_and(|name| name.to_string_lossy().contains("crun"))
}

/// A line of CRIU's configuration for a restore by crun. Masked directories are bind mounts of one empty directory; its checkpoint names it
/// by crun's default root and its restore by the root that it was given, so that CRIU finds "No mapping for" it whenever they
/// differ, as they do under containerd (crun 1.28).
pub fn empty_directory(root: &Path) -> String {
    format!("external mnt[{CRUN_ROOT}/{EMPTY_DIRECTORY}]:{}\n", root.join(EMPTY_DIRECTORY).display())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN_12: &str = "crun version 1.8.1\ncommit: f8a096\nrundir: /run/crun\nspec: 1.0.0\n+SYSTEMD +CAP +SECCOMP +EBPF +YAJL\n";
    const FORKY: &str =
        "crun version 1.28\ncommit: 54f16f\nrundir: /run/crun\nspec: 1.0.0\n+SYSTEMD +EBPF +CRIU +JSON_C\n";

    #[test]
    fn the_version_tells_crun_and_whether_it_has_criu() {
        assert_eq!(Runtime::from_version("runc version 1.1.15+ds1\nspec: 1.0.2-dev\n"), Runtime::Runc);
        assert_eq!(Runtime::from_version(""), Runtime::Runc);
        let crun = |version: &str, criu| Runtime::Crun { version: version.into(), criu };
        assert_eq!(Runtime::from_version(DEBIAN_12), crun("crun version 1.8.1", false));
        assert_eq!(Runtime::from_version(FORKY), crun("crun version 1.28", true));
        assert_eq!(Runtime::from_version(FORKY).without_criu("crun"), None);
        let why = Runtime::from_version(DEBIAN_12).without_criu("/usr/bin/crun").unwrap();
        assert!(why.starts_with("/usr/bin/crun (crun version 1.8.1) is built without CRIU"), "{why}");
    }

    #[test]
    fn names() {
        assert!(named_crun("/opt/crun/bin/crun") && named_crun("crun"));
        assert!(!named_crun("/crun/runc"));
        assert!(named_runc("/crun/runc") && named_runc("runc") && !named_runc("runc-1.3"));
        let line = empty_directory(Path::new("/run/containerd/runc/k8s.io"));
        assert_eq!(
            line,
            "external mnt[/run/crun/.empty-directory]:/run/containerd/runc/k8s.io/.empty-directory\n"
        );
    }
}
