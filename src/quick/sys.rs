//! The system calls that are needed, made by hand.

use core::ffi::{CStr, c_char};
use core::mem::MaybeUninit;

/// # Safety
/// That of the call.
unsafe fn call(number: libc::c_long, args: [usize; 5]) -> Option<usize> {
    let [a, b, c, d, e] = args;
    let result: isize;
    // SAFETY: the kernel's convention; it changes nothing but the result and, on x86_64, rcx and r11.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    // SAFETY: the same.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        core::arch::asm!(
            "svc #0",
            in("x8") number,
            inlateout("x0") a as isize => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            options(nostack),
        );
    }
    usize::try_from(result).ok()
}

/// An open file. Never closed: the process ends soon.
#[derive(Clone, Copy)]
pub struct Fd(usize);

/// Where archives are read.
pub const STDIN: Fd = Fd(0);
/// Where they go.
pub const STDOUT: Fd = Fd(1);
/// For the one message.
pub const STDERR: Fd = Fd(2);

impl Fd {
    /// For reading.
    pub fn open(path: &CStr, flags: i32) -> Option<Fd> {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | flags;
        let args = [libc::AT_FDCWD as usize, path.as_ptr().expose_provenance(), flags as usize, 0, 0];
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_openat, args) }.map(Fd)
    }

    /// Bytes that were read.
    pub fn read(self, to: &mut [u8]) -> Option<usize> {
        // SAFETY: as many bytes as there is room for.
        unsafe { call(libc::SYS_read, [self.0, to.as_mut_ptr().expose_provenance(), to.len(), 0, 0]) }
    }

    /// The same from a place, which is not moved.
    pub fn read_at(self, to: &mut [u8], at: usize) -> Option<usize> {
        // SAFETY: as many bytes as there is room for.
        unsafe { call(libc::SYS_pread64, [self.0, to.as_mut_ptr().expose_provenance(), to.len(), at, 0]) }
    }

    /// Where the next byte would be read.
    pub fn position(self) -> Option<usize> {
        // SAFETY: numbers.
        unsafe { call(libc::SYS_lseek, [self.0, 0, libc::SEEK_CUR as usize, 0, 0]) }
    }

    /// All of it.
    pub fn write(self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            // SAFETY: as many bytes as there are.
            let n = unsafe {
                call(libc::SYS_write, [self.0, bytes.as_ptr().expose_provenance(), bytes.len(), 0, 0])
            }?;
            bytes = bytes.get(n..)?;
        }
        Some(())
    }

    /// Entries of a directory as the kernel has them: the bytes that were filled.
    pub fn entries(self, to: &mut [u8]) -> Option<usize> {
        // SAFETY: as many bytes as there is room for.
        unsafe { call(libc::SYS_getdents64, [self.0, to.as_mut_ptr().expose_provenance(), to.len(), 0, 0]) }
    }

    /// What is known of it.
    pub fn look(self) -> Option<libc::statx> {
        let mut found = MaybeUninit::<libc::statx>::zeroed();
        let mask = libc::STATX_BASIC_STATS as usize;
        let args = [
            self.0,
            c"".as_ptr().expose_provenance(),
            libc::AT_EMPTY_PATH as usize,
            mask,
            found.as_mut_ptr().expose_provenance(),
        ];
        // SAFETY: an empty string, numbers, and room for the answer.
        unsafe { call(libc::SYS_statx, args) }?;
        // SAFETY: any bytes are a statx.
        Some(unsafe { found.assume_init() })
    }

    /// Gives it an owner.
    pub fn own(self, uid: u32, gid: u32) -> Option<()> {
        let args = [
            self.0,
            c"".as_ptr().expose_provenance(),
            uid as usize,
            gid as usize,
            libc::AT_EMPTY_PATH as usize,
        ];
        // SAFETY: an empty string and numbers.
        unsafe { call(libc::SYS_fchownat, args) }.map(drop)
    }

    /// Gives it permissions.
    pub fn permit(self, mode: u32) -> Option<()> {
        // SAFETY: numbers.
        unsafe { call(libc::SYS_fchmod, [self.0, mode as usize, 0, 0, 0]) }.map(drop)
    }

    /// Gives it a time of modification.
    pub fn date(self, seconds: i64) -> Option<()> {
        let times: [[i64; 2]; 2] = [[0, libc::UTIME_OMIT], [seconds, 0]];
        // SAFETY: no string is the file itself; two pairs of seconds and nanoseconds.
        unsafe { call(libc::SYS_utimensat, [self.0, 0, times.as_ptr().expose_provenance(), 0, 0]) }.map(drop)
    }
}

/// Becomes another program. Returns if it cannot.
///
/// # Safety
/// The vectors are those that this process was started with.
pub unsafe fn become_program(path: &CStr, argv: *const *const c_char, envp: *const *const c_char) {
    let args = [path.as_ptr().expose_provenance(), argv.expose_provenance(), envp.expose_provenance(), 0, 0];
    // SAFETY: a string that ends with nul; the vectors by the caller's word.
    unsafe { call(libc::SYS_execve, args) };
}

/// Ends the process.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: a number.
        unsafe { call(libc::SYS_exit_group, [status.into(), 0, 0, 0, 0]) };
    }
}
