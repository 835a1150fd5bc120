//! One system call inside a running task, by ptrace: `userfaultfd`, whose descriptor is fetched and closed in the task at once.
//!
//! No memory of the task changes: the call is made from a `syscall` (`svc #0`) instruction that the task already maps, its vdso's
//! if it has one. Registers are put back while the kernel still has the interrupted system call's restart before it, so that call
//! goes on as after a spurious wake-up. Signals that arrive in between are delivered in the task's own context, then it is tried
//! again; a task inside a restartable sequence is left until it is out of it. What is registered on the descriptor is not
//! decided here ([`super::tracker`]).
//!
//! One window remains: if this process is killed in the microseconds in which the task has our registers, the task is lost. The
//! same is true of every tool that injects (CRIU too).

#[cfg(any(target_arch = "aarch64", test))]
mod aarch64;
pub mod helper;
mod ptrace;
#[cfg(any(target_arch = "x86_64", test))]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::maps::mappings;
use crate::cgroup::Freezer;
use arch::Regs;
use ptrace::{Stop, Traced};

/// A task that does not stop within this time is in an uninterruptible sleep (a vfork's parent, a dead NFS server).
const PATIENCE: Duration = Duration::from_millis(300);
/// How often an attempt may be interrupted by signals.
const ATTEMPTS: u32 = 200;
/// linux/userfaultfd.h: faults of user code only; needs no privilege and no sysctl.
const UFFD_USER_MODE_ONLY: u64 = 1;

/// A userfaultfd of the task's memory. Nothing stays in the task. The caller makes the UFFDIO_API handshake.
///
/// Errors: the task is frozen (it cannot run the call), traced by somebody else, 32-bit, does not stop, or has gone.
pub fn userfaultfd(pid: i32) -> Result<OwnedFd> {
    if helper::wanted() { helper::userfaultfd(pid) } else { traced_here(pid) }
}

/// The same by a thread of this process, which must not wait for children that it does not know.
fn traced_here(pid: i32) -> Result<OwnedFd> {
    if Freezer::of_pid(pid).and_then(|f| f.is_frozen()).unwrap_or(false) {
        bail!("task {pid} is in a frozen cgroup: it cannot run a system call");
    }
    let (sender, receiver) = mpsc::channel();
    // A thread of its own: ptrace belongs to a thread, and one that ends lets go of a task that never stopped. It also goes on
    // when the task is frozen by somebody in the middle, until the registers are back.
    std::thread::Builder::new()
        .name("inject".into())
        .spawn(move || drop(sender.send(in_thread(pid))))
        .context("a thread to trace from")?;
    match receiver.recv_timeout(PATIENCE * 10) {
        Ok(result) => result.with_context(|| format!("userfaultfd in task {pid}")),
        Err(_) => bail!("userfaultfd in task {pid}: it did not come back from the call (frozen meanwhile?)"),
    }
}

fn in_thread(pid: i32) -> Result<OwnedFd> {
    let tid = living_thread(pid)?;
    let task = Traced::seize(tid).map_err(|e| match tracer(tid) {
        Some(other) => anyhow!("it is traced by process {other}"),
        None => anyhow!("ptrace: {e}"),
    })?;
    task.interrupt().context("interrupt")?;
    let mut session = Session { task, pid, insn: 0, attempts: 0 };
    let at = session.rest()?;
    let result = session.fetch(at);
    if let Err(e) = &result {
        log::debug!("userfaultfd in task {pid}: {e:#}");
    }
    result
}

struct Session {
    task: Traced,
    pid: i32,
    /// Found at each rest: an exec before it takes the mappings along.
    insn: u64,
    attempts: u32,
}

/// A stop from which the task can be sent elsewhere and back, and its registers there.
struct Rest(Box<Regs>);

/// Where an injected call has led.
enum Called {
    /// At its exit.
    Returned(i64),
    /// A signal came first: it was delivered, and the task is at rest again.
    Again(Rest),
}

impl Session {
    /// Waits for the stop that `interrupt` asked for.
    fn rest(&mut self) -> Result<Rest> {
        loop {
            match self.task.wait(Instant::now() + PATIENCE).context("waiting for it to stop")? {
                None if Freezer::of_pid(self.pid).and_then(|f| f.is_frozen()).unwrap_or(false) => {
                    bail!("it is in a frozen cgroup: it cannot run a system call")
                }
                None => bail!("it does not stop (uninterruptible sleep)"),
                Some(Stop::Gone) => bail!("it has ended"),
                Some(Stop::Signal(signal)) => self.task.go(signal).context("delivering a signal")?,
                Some(Stop::Syscall) => self.task.go(0).context("leaving a system call")?,
                Some(Stop::Trap) => {
                    let regs = self.task.regs().context("registers (a 32-bit task?)")?;
                    if !regs.fits() {
                        self.task.detach().context("detach")?;
                        bail!("it runs code of another architecture");
                    }
                    let memory = File::open(format!("/proc/{}/mem", self.pid)).context("its memory")?;
                    if !self.in_sequence(&memory, regs.ip()) {
                        self.insn = instruction(self.pid, &memory)?;
                        return Ok(Rest(Box::new(regs)));
                    }
                    self.again()?;
                    self.task.interrupt().context("interrupt")?;
                    self.task.go(0).context("leaving a restartable sequence")?;
                }
            }
        }
    }

    fn again(&mut self) -> Result<()> {
        self.attempts += 1;
        if self.attempts > ATTEMPTS {
            self.task.detach().context("detach")?;
            bail!("interrupted {ATTEMPTS} times");
        }
        Ok(())
    }

    /// Is the task inside a restartable sequence (rseq(2))? With the instruction pointer elsewhere the kernel would forget it,
    /// and the sequence would go on as if nobody else had run.
    fn in_sequence(&self, memory: &File, ip: u64) -> bool {
        let Some(at) = self.task.rseq() else { return false };
        let read = |at: u64| -> Option<u64> {
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, at).ok()?;
            Some(u64::from_le_bytes(word))
        };
        // struct rseq: cpu_id_start, cpu_id (u32 each), rseq_cs. struct rseq_cs: version, flags (u32 each), start_ip, length, abort_ip.
        let inside = || {
            let descriptor = read(at + 8).filter(|d| *d != 0)?;
            let (start, length) = (read(descriptor + 8)?, read(descriptor + 16)?);
            Some(ip.wrapping_sub(start) < length)
        };
        inside().unwrap_or(false)
    }

    /// Makes the task, whose own registers are `saved`, call `nr`.
    fn call(&mut self, saved: &Regs, nr: i64, args: [u64; 3]) -> Result<Called> {
        self.task.set_regs(&saved.calling(self.insn, nr as u64, args)).context("setting registers")?;
        self.task.to_syscall().context("starting the call")?;
        match self.certain_stop()? {
            Stop::Syscall => {}
            other => return self.astray(saved, other),
        }
        self.task.to_syscall().context("running the call")?;
        match self.certain_stop()? {
            Stop::Syscall => {}
            other => return self.astray(saved, other),
        }
        let regs = self.task.regs().context("reading the result")?;
        if regs.ip() != Regs::after(self.insn) {
            bail!("it is at {:#x} after the call", regs.ip()); // cannot be: nothing else runs in it
        }
        Ok(Called::Returned(regs.result()))
    }

    /// Another stop than the call's: back to its own registers, and the signal gets its due.
    fn astray(&mut self, saved: &Regs, stop: Stop) -> Result<Called> {
        let signal = match stop {
            // A fault of our own making: the instruction has just been unmapped by another thread.
            Stop::Signal(libc::SIGSEGV | libc::SIGBUS | libc::SIGILL)
                if self.task.regs().is_ok_and(|r| r.ip() == self.insn) =>
            {
                0
            }
            Stop::Signal(signal) => signal,
            Stop::Gone => bail!("it was killed"),
            Stop::Trap | Stop::Syscall => 0,
        };
        self.task.set_regs(saved).context("putting registers back")?;
        self.again()?;
        self.task.interrupt().context("interrupt")?;
        self.task.go(signal).context("delivering a signal")?;
        Ok(Called::Again(self.rest()?))
    }

    /// The next stop of a task that has our registers: there is no giving up before they are its own again.
    fn certain_stop(&self) -> Result<Stop> {
        loop {
            if let Some(stop) =
                self.task.wait(Instant::now() + Duration::from_secs(1)).context("waiting for the call")?
            {
                return Ok(stop);
            }
            // Frozen in the middle: on cgroup v2 this stop comes before the freezer's; on v1 when it is thawed.
            self.task.interrupt().context("interrupt")?;
        }
    }

    fn fetch(&mut self, mut at: Rest) -> Result<OwnedFd> {
        let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | UFFD_USER_MODE_ONLY;
        let number = loop {
            match self.call(&at.0, libc::SYS_userfaultfd, [flags, 0, 0])? {
                Called::Returned(r) => break r,
                Called::Again(rest) => at = rest,
            }
        };
        if number < 0 {
            self.leave(&at.0)?;
            return Err(std::io::Error::from_raw_os_error(-number as i32)).context("the call");
        }
        let fetched = descriptor(self.pid, number as i32);
        loop {
            match self.call(&at.0, libc::SYS_close, [number as u64, 0, 0])? {
                Called::Returned(0) => break,
                Called::Returned(e) => log::warn!("task {}: close of our userfaultfd gave {e}", self.pid),
                Called::Again(rest) => at = rest,
            }
        }
        self.leave(&at.0)?;
        fetched
    }

    /// From a call's exit to the task's own registers. Not from the exit itself: the kernel restarts an interrupted call only on
    /// its way out of signal handling, so one more trap there is asked for first.
    fn leave(&mut self, saved: &Regs) -> Result<()> {
        self.task.interrupt().context("interrupt")?;
        self.task.go(0).context("leaving the call")?;
        let stop = self.certain_stop()?;
        if stop == Stop::Gone {
            bail!("it was killed");
        }
        self.task.set_regs(saved).context("putting registers back")?;
        if let Stop::Signal(signal) = stop {
            // Before the trap: it is delivered on the way out.
            self.task.go(signal).context("delivering a signal")?;
            self.rest().map(drop)?;
        }
        self.task.detach().context("detach")
    }
}

/// The task's descriptor `number` as one of ours.
fn descriptor(pid: i32, number: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers; a fresh descriptor comes back.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if pidfd < 0 {
        return Err(std::io::Error::last_os_error()).context("pidfd_open");
    }
    // SAFETY: `pidfd_open` has just given it to us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    // SAFETY: no pointers; a fresh descriptor comes back.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("pidfd_getfd");
    }
    // SAFETY: `pidfd_getfd` has just given it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The leader, or another thread of the group where the leader has ended before the rest.
fn living_thread(pid: i32) -> Result<i32> {
    if state(&format!("/proc/{pid}/stat")).is_some_and(|s| !matches!(s, 'Z' | 'X')) {
        return Ok(pid);
    }
    let dir = format!("/proc/{pid}/task");
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {dir}"))? {
        let path = entry.with_context(|| format!("reading {dir}"))?.path();
        if let Some(tid) = path.file_name().and_then(|n| n.to_str()?.parse().ok())
            && state(&format!("{}/stat", path.display())).is_some_and(|s| !matches!(s, 'Z' | 'X'))
        {
            return Ok(tid);
        }
    }
    bail!("it has ended")
}

/// The letter after the name in /proc/.../stat.
fn state(path: &str) -> Option<char> {
    let text = fs::read_to_string(path).ok()?;
    crate::procstat::field(&text, 3)
}

/// Who traces the task already?
fn tracer(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let pid = status.lines().find_map(|l| l.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
    (pid != 0).then_some(pid)
}

/// Where the task has a system call instruction: in its vdso, or else in any executable mapping.
fn instruction(pid: i32, memory: &File) -> Result<u64> {
    let mut maps: Vec<_> =
        mappings(pid)?.into_iter().filter(|m| m.exec && m.read && m.name != "[vsyscall]").collect();
    maps.sort_by_key(|m| m.name != "[vdso]");
    let mut buffer = vec![0; 1 << 20];
    for map in maps {
        let mut at = map.range.start;
        while at < map.range.end {
            let want = (map.range.end - at).min(buffer.len() as u64) as usize;
            let Ok(n) = memory.read_at(&mut buffer[..want], at) else { break };
            if let Some(i) = find(&buffer[..n]) {
                return Ok(at + i);
            }
            if n == 0 {
                break;
            }
            at += n as u64;
        }
    }
    bail!("it maps no system call instruction")
}

fn find(code: &[u8]) -> Option<u64> {
    code.windows(arch::INSN.len())
        .enumerate()
        .find(|(i, w)| *w == arch::INSN && (*i as u64).is_multiple_of(arch::ALIGN))
        .map(|(i, _)| i as u64)
}

#[cfg(test)]
mod tests;
