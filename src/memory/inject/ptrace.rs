//! The ptrace requests that an injection needs, and the stops a traced task reports. All of one thread: ptrace is bound to the
//! thread that attached, and `__WNOTHREAD` keeps other threads' children out of our waits.

use std::io;
use std::time::{Duration, Instant};

use super::arch::Regs;

/// How a traced task has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// PTRACE_EVENT_STOP: what PTRACE_INTERRUPT asks for, and group stops.
    Trap,
    /// At the entry to or the exit from a system call.
    Syscall,
    /// About to be given this signal.
    Signal(i32),
    /// It has ended.
    Gone,
}

const SYSCALL_BIT: i32 = 0x80; // PTRACE_O_TRACESYSGOOD
const EVENT_STOP: i32 = 128; // PTRACE_EVENT_STOP, linux/ptrace.h
const O_SUSPEND_SECCOMP: usize = 1 << 21; // PTRACE_O_SUSPEND_SECCOMP
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

/// Meaning of a wait status.
pub fn meaning(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone;
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, _) => Stop::Trap,
        (_, signal) if signal == libc::SIGTRAP | SYSCALL_BIT => Stop::Syscall,
        (_, signal) => Stop::Signal(signal),
    }
}

/// A task traced by this thread.
#[derive(Debug)]
pub struct Traced {
    tid: i32,
}

/// # Safety
/// A request that writes through `data`, or reads from there, needs a live buffer of the size that `addr` or the iovec names.
unsafe fn request(what: libc::c_uint, tid: i32, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: the caller's promise; ptrace(2) touches nothing else of this process.
    let r = unsafe { libc::ptrace(what as _, tid, addr, data) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

impl Traced {
    /// Attaches without stopping the task. Its seccomp filter is suspended while we are attached where the kernel allows that
    /// (CAP_SYS_ADMIN): container profiles forbid userfaultfd.
    pub fn seize(tid: i32) -> io::Result<Self> {
        let good = libc::PTRACE_O_TRACESYSGOOD as usize;
        // SAFETY: the request takes numbers only.
        let seize = |options| unsafe { request(libc::PTRACE_SEIZE, tid, 0, options) };
        match seize(good | O_SUSPEND_SECCOMP) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => seize(good)?,
            other => other?,
        };
        Ok(Self { tid })
    }

    /// Asks for a [`Stop::Trap`].
    pub fn interrupt(&self) -> io::Result<()> {
        // SAFETY: the request takes numbers only.
        unsafe { request(libc::PTRACE_INTERRUPT, self.tid, 0, 0) }.map(drop)
    }

    /// Lets it run to the next stop of any kind, giving it `signal` (0: none).
    pub fn go(&self, signal: i32) -> io::Result<()> {
        // SAFETY: the request takes numbers only.
        unsafe { request(libc::PTRACE_CONT, self.tid, 0, signal as usize) }.map(drop)
    }

    /// Lets it run to the next entry or exit of a system call.
    pub fn to_syscall(&self) -> io::Result<()> {
        // SAFETY: the request takes numbers only.
        unsafe { request(libc::PTRACE_SYSCALL, self.tid, 0, 0) }.map(drop)
    }

    /// Lets go of a stopped task.
    pub fn detach(&self) -> io::Result<()> {
        // SAFETY: the request takes numbers only.
        unsafe { request(libc::PTRACE_DETACH, self.tid, 0, 0) }.map(drop)
    }

    /// Its registers; the task must be stopped.
    pub fn regs(&self) -> io::Result<Regs> {
        let mut regs = Regs::default();
        let mut iov = libc::iovec { iov_base: (&raw mut regs).cast(), iov_len: size_of::<Regs>() };
        // SAFETY: writes to `regs` through `iov`, which has its size, and to `iov`; both are alive.
        unsafe {
            request(libc::PTRACE_GETREGSET, self.tid, libc::NT_PRSTATUS as usize, &raw mut iov as usize)
        }?;
        // A 32-bit task gives a shorter set.
        if iov.iov_len == size_of::<Regs>() { Ok(regs) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// Sets its registers; the task must be stopped.
    pub fn set_regs(&self, regs: &Regs) -> io::Result<()> {
        let mut iov = libc::iovec { iov_base: regs as *const Regs as *mut _, iov_len: size_of::<Regs>() };
        // SAFETY: reads `regs` through `iov`, which has its size; both are alive.
        unsafe {
            request(libc::PTRACE_SETREGSET, self.tid, libc::NT_PRSTATUS as usize, &raw mut iov as usize)
        }
        .map(drop)
    }

    /// Where its restartable sequences are announced (address of `struct rseq`); None where it has none or the kernel does not say.
    pub fn rseq(&self) -> Option<u64> {
        let mut config = [0u64; 3]; // struct ptrace_rseq_configuration: address, size and signature, flags
        let size = size_of_val(&config);
        // SAFETY: writes no more than `size` bytes to `config`, which has as many.
        unsafe { request(GET_RSEQ_CONFIGURATION, self.tid, size, config.as_mut_ptr() as usize) }.ok()?;
        (config[0] != 0).then_some(config[0])
    }

    /// The next stop, or None when `until` has passed.
    pub fn wait(&self, until: Instant) -> io::Result<Option<Stop>> {
        let began = Instant::now();
        loop {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let r = unsafe {
                libc::waitpid(self.tid, &mut status, libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD)
            };
            match r {
                0 => {}
                r if r == self.tid => return Ok(Some(meaning(status))),
                _ => {
                    let e = io::Error::last_os_error();
                    match e.raw_os_error() {
                        Some(libc::EINTR) => {}
                        Some(libc::ECHILD) => return Ok(Some(Stop::Gone)),
                        _ => return Err(e),
                    }
                }
            }
            let now = Instant::now();
            if now >= until {
                return Ok(None);
            }
            // A stop takes some microseconds: spin first, then be kind to the other tasks.
            if now - began > Duration::from_micros(100) {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses() {
        let stopped = |event: i32, signal: i32| event << 16 | signal << 8 | 0x7f;
        assert_eq!(meaning(stopped(EVENT_STOP, libc::SIGTRAP)), Stop::Trap);
        assert_eq!(meaning(stopped(EVENT_STOP, libc::SIGSTOP)), Stop::Trap, "a group stop");
        assert_eq!(meaning(stopped(0, libc::SIGTRAP | 0x80)), Stop::Syscall);
        assert_eq!(meaning(stopped(0, libc::SIGTRAP)), Stop::Signal(libc::SIGTRAP));
        assert_eq!(meaning(stopped(0, libc::SIGUSR1)), Stop::Signal(libc::SIGUSR1));
        assert_eq!(meaning(0), Stop::Gone);
        assert_eq!(meaning(9), Stop::Gone);
    }
}
