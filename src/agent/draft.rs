//! A checkpoint file while it is written: under a name of its own, for root only, and under the name that was asked for when it is
//! complete. So nobody takes a part of one for the whole, and nothing that is there already is written into, whatever its mode.

use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// See the module. Dropped, nothing of it is left. If the agent dies meanwhile, `.NAME.XXXXXX.part` stays: with `--stop` it may be all
/// that there is of the container.
pub struct Draft {
    file: NamedTempFile,
    to: PathBuf,
    dir: File,
}

impl Draft {
    /// Beside the file that is meant.
    ///
    /// # Errors
    /// It exists, or its directory does not, or nothing can be made there.
    pub fn begin(to: &Path) -> io::Result<Draft> {
        if to.symlink_metadata().is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let (Some(dir), Some(name)) = (to.parent(), to.file_name()) else {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        };
        let file = tempfile::Builder::new()
            .prefix(&format!(".{}.", name.to_string_lossy()))
            .suffix(".part")
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(dir)?;
        let dir = File::open(dir)?;
        // the only copy of a container that is stopped is under this name for a moment
        dir.sync_all()?;
        Ok(Draft { file, to: to.to_owned(), dir })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    /// It is complete: gives it its name.
    ///
    /// # Errors
    /// Something has got that name meanwhile. The file stays where it is then; the path is in the error.
    pub fn finish(self) -> io::Result<u64> {
        let bytes = self.file.as_file().metadata()?.len();
        self.file.persist_noclobber(&self.to).map_err(|e| {
            let kept = e.file.keep().map(|(_, path)| path);
            let kept = kept.map_or_else(|e| e.to_string(), |path| format!("it is {}", path.display()));
            io::Error::new(e.error.kind(), format!("{}; {kept}", e.error))
        })?;
        self.dir.sync_all()?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::MetadataExt};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().flatten();
        names.map(|f| f.file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn it_has_its_name_when_it_is_complete_and_is_roots_alone_all_the_time() {
        let top = tempfile::tempdir().unwrap();
        let to = top.path().join("c.ckpt");
        let draft = Draft::begin(&to).unwrap();
        let [name] = &names(top.path())[..] else { panic!("one file") };
        assert!(name.starts_with(".c.ckpt.") && name.ends_with(".part"), "{name}");
        assert_eq!(draft.file().metadata().unwrap().mode() & 0o7777, 0o600);
        draft.file().write_all(b"state").unwrap();
        assert_eq!(draft.finish().unwrap(), 5);
        assert_eq!((names(top.path()), fs::read(&to).unwrap()), (vec!["c.ckpt".into()], b"state".to_vec()));
        drop(Draft::begin(&top.path().join("other")).unwrap());
        assert_eq!(names(top.path()).len(), 1, "a draft that came to nothing");
    }

    #[test]
    fn what_is_there_is_never_written_into() {
        let top = tempfile::tempdir().unwrap();
        let to = top.path().join("c.ckpt");
        let draft = Draft::begin(&to).unwrap();
        fs::write(&to, "theirs").unwrap();
        assert_eq!(Draft::begin(&to).err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        draft.file().write_all(b"state").unwrap();
        let error = draft.finish().unwrap_err();
        assert_eq!(
            (error.kind(), fs::read(&to).unwrap()),
            (io::ErrorKind::AlreadyExists, b"theirs".to_vec())
        );
        // it may be the only copy
        let kept = names(top.path()).into_iter().find(|n| n.ends_with(".part")).unwrap();
        assert!(error.to_string().contains(&kept), "{error}");
        let link = top.path().join("link");
        std::os::unix::fs::symlink("/nowhere/at/all", &link).unwrap();
        assert!(Draft::begin(&link).is_err(), "a link is something, wherever it leads");
    }
}
