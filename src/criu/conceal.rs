//! Has CRIU believe that shared memory is empty, so that it does not hand it over.
//!
//! CRIU takes anonymous shared memory for memfds and writes all their pages, whatever parent images there are (criu/shmem.c: only its
//! own tracking by pagemaps could tell it otherwise, which is off because it misses mappings that come and go). But it asks the kernel
//! where an object has data, by `lseek(SEEK_DATA)`. A seccomp filter on the CRIU process alone hands this one call to us: for an object
//! of the kernel's shared memory file system the answer is "none from here on", and we have the object's file. Everything else goes on
//! as it would (SECCOMP_USER_NOTIF_FLAG_CONTINUE, Linux 5.5).
//!
//! Who has the object sees to its pages: see [`super::dump`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::errno::Errno;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

const RECV: libc::c_ulong = nix::request_code_readwrite!(b'!', 0, size_of::<libc::seccomp_notif>()) as _;
const SEND: libc::c_ulong = nix::request_code_readwrite!(b'!', 1, size_of::<libc::seccomp_notif_resp>()) as _;

/// May CRIU be under such a filter while it dumps these processes? It suspends theirs, and the kernel lets no tracer do that which is
/// under one itself (`ptrace_attach` and `ptrace_setoptions` with PTRACE_O_SUSPEND_SECCOMP, kernel/ptrace.c).
pub fn possible(pids: impl IntoIterator<Item = i32>) -> bool {
    let filtered = |pid: i32| -> io::Result<bool> {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            if is_filtered(&std::fs::read_to_string(thread?.path().join("status"))?) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    // one that ends meanwhile is not dumped
    !pids.into_iter().any(|pid| filtered(pid).unwrap_or(false))
}

/// What a thread's `status` says of seccomp: 0 for none (proc_pid_status(5)). Kernels without it have no such line.
pub(super) fn is_filtered(status: &str) -> bool {
    status.lines().find_map(|l| l.strip_prefix("Seccomp:")).is_some_and(|mode| mode.trim() != "0")
}

/// In a child between fork and exec: from here on `lseek(SEEK_DATA)` waits for whoever has the other end of `socket`. Only system calls,
/// nothing allocates.
///
/// # Errors
/// The kernel cannot do it, or somebody else does it to us already.
pub(super) fn install(socket: RawFd) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let unless = |k: u32, over: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: over,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    // of struct seccomp_data: nr at 0, arch at 4, the third argument at 32 (its lower half)
    let mut filter = [
        statement(load, 4),
        unless(ARCH, 5),
        statement(load, 0),
        unless(libc::SYS_lseek as u32, 3),
        statement(load, 32),
        unless(libc::SEEK_DATA as u32, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter live until the call returns.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    pass(socket, listener as RawFd)
}

/// Sends a descriptor. Only system calls.
fn pass(socket: RawFd, fd: RawFd) -> io::Result<()> {
    #[repr(C)]
    struct Control {
        head: libc::cmsghdr,
        fd: [u8; 8],
    }
    let mut byte = [0u8; 1];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: plain numbers and pointers, for which zeros are fine.
    let (mut control, mut message): (Control, libc::msghdr) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: CMSG_LEN only computes.
    control.head.cmsg_len = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as _;
    control.head.cmsg_level = libc::SOL_SOCKET;
    control.head.cmsg_type = libc::SCM_RIGHTS;
    control.fd[..4].copy_from_slice(&fd.to_ne_bytes());
    message.msg_iov = &mut data;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: everything that the message points to is alive.
    let sent = unsafe { libc::sendmsg(socket, &message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Our end: the worker's questions.
pub(super) struct Questions {
    listener: OwnedFd,
    /// The device of the kernel's own shared memory objects.
    device: u64,
}

impl Questions {
    /// Takes what [`install`] has sent through the other end of `socket`.
    pub fn take(socket: BorrowedFd<'_>) -> Result<Questions> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let mut byte = [0u8; 1];
        let mut data = [io::IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!(RawFd);
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .context("taking over CRIU's questions")?;
        let fds = message.cmsgs()?.find_map(|c| match c {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let fd = fds.context("no descriptor for CRIU's questions")?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let listener = unsafe { OwnedFd::from_raw_fd(fd) };
        let sample = nix::sys::memfd::memfd_create(c"transship", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .context("making a memfd")?;
        let device = File::from(sample).metadata().context("looking at a memfd")?.dev();
        Ok(Questions { listener, device })
    }

    /// Answers one question, when the descriptor is readable; with the truth if nothing is to be concealed. Returns the object that was
    /// concealed, if it was one.
    pub fn answer(&self, conceal: bool) -> Result<Option<File>> {
        // SAFETY: plain numbers; the kernel wants zeros.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes as many bytes as the request's number says.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), RECV as _, &mut asked) } < 0 {
            return match Errno::last() {
                // whoever asked has gone
                Errno::ENOENT | Errno::EINTR => Ok(None),
                e => Err(e).context("reading CRIU's question"),
            };
        }
        let object = conceal.then(|| self.object(asked.pid, asked.data.args[0])).flatten();
        let answer = libc::seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error: if object.is_some() { -libc::ENXIO } else { 0 },
            flags: if object.is_some() { 0 } else { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 },
        };
        // SAFETY: the kernel reads as many bytes as the request's number says.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), SEND as _, &answer) } < 0 {
            return match Errno::last() {
                Errno::ENOENT => Ok(None),
                e => Err(e).context("answering CRIU's question"),
            };
        }
        Ok(object)
    }

    /// The shared memory object that is asked about, if it is one.
    fn object(&self, pid: u32, fd: u64) -> Option<File> {
        let file = File::open(format!("/proc/{pid}/fd/{}", fd as RawFd)).ok()?;
        let meta = file.metadata().ok()?;
        (meta.is_file() && meta.dev() == self.device).then_some(file)
    }
}

impl AsFd for Questions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::unix::fs::FileExt;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    /// A program that asks for the data of an anonymous mapping and of an ordinary file.
    const PROGRAM: &str = "import os, mmap\n\
        m = mmap.mmap(-1, 8192); m[4096] = 1\n\
        line = [l for l in open('/proc/self/maps') if '/dev/zero' in l][-1].split()[0]\n\
        def ask(path):\n    \
            try: return os.lseek(os.open(path, os.O_RDONLY), 0, os.SEEK_DATA)\n    \
            except OSError as e: return -e.errno\n\
        print(ask('/proc/self/map_files/' + line), ask('/proc/self/exe'))";

    #[test]
    fn a_task_under_seccomp_is_seen() {
        assert!(is_filtered("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n") && is_filtered("Seccomp:\t1\n"));
        assert!(!is_filtered("Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n") && !is_filtered("Name:\tx\n"));
        let me = std::process::id() as i32;
        let mine = is_filtered(&std::fs::read_to_string("/proc/self/status").unwrap());
        assert_eq!(possible([me]), !mine);
        let mut command = Command::new("/bin/sleep");
        command.arg("20");
        // SAFETY: only system calls.
        unsafe {
            command.pre_exec(|| {
                let mut filter = [libc::sock_filter {
                    code: (libc::BPF_RET | libc::BPF_K) as u16,
                    jt: 0,
                    jf: 0,
                    k: libc::SECCOMP_RET_ALLOW,
                }];
                let program = libc::sock_fprog { len: 1, filter: filter.as_mut_ptr() };
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            })
        };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return println!("SKIPPED: no seccomp here: {e}"),
        };
        let seen = possible([me, child.id() as i32]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!seen);
    }

    #[test]
    fn shared_memory_seems_empty_and_files_do_not() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/usr/bin/python3").exists() {
            return println!("SKIPPED: needs root and python3");
        }
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = theirs.as_raw_fd();
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", PROGRAM]).stdout(Stdio::piped());
        // SAFETY: only system calls.
        unsafe { command.pre_exec(move || install(socket)) };
        let child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return println!("SKIPPED: no seccomp listener here: {e}"),
        };
        let questions = Questions::take(ours.as_fd()).unwrap();
        let mut found = Vec::new();
        loop {
            let mut fds = [PollFd::new(questions.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, 5000u16).unwrap();
            let events = fds[0].revents().unwrap();
            if !events.contains(PollFlags::POLLIN) {
                break;
            }
            found.extend(questions.answer(true).unwrap());
        }
        let said = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), format!("{} 0", -libc::ENXIO));
        assert_eq!(found.len(), 1);
        let mut byte = [0];
        found[0].read_exact_at(&mut byte, 4096).unwrap();
        assert_eq!(byte, [1]);
    }
}
