//! The first instruction, and what the kernel leaves on the stack for it: arguments, environment, auxiliary vector (System V ABI, "Initial
//! Process Stack"; Linux: fs/binfmt_elf.c, create_elf_tables).

use core::ffi::{CStr, c_char};
use core::ptr;

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {entry}",
    "ud2",
    entry = sym entry,
);
#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, #0",
    "mov x30, #0",
    "mov x0, sp",
    "bl {entry}",
    "brk #1",
    entry = sym entry,
);

unsafe extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: `_start` gives what the kernel has put there.
    super::run::run(&unsafe { Start::new(stack) })
}

/// How this process was started.
pub struct Start {
    /// Ends with null, as do all strings with nul.
    pub argv: *const *const c_char,
    /// Ends with null.
    pub envp: *const *const c_char,
    /// The path that was given to execve; not argv[0], which is whatever the caller likes.
    pub path: &'static [u8],
}

impl Start {
    /// # Safety
    /// The stack is as the kernel has left it.
    unsafe fn new(stack: *const usize) -> Start {
        // SAFETY: a count, as many arguments, null, the environment, null, the auxiliary vector in pairs, which ends with AT_NULL.
        unsafe {
            let argv = stack.add(1).cast::<*const c_char>();
            let envp = argv.add(*stack + 1);
            let mut aux = envp;
            while !(*aux).is_null() {
                aux = aux.add(1);
            }
            let mut aux = aux.add(1).cast::<usize>();
            let mut path: &[u8] = b"";
            while *aux as u64 != libc::AT_NULL {
                if *aux as u64 == libc::AT_EXECFN {
                    path = bytes(ptr::with_exposed_provenance(*aux.add(1)));
                }
                aux = aux.add(2);
            }
            Start { argv, envp, path }
        }
    }

    /// The arguments without the program's name.
    pub fn args(&self) -> impl Iterator<Item = &'static [u8]> {
        Strings(self.argv).skip(1)
    }

    /// A variable of the environment.
    pub fn variable(&self, name: &[u8]) -> Option<&'static [u8]> {
        Strings(self.envp).find_map(|v| v.strip_prefix(name)?.strip_prefix(b"="))
    }
}

/// A vector that ends with null.
struct Strings(*const *const c_char);

impl Iterator for Strings {
    type Item = &'static [u8];

    fn next(&mut self) -> Option<&'static [u8]> {
        // SAFETY: only `Start`'s vectors are walked, and never past the null that ends them.
        let at = unsafe { *self.0 };
        if at.is_null() {
            return None;
        }
        // SAFETY: as above; this one was not the last.
        self.0 = unsafe { self.0.add(1) };
        // SAFETY: the kernel's strings end with nul and stay for as long as the process.
        Some(unsafe { bytes(at) })
    }
}

/// # Safety
/// It ends with nul and is not changed.
unsafe fn bytes(at: *const c_char) -> &'static [u8] {
    // SAFETY: by the caller's word.
    unsafe { CStr::from_ptr(at) }.to_bytes()
}
