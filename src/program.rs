//! This program's own file, and the small programs beside it, for whoever has to be able to start one of them again. The files may have
//! been replaced since: an upgrade of a node leaves its shims running.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The program that does nothing but [`crate::criu::gate`]: CRIU starts it a dozen times in a freeze, and the shim's own takes a
/// millisecond longer to start.
pub const GATE: &str = "transship-gate";
/// The program without a C library (`src/quick`), which does the most frequent of that and calls the other one for the rest. It starts in a
/// tenth of the time, most of which a C library spends asking the processor what it is: in a virtual machine each such question goes
/// to the hypervisor.
pub const QUICK: &str = "transship-quick";
/// The directory in which the quick program lies under the names of what it stands for: it looks for the other one in the one above.
pub const QUICK_DIR: &str = "quick";

/// What CRIU and runc start as their gates and tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Does everything: [`GATE`], or this program.
    pub full: PathBuf,
    /// [`QUICK`], where there is one.
    pub quick: Option<PathBuf>,
}

impl Programs {
    /// Those of this program's installation.
    pub fn find() -> Result<Programs> {
        Ok(Self::beside(own()?))
    }

    fn beside(own: PathBuf) -> Programs {
        let same_installation = !own.starts_with(Path::new("/proc"));
        let beside = |name| Some(own.with_file_name(name)).filter(|file| same_installation && file.is_file());
        Programs { quick: beside(QUICK), full: beside(GATE).unwrap_or(own) }
    }

    /// Puts them into `dir` under this name, the quick one in [`QUICK_DIR`]. Fine where they are already. Returns the one to be called.
    pub fn named(&self, dir: &Path, name: &str) -> io::Result<PathBuf> {
        let put = |program: &Path, dir: &Path| match symlink(program, dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(dir.join(name)),
        };
        let full = put(&self.full, dir)?;
        let Some(quick) = &self.quick else { return Ok(full) };
        let dir = dir.join(QUICK_DIR);
        std::fs::create_dir_all(&dir)?;
        put(quick, &dir)
    }
}

/// This program: its file, or, if that is another one by now, a name for it that holds as long as this process.
pub fn own() -> Result<PathBuf> {
    let path = std::env::current_exe().context("this program's own file")?;
    // the kernel adds " (deleted)" to the name
    Ok(if path.is_file() { path } else { PathBuf::from(format!("/proc/{}/exe", std::process::id())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_programs_are_taken_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let shim = dir.path().join("shim");
        assert_eq!(Programs::beside(shim.clone()), Programs { full: shim.clone(), quick: None });
        let [full, quick] = [GATE, QUICK].map(|name| dir.path().join(name));
        for file in [&full, &quick] {
            std::fs::write(file, "").unwrap();
        }
        assert_eq!(Programs::beside(shim), Programs { full, quick: Some(quick) });
        // a replaced program does not take the new ones
        let replaced = PathBuf::from("/proc/1/exe");
        assert_eq!(Programs::beside(replaced.clone()), Programs { full: replaced, quick: None });
        assert!(super::own().unwrap().is_absolute());
    }

    #[test]
    fn each_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs { full: "/full".into(), quick: None };
        assert_eq!(programs.named(dir.path(), "tar").unwrap(), dir.path().join("tar"));
        assert!(!dir.path().join(QUICK_DIR).exists());
        programs.quick = Some("/quick".into());
        for _ in 0..2 {
            assert_eq!(programs.named(dir.path(), "tar").unwrap(), dir.path().join("quick/tar"));
        }
        let to = |name: &str| std::fs::read_link(dir.path().join(name)).unwrap();
        assert_eq!((to("tar"), to("quick/tar")), ("/full".into(), "/quick".into()));
    }
}
