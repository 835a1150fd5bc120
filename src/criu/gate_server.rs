//! The shim's side of the gates: one restore, held at two places by [`super::gate`].
//!
//! ```text
//!   GateServer::prepare      runc restore ...
//!   wait_restore      <----  `criu` gate: runc's own work is done
//!   open_restore      ---->  CRIU restores
//!   wait_restored     <----  `action` gate: the tasks exist, complete, and have not run
//!   open_run / refuse ---->  they run / CRIU kills them
//! ```
//!
//! Running runc and CRIU is the caller's. A server that is dropped before [`GateServer::open_run`] refuses.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::gate::{ACTION, ANSWER, At, CGROUP, CRIU, GO, Go, Hello, REAL_CRIU, SOCKET, via_fd};
use super::options::MASKED_FILE;
use crate::private;
use crate::program::Programs;

/// Name of the gate's directory in the bundle.
pub const DIR: &str = "gate";
/// Name of the CRIU configuration in the bundle; the annotation `org.criu.config` has to name it by its full path.
pub const CRIU_CONF: &str = "criu.conf";
/// The annotation by which runc finds the configuration.
pub const CRIU_CONF_ANNOTATION: &str = "org.criu.config";

/// Has CRIU enter a cgroup before it restores, so that tasks whose images name no cgroups are born in it. runc does that itself;
/// crun does not. `gates` is [`GateServer::dir`]; `path` is the spec's `cgroupsPath`, which counts where crun does not show another.
pub fn enter_cgroup(gates: &Path, path: &str) -> Result<()> {
    let file = gates.join(CGROUP);
    private::write(&file, path.as_bytes()).with_context(|| format!("writing {}", file.display()))
}

/// Until when to wait, and what ends the waiting early.
pub struct Wait<'a> {
    /// Latest moment.
    pub until: Instant,
    /// Readable when waiting has become pointless: a pidfd of runc.
    pub or_end_of: Option<BorrowedFd<'a>>,
}

impl Wait<'_> {
    /// Waits this long and watches nothing.
    pub fn at_most(time: Duration) -> Self {
        Self { until: Instant::now() + time, or_end_of: None }
    }
}

/// With what CRIU starts when the first gate opens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening<'a> {
    /// Inside this network namespace: only for a dump that was made inside its counterpart.
    pub netns: Option<&'a Path>,
    /// With lazy pages: CRIU connects to `lazy-pages.socket` in its work directory at once, so the page daemon listens there by now.
    /// runc need not know of it. Transparent huge pages are off during the restore: in a mapping with pages of both kinds a huge page
    /// would cover lazy pages too, which then would never fault.
    pub lazy_pages: bool,
    /// With this directory first in PATH (a faster `tar`).
    pub path_first: Option<&'a Path>,
    /// With this log level instead of runc's 4.
    pub log_level: Option<u8>,
}

/// The gates of one restore.
pub struct GateServer {
    dir: PathBuf,
    conf: String,
    listener: UnixListener,
    held: Option<UnixStream>,
    answered: bool,
}

impl GateServer {
    /// Makes `<bundle>/gate/` and `<bundle>/criu.conf` and listens. The main of `programs.full` calls
    /// [`super::gate::main_if_invoked`]. `conf` is further lines of CRIU's configuration. Leftovers of an earlier restore are replaced.
    pub fn prepare(bundle: &Path, programs: &Programs, criu: &Path, conf: &str) -> Result<Self> {
        let dir = bundle.join(DIR);
        remove(bundle)?;
        let make = || -> std::io::Result<PathBuf> {
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
            symlink(&programs.full, dir.join(CRIU))?;
            private::write(&dir.join(REAL_CRIU), criu.as_os_str().as_encoded_bytes())?;
            programs.named(&dir, ACTION)
        };
        let action = make().with_context(|| format!("making the gates in {}", dir.display()))?;
        // CRIU splits values at white space: quote. Our dumps name masked files as runc's do; crun's restore names them by their paths.
        let conf = format!(
            "{conf}\naction-script \"{}\"\nexternal mnt[{MASKED_FILE}]:{MASKED_FILE}\n",
            action.display()
        );
        write_conf(&dir, &conf)?;
        // Bundle paths may be longer than a socket's address: the directory is named by a descriptor.
        let at = fs::File::open(&dir).with_context(|| format!("opening {}", dir.display()))?;
        let listener = UnixListener::bind(via_fd(at.as_fd(), SOCKET)).context("binding the gates' socket")?;
        listener.set_nonblocking(true).context("the gates' socket")?;
        Ok(Self { dir, conf, listener, held: None, answered: false })
    }

    /// The directory to put first in runc's PATH.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until runc has done its own work and CRIU's restore would begin.
    pub fn wait_restore(&mut self, wait: &Wait<'_>) -> Result<()> {
        self.accept(At::Restore, wait)
    }

    /// Whether the restore has reached this gate after at most `time`; any number of calls may be needed.
    pub fn reached(&mut self, at: At, time: Duration) -> Result<bool> {
        if self.held.is_some() {
            return Ok(true);
        }
        self.accept_until(at, &Wait::at_most(time))
    }

    /// Lets CRIU restore.
    pub fn open_restore(&mut self) -> Result<()> {
        self.open_restore_with(&Opening::default())
    }

    /// Lets CRIU restore, inside this network namespace.
    pub fn open_restore_in(&mut self, netns: &Path) -> Result<()> {
        self.open_restore_with(&Opening { netns: Some(netns), ..Opening::default() })
    }

    /// Lets CRIU restore in this way.
    pub fn open_restore_with(&mut self, how: &Opening<'_>) -> Result<()> {
        // CRIU reads it when it looks at runc's request, which is after this gate; what it says wins over the request.
        let mut conf = self.conf.clone();
        if how.lazy_pages {
            conf += "lazy-pages\n";
        }
        if let Some(level) = how.log_level {
            conf += &format!("verbosity {level}\n");
        }
        if conf != self.conf {
            write_conf(&self.dir, &conf)?;
        }
        self.reply(&Go {
            go: true,
            netns: how.netns.map(Path::to_owned),
            path_first: how.path_first.map(Path::to_owned),
            small_pages: how.lazy_pages,
        })
    }

    /// Waits until the tasks are complete. They have not run.
    pub fn wait_restored(&mut self, wait: &Wait<'_>) -> Result<()> {
        self.accept(At::PostRestore, wait)
    }

    /// The pid of the gate that is held now: CRIU itself, or the script that it runs.
    pub fn held_by(&self) -> Option<i32> {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
        Some(getsockopt(self.held.as_ref()?, PeerCredentials).ok()?.pid())
    }

    /// Lets the tasks run.
    pub fn open_run(&mut self) -> Result<()> {
        self.final_answer(true)?;
        self.reply(&Go { go: true, ..Go::default() })
    }

    /// Has the restore fail, at whichever gate it is held or arrives later; CRIU kills the tasks if there are any.
    pub fn refuse(&mut self) -> Result<()> {
        self.final_answer(false)?;
        match self.held {
            Some(_) => self.reply(&Go::default()),
            None => Ok(()),
        }
    }

    fn final_answer(&mut self, go: bool) -> Result<()> {
        // For whoever comes later: CRIU runs each action script twice, and a gate may arrive after a refusal.
        let path = self.dir.join(ANSWER);
        let temporary = self.dir.join("answer.new");
        let write = private::write(&temporary, if go { GO } else { b"abort" })
            .and_then(|()| fs::rename(&temporary, &path));
        write.with_context(|| format!("writing {}", path.display()))?;
        self.answered = true;
        Ok(())
    }

    fn reply(&mut self, answer: &Go) -> Result<()> {
        let mut held = self.held.take().context("no restore is held at a gate")?;
        let mut line = serde_json::to_vec(answer).context("encoding a gate's answer")?;
        line.push(b'\n');
        held.write_all(&line).context("answering a gate")
    }

    fn accept(&mut self, at: At, wait: &Wait<'_>) -> Result<()> {
        ensure!(self.accept_until(at, wait)?, "the restore did not reach {at:?} in time");
        Ok(())
    }

    /// False when the time is over.
    fn accept_until(&mut self, at: At, wait: &Wait<'_>) -> Result<bool> {
        ensure!(self.held.is_none(), "the restore is still held at the gate before");
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) =>
                {
                    if !self.sleep(at, wait)? {
                        return Ok(false);
                    }
                    continue;
                }
                Err(e) => return Err(e).context("waiting at the gates"),
            };
            stream.set_nonblocking(false).context("a gate's connection")?;
            // A gate says its line at once.
            stream.set_read_timeout(Some(Duration::from_secs(5))).context("a gate's connection")?;
            let mut line = String::new();
            let limited = std::io::Read::take(&stream, 4096);
            BufReader::new(limited).read_line(&mut line).context("reading from a gate")?;
            let hello: Hello =
                serde_json::from_str(&line).with_context(|| format!("a gate says {line:?}"))?;
            ensure!(hello.at == at, "the restore is at {:?} when {at:?} was expected", hello.at);
            self.held = Some(stream);
            return Ok(true);
        }
    }

    fn sleep(&self, at: At, wait: &Wait<'_>) -> Result<bool> {
        let left = wait.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(wait.or_end_of.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting at the gates"),
        }
        let ready = |i: usize| fds.get(i).is_some_and(|f| f.any().unwrap_or(false));
        if ready(1) && !ready(0) {
            bail!("runc ended before its restore reached {at:?}");
        }
        Ok(true)
    }
}

impl Drop for GateServer {
    fn drop(&mut self) {
        if !self.answered {
            let _ = self.final_answer(false);
        }
        // A connection that was never answered reads EOF, which is a refusal.
    }
}

/// The gates' directory is in the bundle.
fn write_conf(gates: &Path, conf: &str) -> Result<()> {
    let path = gates.with_file_name(CRIU_CONF);
    private::write(&path, conf.as_bytes()).with_context(|| format!("writing {}", path.display()))
}

/// Removes the gates of a bundle. Fine when there are none. Not before runc has ended.
pub fn remove(bundle: &Path) -> Result<()> {
    let dir = bundle.join(DIR);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// A descriptor that becomes readable when the process ends, for [`Wait::or_end_of`].
pub fn pidfd(pid: i32) -> Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: pidfd_open takes a pid and flags and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    ensure!(fd >= 0, "pidfd of {pid}: {}", std::io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).context("a pidfd")?) };
    debug_assert!(fd.as_raw_fd() >= 0);
    Ok(fd)
}
