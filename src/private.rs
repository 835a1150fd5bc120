//! What keeps a container's memory, environment and files to root: a process whose memory never gets into a core dump, a umask, and
//! directories and files that nobody else can look into.
//!
//! | what | how | why so |
//! |---|---|---|
//! | core dumps | [`process`]: PR_SET_DUMPABLE 0 | covers every buffer there is, also the small copies on the heap and in threads' stacks that nobody could mark one by one (MADV_DONTDUMP), and dumps that go into a pipe, for which the kernel does not ask RLIMIT_CORE. It ends with an exec: runc, CRIU and the container get neither it nor another limit than they would have had |
//! | files | [`umask_for_root`], [`umask_for_runc`], [`under_private_umask`] | agent, command line, keeper and CRIU's dumps make nothing that others can read. runc makes the container's own mount points, so the shim's umask is an ordinary one, and what the shim writes itself says its mode |
//! | places | [`dir`], [`refuse_shared`] | a directory that somebody else could have made before us is not used |
//!
//! What does not live here: which files there are (`SECURITY.md` has the list), certificates ([`crate::tls`]), encryption
//! ([`crate::migrate::seal`]).

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{Mode, umask};

/// No core dump of this process, whatever its limits and the machine's core_pattern say, and no look at its memory for anybody without
/// CAP_SYS_PTRACE. Lost by an exec, so that what we start is as it would have been.
pub fn process() {
    if let Err(e) = nix::sys::prctl::set_dumpable(false) {
        // a kernel has no reason to; the buffers are worth a line on stderr all the same
        eprintln!("transship: core dumps of this process cannot be switched off: {e}");
    }
}

/// For processes of which nothing is for others: what they make without saying a mode is root's alone.
pub fn umask_for_root() {
    umask(Mode::from_bits_truncate(0o077));
}

/// For the shim, whose umask runc inherits and makes a container's mount points with: nothing that others can write, but otherwise
/// what containerd runs under.
pub fn umask_for_runc() {
    let inherited = umask(Mode::from_bits_truncate(0o022));
    umask(inherited | Mode::from_bits_truncate(0o022));
}

/// A program that writes memory into files: CRIU makes its images and logs with 0644.
pub fn under_private_umask(command: &mut Command) -> &mut Command {
    // SAFETY: umask is async-signal-safe, cannot fail and touches no memory.
    unsafe {
        command.pre_exec(|| {
            libc::umask(0o077);
            Ok(())
        })
    }
}

/// A directory of our own, for root only; made if need be, and narrowed if it was made by something with a laxer umask.
///
/// # Errors
/// There is something else under that name: a link, a file, or a directory that belongs to somebody else.
pub fn dir(path: &Path) -> Result<()> {
    let what = || format!("making {}", path.display());
    DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(what)?;
    let meta = path.symlink_metadata().with_context(what)?;
    ensure!(meta.is_dir(), "{} is not a directory", path.display());
    ensure!(
        meta.uid() == nix::unistd::geteuid().as_raw(),
        "{} belongs to user {}: remove it",
        path.display(),
        meta.uid()
    );
    if meta.mode() & 0o7777 != 0o700 {
        fs::set_permissions(path, Permissions::from_mode(0o700)).with_context(what)?;
    }
    Ok(())
}

/// Refuses a directory, chosen by the operator, in which somebody else could put one of theirs in the place of one of ours. Made, for
/// root only, if it is not there.
///
/// # Errors
/// It belongs to somebody else, or others may write there (and no sticky bit keeps them from what is not theirs).
pub fn refuse_shared(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("making {}", path.display()))?;
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    let writable = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
    ensure!(
        meta.uid() == nix::unistd::geteuid().as_raw() && !writable,
        "{} belongs to user {} and has mode {:04o}: others could exchange what is kept there",
        path.display(),
        meta.uid(),
        meta.mode() & 0o7777
    );
    Ok(())
}

/// A file with this content, for root only; one that is there is replaced, never followed if it is a link.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create(path)?.write_all(bytes)
}

/// An empty file for root only, in the place of what is there; never through a link.
pub fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn a_directory_is_made_and_narrowed_and_never_taken_from_others() {
        let top = tempfile::tempdir().unwrap();
        let ours = top.path().join("a/b");
        dir(&ours).unwrap();
        assert_eq!((mode(&ours), mode(&top.path().join("a"))), (0o700, 0o700));
        fs::set_permissions(&ours, Permissions::from_mode(0o755)).unwrap();
        dir(&ours).unwrap();
        assert_eq!(mode(&ours), 0o700);
        let link = top.path().join("link");
        symlink(&ours, &link).unwrap();
        assert!(dir(&link).unwrap_err().to_string().contains("not a directory"));
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&ours, Some(65534), None).unwrap();
            assert!(dir(&ours).unwrap_err().to_string().contains("65534"));
            assert!(refuse_shared(&ours).unwrap_err().to_string().contains("65534"));
        }
    }

    #[test]
    fn a_place_that_others_may_write_in_is_refused_unless_it_is_sticky() {
        let top = tempfile::tempdir().unwrap();
        let place = top.path().join("images");
        refuse_shared(&place).unwrap();
        assert_eq!(mode(&place), 0o700);
        for (bits, fine) in [(0o755, true), (0o777, false), (0o775, false), (0o1777, true)] {
            fs::set_permissions(&place, Permissions::from_mode(bits)).unwrap();
            assert_eq!(refuse_shared(&place).is_ok(), fine, "{bits:o}");
            assert_eq!(mode(&place), bits, "the operator's own choice stays");
        }
    }

    #[test]
    fn a_file_is_private_whatever_was_there() {
        let top = tempfile::tempdir().unwrap();
        let (path, victim) = (top.path().join("f"), top.path().join("victim"));
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, &path).unwrap();
        write(&path, b"one").unwrap();
        assert_eq!((mode(&path), fs::read_to_string(&victim).unwrap().as_str()), (0o600, "untouched"));
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        write(&path, b"two").unwrap();
        assert_eq!((mode(&path), fs::read(&path).unwrap()), (0o600, b"two".to_vec()));
    }

    #[test]
    fn what_a_dump_writes_is_private() {
        let top = tempfile::tempdir().unwrap();
        let mut touch = Command::new("touch");
        touch.arg("image").current_dir(&top);
        assert!(under_private_umask(&mut touch).status().unwrap().success());
        assert_eq!(mode(&top.path().join("image")), 0o600);
    }

    /// What [`core_dump`] looks for: made at run time, so that it is nowhere but in the buffer.
    fn pattern(seed: u8) -> Vec<u8> {
        (0..32u8).map(|n| n.wrapping_mul(37).wrapping_add(seed)).collect()
    }

    /// Not a test: the process that dies in the next one.
    #[test]
    #[ignore = "run by the next one in a process of its own"]
    fn dies_with_memory_of_a_container() {
        let Ok(how) = std::env::var("TRANSSHIP_TEST_DIES") else { return };
        let limit = nix::sys::resource::RLIM_INFINITY;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, limit, limit).unwrap();
        if how == "private" {
            process();
        }
        let store = pattern(std::process::id() as u8).repeat(4096);
        std::hint::black_box(&store);
        std::process::abort();
    }

    /// Whether a process that died so left its memory in a file; its files go.
    fn core_dump(how: &str) -> bool {
        let top = tempfile::tempdir().unwrap();
        let mut dies = Command::new(std::env::current_exe().unwrap());
        dies.args(["--exact", "--ignored", "private::tests::dies_with_memory_of_a_container"]);
        dies.env("TRANSSHIP_TEST_DIES", how).current_dir(&top);
        dies.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut dies = dies.spawn().unwrap();
        let wanted = pattern(dies.id() as u8);
        assert!(!dies.wait().unwrap().success());
        fs::read_dir(&top).unwrap().flatten().any(|file| {
            let bytes = fs::read(file.path()).unwrap();
            bytes.windows(wanted.len()).any(|w| w == wanted)
        })
    }

    #[test]
    fn a_core_dump_holds_nothing_of_ours() {
        if !core_dump("as usual") {
            println!("SKIP: this machine writes no core dumps into the directory of who dies (core_pattern)");
            return;
        }
        assert!(!core_dump("private"));
    }

    /// Not a test: its process is not the other tests'.
    #[test]
    #[ignore = "run by the next one in a process of its own"]
    fn starts_another_program() {
        let limit = |limits: &str| limits.lines().find(|l| l.contains("core")).map(String::from);
        let before = limit(&fs::read_to_string("/proc/self/limits").unwrap());
        process();
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
        let child = Command::new("cat").arg("/proc/self/limits").output().unwrap();
        let child = limit(&String::from_utf8(child.stdout).unwrap());
        assert!(child.is_some() && child == before, "{child:?} {before:?}");
    }

    #[test]
    fn what_is_started_has_the_limit_that_it_would_have_had() {
        let mut starts = Command::new(std::env::current_exe().unwrap());
        starts.args(["--exact", "--ignored", "private::tests::starts_another_program"]);
        assert!(starts.output().unwrap().status.success());
    }
}
