//! This program's own file, and the small program beside it, for whoever has to be able to start one of them again. The files may have
//! been replaced since: an upgrade of a node leaves its shims running.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The program that does nothing but [`crate::criu::gate`]: CRIU starts it a dozen times in a freeze, and the shim's own takes a
/// millisecond longer to start.
pub const GATE: &str = "transship-gate";

/// This program: its file, or, if that is another one by now, a name for it that holds as long as this process.
pub fn own() -> Result<PathBuf> {
    let path = std::env::current_exe().context("this program's own file")?;
    // the kernel adds " (deleted)" to the name
    Ok(if path.is_file() { path } else { PathBuf::from(format!("/proc/{}/exe", std::process::id())) })
}

/// What CRIU and runc start as their gates and tools.
pub fn gate() -> Result<PathBuf> {
    Ok(gate_of(own()?))
}

/// The small program in the same directory, if it is of the same installation.
fn gate_of(own: PathBuf) -> PathBuf {
    let beside = own.with_file_name(GATE);
    if !own.starts_with(Path::new("/proc")) && beside.is_file() { beside } else { own }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_program_is_taken_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("shim");
        assert_eq!(gate_of(own.clone()), own);
        let small = dir.path().join(GATE);
        std::fs::write(&small, "").unwrap();
        assert_eq!(gate_of(own), small);
        // a replaced program does not take the new one's
        assert_eq!(gate_of("/proc/1/exe".into()), Path::new("/proc/1/exe"));
        assert!(super::own().unwrap().is_absolute());
    }
}
