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
        Fd(libc::AT_FDCWD as usize).open_in(path, flags)
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

    /// The shim that listens under this name in the directory where this process is.
    pub fn connect(name: &[u8]) -> Option<Fd> {
        let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as usize;
        // SAFETY: numbers.
        let socket = unsafe { call(libc::SYS_socket, [libc::AF_UNIX as usize, kind, 0, 0, 0]) }.map(Fd)?;
        // sockaddr_un: the family, and a name that ends with nul
        let mut address = [0; 16];
        let (family, path) = address.split_at_mut(2);
        family.copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        path.split_last_mut()?.1.get_mut(..name.len())?.copy_from_slice(name);
        let args = [socket.0, address.as_ptr().expose_provenance(), 2 + name.len() + 1, 0, 0];
        // SAFETY: an address of as many bytes.
        unsafe { call(libc::SYS_connect, args) }?;
        Some(socket)
    }

    /// Names without a path are in this directory from now on.
    pub fn enter(self) -> Option<()> {
        // SAFETY: a number.
        unsafe { call(libc::SYS_fchdir, [self.0, 0, 0, 0, 0]) }.map(drop)
    }

    /// With each name in a directory but its own and that of the one above, until it says None.
    pub fn each(self, mut with: impl FnMut(&CStr) -> Option<()>) -> Option<()> {
        // inode and offset, the record's length, a type, the name and its nul (getdents64(2))
        const LENGTH: usize = 16;
        const NAME: usize = 19;
        let mut entries = [0; 1024];
        loop {
            let room = [self.0, entries.as_mut_ptr().expose_provenance(), entries.len(), 0, 0];
            // SAFETY: as many bytes as there is room for.
            let filled = unsafe { call(libc::SYS_getdents64, room) }?;
            if filled == 0 {
                return Some(());
            }
            let mut rest = entries.get(..filled)?;
            while !rest.is_empty() {
                let length = u16::from_ne_bytes([*rest.get(LENGTH)?, *rest.get(LENGTH + 1)?]).into();
                let name = CStr::from_bytes_until_nul(rest.get(NAME..length)?).ok()?;
                if name != c"." && name != c".." {
                    with(name)?;
                }
                rest = rest.get(length..)?;
            }
        }
    }

    /// What is known of a name in this directory, or, without one, of the file itself. Links are not followed, here and below.
    pub fn look(self, name: &CStr) -> Option<libc::statx> {
        let mut found = MaybeUninit::<libc::statx>::zeroed();
        let mask = libc::STATX_BASIC_STATS as usize;
        let args = [self.0, text(name), HERE, mask, found.as_mut_ptr().expose_provenance()];
        // SAFETY: a string that ends with nul, numbers, and room for the answer.
        unsafe { call(libc::SYS_statx, args) }?;
        // SAFETY: any bytes are a statx.
        Some(unsafe { found.assume_init() })
    }

    /// Opens what is in this directory, for reading.
    pub fn open_in(self, name: &CStr, flags: i32) -> Option<Fd> {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | flags;
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_openat, [self.0, text(name), flags as usize, 0, 0]) }.map(Fd)
    }

    /// Where a symbolic link leads to, if there is room for that and one byte more.
    pub fn target<'a>(self, name: &CStr, to: &'a mut [u8]) -> Option<&'a [u8]> {
        let args = [self.0, text(name), to.as_mut_ptr().expose_provenance(), to.len(), 0];
        // SAFETY: a string that ends with nul, and as many bytes as there is room for.
        let n = unsafe { call(libc::SYS_readlinkat, args) }?;
        (n < to.len()).then_some(to.get(..n)?)
    }

    /// A directory, nobody else's.
    pub fn make_directory(self, name: &CStr) -> Option<()> {
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_mkdirat, [self.0, text(name), 0o700, 0, 0]) }.map(drop)
    }

    /// A symbolic link.
    pub fn make_symlink(self, name: &CStr, target: &CStr) -> Option<()> {
        // SAFETY: two strings that end with nul, and a number.
        unsafe { call(libc::SYS_symlinkat, [text(target), self.0, text(name), 0, 0]) }.map(drop)
    }

    /// A file, a named pipe or a device, nobody else's.
    pub fn make_node(self, name: &CStr, kind: u32, device: usize) -> Option<()> {
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_mknodat, [self.0, text(name), (kind | 0o600) as usize, device, 0]) }.map(drop)
    }

    /// Gives a name, or the file itself, an owner.
    pub fn own(self, name: &CStr, uid: u32, gid: u32) -> Option<()> {
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_fchownat, [self.0, text(name), uid as usize, gid as usize, HERE]) }.map(drop)
    }

    /// Gives it permissions.
    pub fn permit(self, mode: u32) -> Option<()> {
        // SAFETY: numbers.
        unsafe { call(libc::SYS_fchmod, [self.0, mode as usize, 0, 0, 0]) }.map(drop)
    }

    /// Gives permissions to what is in this directory. The one call that would follow a link.
    pub fn permit_in(self, name: &CStr, mode: u32) -> Option<()> {
        // SAFETY: a string that ends with nul, and numbers.
        unsafe { call(libc::SYS_fchmodat, [self.0, text(name), mode as usize, 0, 0]) }.map(drop)
    }

    /// Gives a name, or the file itself, a time of modification.
    pub fn date(self, name: &CStr, seconds: i64) -> Option<()> {
        let times: [[i64; 2]; 2] = [[0, libc::UTIME_OMIT], [seconds, 0]];
        // the file itself has no string at all, and takes no flags
        let (name, flags) =
            if name.is_empty() { (0, 0) } else { (text(name), libc::AT_SYMLINK_NOFOLLOW as usize) };
        // SAFETY: a string that ends with nul, or none; two pairs of seconds and nanoseconds.
        unsafe { call(libc::SYS_utimensat, [self.0, name, times.as_ptr().expose_provenance(), flags, 0]) }
            .map(drop)
    }
}

/// A name itself, or, if it is empty, the open file.
const HERE: usize = (libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW) as usize;

fn text(name: &CStr) -> usize {
    name.as_ptr().expose_provenance()
}

/// A device's number as the kernel takes it (include/linux/kdev_t.h, new_encode_dev).
pub fn device(major: u32, minor: u32) -> Option<usize> {
    let fits = major < 1 << 12 && minor < 1 << 20;
    fits.then_some(((minor & 0xff) | major << 8 | (minor & !0xff) << 12) as usize)
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
