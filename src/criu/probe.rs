//! Does this CRIU work on this kernel? `criu check` proves little: it looks good where dumping a connected socket fails.
//! So a small process that holds a connected TCP socket and a connected unix socket is really dumped, in a network namespace of its own.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::dump::DumpFailed;
use super::log::Finding;
use super::options::Limits;
use super::rpc::{CriuOpts, NetworkLock};
use super::version::Criu;

impl Criu {
    /// Dumps a process that holds connected sockets, and throws the images away. `Ok(Err(_))` is CRIU's own first error; `Err` when the
    /// probe itself could not be made (not root, no namespaces).
    pub fn works(&self) -> Result<Result<(), Finding>> {
        let dir = tempfile::tempdir().context("making a directory for the probe's images")?;
        let mut subject = Command::new("sleep");
        subject.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // SAFETY: only system calls between fork and exec; see `hold_sockets`.
        unsafe { subject.pre_exec(hold_sockets) };
        let mut child =
            subject.spawn().context("starting a process with sockets in a network namespace of its own")?;
        let result = self.dump_subject(i32::try_from(child.id()).context("the subject's pid")?, dir.path());
        // Somebody else may have reaped it (the shim's reaper); that it is gone is all we want.
        let _ = child.kill();
        let _ = child.wait();
        match result {
            Ok(()) => Ok(Ok(())),
            Err(e) => match e.downcast::<DumpFailed>() {
                Ok(failed) => Ok(Err(failed.finding)),
                Err(other) => Err(other),
            },
        }
    }

    fn dump_subject(&self, pid: i32, dir: &Path) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let netns = std::fs::metadata(format!("/proc/{pid}/ns/net"))
            .context("the subject's network namespace")?
            .ino();
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
            netns: None,
            path_first: None,
        };
        self.dump(&mut request, &mut |_| Ok(())).map(drop)
    }
}

fn check(n: libc::c_int) -> io::Result<libc::c_int> {
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
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
