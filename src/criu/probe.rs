//! Does this CRIU work on this kernel? `criu check` proves little: it looks good where dumping a connected socket fails.
//! So a small process that holds a connected TCP socket and a connected unix socket is really dumped, in a network namespace of its own.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use super::dump::{DumpFailed, Listing};
use super::kdat::Kdat;
use super::log::Finding;
use super::options::Limits;
use super::page_server::{PageEvent, PageSink, page_size};
use super::prepared::{MemoryMode, PreparedDump, Worker};
use super::rpc::{CriuOpts, CriuReq, Features, NetworkLock, ReqType};
use super::swrk::{Spawn, Swrk};
use super::version::Criu;

/// How a dump can treat memory with this CRIU on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryModes {
    /// The best of them.
    pub best: MemoryMode,
    /// The kernel has soft-dirty bits.
    pub soft_dirty: bool,
    /// Why it is not [`MemoryMode::Parent`].
    pub why_not: Option<String>,
}

/// What was found out about a CRIU, once for each process of ours.
static LEARNED: Mutex<Vec<(PathBuf, Kdat)>> = Mutex::new(Vec::new());
static MODES: Mutex<Vec<(PathBuf, MemoryModes)>> = Mutex::new(Vec::new());

impl Criu {
    /// Dumps a process that holds connected sockets, and throws the images away. `Ok(Err(_))` is CRIU's own first error; `Err` when the
    /// probe itself could not be made (not root, no namespaces).
    pub fn works(&self) -> Result<Result<(), Finding>> {
        match self.dump_a_subject(MemoryMode::Full, &mut |_| Ok(())) {
            Ok(()) => Ok(Ok(())),
            Err(e) => match e.downcast::<DumpFailed>() {
                Ok(failed) => Ok(Err(failed.finding)),
                Err(other) => Err(other),
            },
        }
    }

    /// How a dump can treat memory here. The first call of a process tries it on a subject, about 60 ms.
    pub fn memory_modes(&self) -> MemoryModes {
        let known = |modes: &[(PathBuf, MemoryModes)]| {
            modes.iter().find(|(path, _)| *path == self.path).map(|(_, m)| m.clone())
        };
        let mut modes = MODES.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(modes) = known(&modes) {
            return modes;
        }
        let soft_dirty = self.kdat().is_ok_and(|k| k.soft_dirty);
        let why_not = self.try_parent().err().map(|e| format!("{e:#}"));
        let best = if why_not.is_none() { MemoryMode::Parent } else { MemoryMode::Full };
        let found = MemoryModes { best, soft_dirty, why_not };
        modes.push((self.path.clone(), found.clone()));
        found
    }

    /// Whether dumps leave memory to us, so that it goes to the destination's page store. Takes the time of [`Self::memory_modes`].
    pub fn dumps_without_memory(&self) -> bool {
        self.memory_modes().best == MemoryMode::Parent
    }

    /// Has CRIU look at the kernel, if its cache in `/run` is not there or another build's. To be called before a CRIU is started
    /// inside a container's network namespace: part of that look is a connection through the loopback, which a fence drops.
    pub fn warm(&self) -> Result<()> {
        let worker = Swrk::spawn(&self.path, &Spawn::default()).context("starting CRIU")?;
        let features = Some(Features { mem_track: Some(true), ..Features::default() });
        let answer = worker.call(&CriuReq { features, ..CriuReq::new(ReqType::FeatureCheck) }, &mut |_| true);
        worker.finish();
        anyhow::ensure!(answer?.success, "CRIU cannot tell the kernel's features");
        Ok(())
    }

    /// What CRIU knows of the kernel.
    pub(super) fn kdat(&self) -> Result<Kdat> {
        let mut learned = LEARNED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, kdat)) = learned.iter().find(|(path, _)| *path == self.path) {
            return Ok(kdat.clone());
        }
        let kdat = Kdat::learn(&self.path)?;
        learned.push((self.path.clone(), kdat.clone()));
        Ok(kdat)
    }

    /// Does a dump leave memory alone?
    fn try_parent(&self) -> Result<()> {
        let (mut holes, mut bytes) = (0, 0);
        let dumped = self.dump_a_subject(MemoryMode::Parent, &mut |event| {
            match event {
                PageEvent::Hole { pages, .. } => holes += pages,
                PageEvent::Pages { bytes: some, .. } => bytes += some.len(),
                _ => {}
            }
            Ok(())
        });
        dumped.context("a dump without memory")?;
        ensure!(
            left_alone(holes, bytes / page_size()),
            "CRIU copies memory that is in the parent images: {bytes} bytes beside {holes} pages"
        );
        Ok(())
    }

    fn dump_a_subject(&self, memory: MemoryMode, sink: &mut PageSink<'_>) -> Result<()> {
        let dir = tempfile::tempdir().context("making a directory for the probe's images")?;
        let prepared = self.prepare_dump(&Worker { memory, ..Worker::default() })?;
        // The worker may have a mount namespace of its own. A container has one too; a subject without must share the worker's.
        let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", prepared.pid()))
            .context("opening CRIU's mount namespace")?;
        let mut subject = Command::new("sleep");
        subject.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // SAFETY: only system calls between fork and exec; see `hold_sockets`.
        unsafe {
            subject.pre_exec(move || {
                setns(&mounts, CloneFlags::CLONE_NEWNS)?;
                null_stdio()?;
                hold_sockets()
            });
        }
        let mut child =
            subject.spawn().context("starting a process with sockets in a network namespace of its own")?;
        let pid = i32::try_from(child.id()).context("the subject's pid");
        let result = pid.and_then(|pid| {
            wait_until_it_sleeps(pid);
            dump_subject(prepared, pid, dir.path(), sink)
        });
        // Somebody else may have reaped it (the shim's reaper); that it is gone is all we want.
        let _ = child.kill();
        let _ = child.wait();
        result
    }
}

/// Was memory left alone, with so many pages as holes and so many with their bytes? Where soft-dirty bits are real, CRIU brings what
/// it writes itself before it looks: the page of code that it puts a system call into, and what that touches.
fn left_alone(holes: u64, brought: usize) -> bool {
    const ITS_OWN: usize = 4;
    brought <= ITS_OWN && holes > brought as u64
}

/// A program that has just been started writes its memory until it has started; soft-dirty bits that are real would say so. A second
/// is the most that is waited for it.
fn wait_until_it_sleeps(pid: i32) {
    let until = Instant::now() + Duration::from_secs(1);
    let mut quiet = 0;
    while quiet < 3 && Instant::now() < until {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let sleeps = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        quiet = if sleeps { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn dump_subject(prepared: PreparedDump, pid: i32, dir: &Path, sink: &mut PageSink<'_>) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let netns =
        std::fs::metadata(format!("/proc/{pid}/ns/net")).context("the subject's network namespace")?.ino();
    let opts = CriuOpts {
        pid: Some(pid),
        leave_running: Some(true),
        tcp_established: Some(true),
        ext_unix_sk: Some(true),
        external: vec![format!("net[{netns}]:probe")],
        network_lock: Some(NetworkLock::Skip as i32),
        log_level: Some(Limits::default().log_level),
        ..CriuOpts::default()
    };
    let mut request = super::DumpRequest {
        opts,
        images_dir: dir,
        work_dir: dir,
        descriptors: &Default::default(),
        on_post_dump: None,
        on_images: None,
        listing: Listing::Written(&[u64::from(pid.unsigned_abs())]),
        on_shared: None,
    };
    prepared.dump(&mut request, sink).map(drop)
}

fn check(n: libc::c_int) -> io::Result<libc::c_int> {
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
}

/// In the child, before its exec: stdio from the mount namespace that it is in now, and nothing else from where it was before.
fn null_stdio() -> io::Result<()> {
    // SAFETY: plain system calls on a constant string and on numbers.
    unsafe {
        let null = check(libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))?;
        for fd in 0..3 {
            check(libc::dup2(null, fd))?;
        }
        // Linux 5.11; what stays open without it was opened by whoever started us, and seldom is there any
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    Ok(())
}

/// In the child, before its exec: a session and a network namespace of its own, both ends of a TCP connection over its loopback and both ends of
/// a unix pair; all four survive the exec. System calls only, nothing allocates.
fn hold_sockets() -> io::Result<()> {
    // SAFETY: plain system calls on numbers and on structures that live in this frame.
    unsafe {
        check(libc::setsid())?;
        check(libc::unshare(libc::CLONE_NEWNET))?;
        let listener = check(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0))?;
        let mut lo: libc::ifreq = std::mem::zeroed();
        lo.ifr_name[0] = b'l' as libc::c_char;
        lo.ifr_name[1] = b'o' as libc::c_char;
        lo.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(listener, libc::SIOCSIFFLAGS, &raw const lo))?;
        let mut addr: libc::sockaddr_in = std::mem::zeroed();
        addr.sin_family = libc::AF_INET as libc::sa_family_t;
        addr.sin_port = 4242u16.to_be();
        addr.sin_addr.s_addr = u32::from_be_bytes([127, 0, 0, 1]).to_be();
        let size = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        check(libc::bind(listener, (&raw const addr).cast(), size))?;
        check(libc::listen(listener, 1))?;
        let client = check(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0))?;
        check(libc::connect(client, (&raw const addr).cast(), size))?;
        check(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()))?;
        let mut pair = [0; 2];
        check(libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_criu_writes_itself_is_no_memory_copied() {
        assert!(left_alone(60, 0), "no soft-dirty bits: all read as clean");
        assert!(left_alone(60, 1), "the page of its system call");
        assert!(!left_alone(60, 40), "the subject's own");
        assert!(!left_alone(0, 0) && !left_alone(0, 1), "nothing was a hole");
    }
}
