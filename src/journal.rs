//! What has to be known after a crash, or after the machine was switched off: small files below `/var/lib/transship`, for root only, each
//! written whole and durable before the call returns. What they mean is their owners' business ([`crate::agent::placed`],
//! [`crate::agent::outcome`], [`crate::agent::departed`]); the one note that a shim writes is here.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};

/// Where the journal is, on a disk that outlives the machine's run.
pub const STATE_DIR: &str = "/var/lib/transship";

/// The folder of one kind of notes.
pub fn dir(kind: &str) -> PathBuf {
    Path::new(STATE_DIR).join(kind)
}

/// Writes a note down; it is on the disk, or what was there before is.
///
/// # Errors
/// No room, or the disk fails.
pub fn write<T: Serialize>(path: &Path, note: &T) -> Result<()> {
    let write = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        // a name of its own for each writer, readable by root only
        let mut staged = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
        staged.write_all(&serde_json::to_vec(note)?)?;
        staged.as_file().sync_all()?;
        staged.persist(path)?;
        // the name too
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Removes a note; fine if there is none.
///
/// # Errors
/// The disk fails.
pub fn remove(path: &Path) -> Result<()> {
    let remove = || match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all(),
    };
    remove().with_context(|| format!("removing {}", path.display()))
}

/// A note; None if there is none, or none that this version understands.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// All notes of a folder.
pub fn all<T: DeserializeOwned>(dir: &Path) -> Vec<T> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|f| f.path());
    files.filter(|p| p.extension().is_some_and(|e| e == "json")).filter_map(|p| read(&p)).collect()
}

/// This run of the machine: what ran, was mounted or made on a tmpfs in another one is gone.
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn committed_path(migration: &str) -> PathBuf {
    // a peer's word became a file's name: it is hexadecimal, which the agent has seen to
    let name: String = migration.chars().filter(char::is_ascii_hexdigit).collect();
    dir("committed").join(name + ".json")
}

/// Notes that the source has committed a migration to this node. Durable before the source hears that the container runs here, for then it
/// deletes its own copy: an agent that finds the container half made after the machine was switched off must not undo it.
///
/// # Errors
/// As [`write`].
pub fn commit(migration: &str) -> Result<()> {
    write(&committed_path(migration), &boot())
}

/// Whether a migration was committed to this node.
pub fn is_committed(migration: &str) -> bool {
    committed_path(migration).exists()
}

/// The arrival is complete, or undone: nobody needs to know any more.
///
/// # Errors
/// As [`remove`].
pub fn forget_commit(migration: &str) -> Result<()> {
    remove(&committed_path(migration))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_whole_or_not_there() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("kind");
        let path = dir.join("a.json");
        write(&path, &vec![1, 2]).unwrap();
        write(&path, &vec![3]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // what another version wrote, and what a writer left that was killed
        fs::write(dir.join("b.json"), b"{").unwrap();
        fs::write(dir.join(".new-x"), b"[4]").unwrap();
        assert_eq!(all::<Vec<u8>>(&dir), [[3]]);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(all::<Vec<u8>>(&dir).is_empty());
    }

    #[test]
    fn a_migrations_name_stays_in_the_folder() {
        assert_eq!(committed_path("../../0af"), dir("committed").join("0af.json"));
    }
}
