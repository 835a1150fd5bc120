//! Numbers of system calls by the ABIs of a processor, as libseccomp names them.

/// The bit of x32's numbers.
const X32: u32 = 1 << 30;
/// Behind any that there is (469, x32's own end at 547), with room for years of new ones. What the kernel has no function for is no danger,
/// whatever a filter says.
const MOST: u32 = 640;

/// One way in which a program can call the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of processors")]
pub(super) enum Abi {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

/// Those of this processor, its own first. None: their system calls are not known here.
pub(super) const HERE: &[Abi] = if cfg!(target_arch = "x86_64") {
    &[Abi::X86_64, Abi::X32, Abi::X86]
} else if cfg!(target_arch = "aarch64") {
    &[Abi::Aarch64, Abi::Arm]
} else {
    &[]
};

/// x32's own, from 512 on.
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

/// The first of ARM's private ones.
const ARM_PRIVATE: u32 = 0xf_0001;
const ARM_OWN: [&str; 6] = ["breakpoint", "cacheflush", "usr26", "usr32", "set_tls", "get_tls"];

/// What goes through `socketcall` on 32-bit x86 as well.
const SOCKETCALL: &[&str] = &[
    "socketcall",
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// What goes through `ipc` there.
const IPC: &[&str] = &[
    "ipc",
    "semop",
    "semget",
    "semctl",
    "semtimedop",
    "msgsnd",
    "msgrcv",
    "msgget",
    "msgctl",
    "shmat",
    "shmdt",
    "shmget",
    "shmctl",
];

impl Abi {
    /// Its number in `seccomp_data`.
    pub fn audit(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::X32 => 0xc000_003e,
            Abi::X86 => 0x4000_0003,
            Abi::Aarch64 => 0xc000_00b7,
            Abi::Arm => 0x4000_0028,
        }
    }

    /// A spec's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Abi::X86_64 => "SCMP_ARCH_X86_64",
            Abi::X32 => "SCMP_ARCH_X32",
            Abi::X86 => "SCMP_ARCH_X86",
            Abi::Aarch64 => "SCMP_ARCH_AARCH64",
            Abi::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// All numbers that the kernel may have something for, as a filter gets them.
    pub fn numbers(self) -> Box<dyn Iterator<Item = u32>> {
        match self {
            Abi::X32 => Box::new((0..MOST).map(|n| n | X32)),
            Abi::Arm => Box::new((0..MOST).chain(ARM_PRIVATE..ARM_PRIVATE + 16)),
            _ => Box::new(0..MOST),
        }
    }

    /// The name of a number.
    pub fn name(self, number: u32) -> Option<&'static str> {
        let known = number as usize;
        let name = match self {
            Abi::X86_64 => syscalls::x86_64::Sysno::new(known).map(|s| s.name()),
            Abi::X32 => {
                let number = number & !X32;
                let own = number.checked_sub(512).and_then(|n| X32_OWN.get(n as usize)).copied();
                return own.or_else(|| Abi::X86_64.name(number));
            }
            Abi::X86 => syscalls::x86::Sysno::new(known).map(|s| s.name()),
            // glibc's word, not the kernel's
            Abi::Aarch64 if number == 79 => Some("newfstatat"),
            Abi::Aarch64 => syscalls::aarch64::Sysno::new(known).map(|s| s.name()),
            Abi::Arm => {
                let own = number.checked_sub(ARM_PRIVATE).and_then(|n| ARM_OWN.get(n as usize)).copied();
                own.or_else(|| syscalls::arm::Sysno::new(known).map(|s| s.name()))
            }
        };
        name.map(|n| n.trim_start_matches("r#"))
    }

    /// The names of what goes through a number: more than one for those that are doors to others.
    pub fn names(self, number: u32) -> Vec<&'static str> {
        match (self, self.name(number)) {
            (Abi::X86, Some("socketcall")) => SOCKETCALL.to_vec(),
            (Abi::X86, Some("ipc")) => IPC.to_vec(),
            (_, name) => name.into_iter().collect(),
        }
    }
}

/// Does any of the tables know the name?
pub(super) fn is_known(name: &str) -> bool {
    [Abi::X86_64, Abi::X32, Abi::X86, Abi::Aarch64, Abi::Arm]
        .into_iter()
        .any(|abi| abi.numbers().any(|n| abi.name(n) == Some(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names() {
        for (abi, number, name) in [
            (Abi::X86_64, 0, Some("read")),
            (Abi::X86_64, 101, Some("ptrace")),
            (Abi::X86_64, 639, None),
            (Abi::X32, X32 | 1, Some("write")),
            (Abi::X32, X32 | 521, Some("ptrace")),
            (Abi::X32, X32 | 547, Some("pwritev2")),
            (Abi::X86, 26, Some("ptrace")),
            (Abi::X86, 17, Some("break")),
            (Abi::Aarch64, 117, Some("ptrace")),
            (Abi::Aarch64, 79, Some("newfstatat")),
            (Abi::Arm, 26, Some("ptrace")),
            (Abi::Arm, 0xf_0005, Some("set_tls")),
        ] {
            assert_eq!(abi.name(number), name, "{abi:?} {number}");
        }
        assert!(Abi::X86.names(102).contains(&"connect") && Abi::X86.names(117).contains(&"shmat"));
        assert_eq!(Abi::X86_64.names(41), ["socket"]);
        assert!(is_known("chown32") && is_known("read") && !is_known("no_such_call"));
    }
}
