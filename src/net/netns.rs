//! Namespaces as descriptors and paths, and work done inside one by a thread of its own.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::{CloneFlags, setns, unshare};

/// Opens the network namespace bound at `path`.
///
/// # Errors
/// When the path does not exist, or is not a namespace (a mount that was lost leaves an ordinary file).
pub fn open(path: &Path) -> Result<OwnedFd> {
    let file = File::open(path).with_context(|| format!("opening network namespace {}", path.display()))?;
    if !is_namespace(&file)? {
        bail!("{} is not a network namespace", path.display());
    }
    Ok(file.into())
}

fn is_namespace(file: &File) -> Result<bool> {
    let stat = nix::sys::statfs::fstatfs(file).context("fstatfs of a namespace file")?;
    Ok(stat.filesystem_type().0 == libc::NSFS_MAGIC)
}

/// Opens the network namespace of a process.
pub fn netns_of_pid(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/net");
    Ok(File::open(&path).with_context(|| format!("opening {path}"))?.into())
}

/// The calling thread's own network namespace.
pub(super) fn current() -> Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net").context("opening /proc/thread-self/ns/net")?.into())
}

/// The namespace's inode number: equal exactly for equal namespaces, while one of them is held open.
pub fn inode(netns: BorrowedFd<'_>) -> Result<u64> {
    let file = File::from(netns.try_clone_to_owned().context("duplicating a namespace descriptor")?);
    Ok(file.metadata().context("stat of a namespace")?.ino())
}

/// Runs `work` on a thread inside `netns`. The calling thread stays where it is.
pub(super) fn inside<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
        work()
    })
}

/// Runs `work` inside a namespace made for it, which vanishes afterwards.
pub(super) fn inside_fresh<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        work()
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)
            .context("starting a thread for a network namespace")?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Makes a network namespace and binds it at `path`, as `ip netns add` does: the directory is made if need be, the
/// file has mode 0444. Returns the namespace.
///
/// # Errors
/// When `path` exists already: it may be somebody else's.
pub(super) fn create(path: &Path) -> Result<OwnedFd> {
    let parent = path.parent().context("a namespace's path needs a directory")?;
    if !parent.exists() {
        // as `ip netns add` makes it: others may look which namespaces there are
        std::fs::create_dir_all(parent)
            .and_then(|()| std::fs::set_permissions(parent, PermissionsExt::from_mode(0o755)))
            .with_context(|| format!("making {}", parent.display()))?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)
        .with_context(|| format!("making {}", path.display()))?;
    let made = inside_fresh(|| {
        let source = Path::new("/proc/thread-self/ns/net");
        nix::mount::mount(Some(source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("binding a network namespace at {}", path.display()))?;
        open(path)
    });
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Undoes [`create`]: unmounts and removes the file. `Ok` when there is nothing.
///
/// # Errors
/// A file with contents is not taken for a lost namespace and stays.
pub(super) fn remove(path: &Path) -> Result<()> {
    loop {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e).with_context(|| format!("opening {}", path.display())),
        };
        if is_namespace(&file)? {
            drop(file);
            nix::mount::umount2(path, MntFlags::MNT_DETACH)
                .with_context(|| format!("unmounting {}", path.display()))?;
            continue;
        }
        let metadata = file.metadata().with_context(|| format!("stat of {}", path.display()))?;
        if !metadata.is_file() || metadata.len() != 0 {
            bail!("{} is not a network namespace and not empty: left alone", path.display());
        }
        return std::fs::remove_file(path).with_context(|| format!("removing {}", path.display()));
    }
}

/// Whether both descriptors are of one namespace.
pub(super) fn same(a: impl AsFd, b: impl AsFd) -> Result<bool> {
    Ok(inode(a.as_fd())? == inode(b.as_fd())?)
}
