//! What a mapping means for a migration: pure decisions from a line of /proc/PID/maps.

use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use crate::memory::maps::Mapping;

/// What is to be done about a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// CRIU does not dump its pages, or they are somebody else's business (files, /dev/shm).
    Skip,
    /// Private memory; `file`: of a file, whose own pages do not count.
    Private {
        /// Backed by a file.
        file: bool,
    },
    /// Anonymous shared memory, a memfd or a SysV segment, by CRIU's number for it.
    Shared {
        /// CRIU's `shmid`.
        shmid: u64,
    },
}

/// Decides. `shmem` is the device of the kernel's own tmpfs ([`shmem_device`]).
///
/// - vvar and vsyscall are the kernel's; the vdso is dumped by CRIU whole and never changes.
/// - CRIU's number (criu/proc_parse.c, handle_vma; criu/memfd.c, dump_memfd_inode): for anonymous shared memory, which CRIU 4.2
///   treats as a memfd, the low 32 bits of the inode number; for a SysV segment the inode number, which is the segment's id.
/// - A memfd has the same number as anonymous shared memory, which CRIU restores as one: after a move the two cannot be told apart.
///   write(2) and mappings of tasks that hold only a descriptor change it behind every mapping that we could watch; like everything
///   that no tracker sees of shared memory, that is found by its content in the freeze.
/// - An AIO ring is written by the kernel and is left out.
pub fn class(m: &Mapping, shmem: (u32, u32)) -> Class {
    match m.name.as_str() {
        "[vsyscall]" | "[vectors]" | "[vdso]" | "[uprobes]" => return Class::Skip,
        name if name.starts_with("[vvar") => return Class::Skip,
        _ => {}
    }
    if !m.shared {
        return Class::Private { file: m.inode != 0 };
    }
    if m.dev != shmem {
        return Class::Skip;
    }
    if m.name.starts_with("/SYSV") {
        Class::Shared { shmid: m.inode }
    } else if m.name.starts_with("/dev/zero") || m.name.starts_with("/memfd:") {
        Class::Shared { shmid: m.inode & 0xffff_ffff }
    } else {
        Class::Skip
    }
}

/// The device of the kernel's internal tmpfs, where anonymous shared memory, SysV segments and memfds live.
pub fn shmem_device() -> (u32, u32) {
    static DEVICE: OnceLock<(u32, u32)> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let device = nix::sys::memfd::memfd_create(c"transship", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .and_then(|fd| nix::sys::stat::fstat(&fd).map(|s| (fd.as_raw_fd(), s.st_dev)))
            .map_or(0, |(_, dev)| dev);
        (libc::major(device), libc::minor(device))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(name: &str, shared: bool, inode: u64) -> Mapping {
        let dev = if inode == 0 { (0, 0) } else { (0, 1) };
        Mapping {
            range: 0..4096,
            read: true,
            write: true,
            exec: false,
            shared,
            offset: 0,
            dev,
            inode,
            name: name.into(),
        }
    }

    #[test]
    fn which_memory_is_ours() {
        let of = |name: &str, shared, inode| class(&mapping(name, shared, inode), (0, 1));
        assert_eq!(of("", false, 0), Class::Private { file: false });
        assert_eq!(of("[heap]", false, 0), Class::Private { file: false });
        assert_eq!(of("[anon:glibc: malloc]", false, 0), Class::Private { file: false });
        assert_eq!(of("/usr/lib/libc.so.6", false, 9), Class::Private { file: true });
        for name in ["[vvar]", "[vvar_vclock]", "[vsyscall]", "[vdso]"] {
            assert_eq!(of(name, false, 0), Class::Skip, "{name}");
        }
        assert_eq!(of("/dev/zero (deleted)", true, 0x1_0000_0007), Class::Shared { shmid: 7 });
        assert_eq!(of("/SYSV00000000 (deleted)", true, 3), Class::Shared { shmid: 3 });
        assert_eq!(of("/memfd:x (deleted)", true, 8), Class::Shared { shmid: 8 });
        assert_eq!(of("/[aio] (deleted)", true, 8), Class::Skip);
        assert_eq!(
            class(&mapping("/dev/zero (deleted)", true, 5), (0, 2)),
            Class::Skip,
            "a file of that name"
        );
    }
}
