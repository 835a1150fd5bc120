//! Registers of an x86_64 task: pure decisions about what to set for an injected call. No system calls here.

/// `struct user_regs_struct`, as PTRACE_GETREGSET(NT_PRSTATUS) gives it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    rbp: u64,
    rbx: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rax: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    orig_rax: u64,
    rip: u64,
    cs: u64,
    eflags: u64,
    rsp: u64,
    ss: u64,
    fs_base: u64,
    gs_base: u64,
    ds: u64,
    es: u64,
    fs: u64,
    gs: u64,
}

/// The `syscall` instruction; it may begin at any byte.
pub const INSN: &[u8] = &[0x0f, 0x05];
/// Code addresses are multiples of this.
pub const ALIGN: u64 = 1;

/// Selector of 64-bit user code (arch/x86/include/asm/segment.h, `__USER_CS`). Others are 32-bit tasks.
const USER_CS: u64 = 0x33;

impl Regs {
    /// Where the task would go on.
    pub fn ip(&self) -> u64 {
        self.rip
    }

    /// Registers that make the task call `nr` from the instruction at `insn`. `orig_rax` -1 says "in no system call": the kernel
    /// then does not rewind our instruction pointer for the call that the stop interrupted. The saved registers, put back later,
    /// still say what it was, and the kernel restarts it then.
    pub fn calling(&self, insn: u64, nr: u64, args: [u64; 3]) -> Self {
        let [rdi, rsi, rdx] = args;
        Self { rip: insn, rax: nr, orig_rax: u64::MAX, rdi, rsi, rdx, ..*self }
    }

    /// What the call returned.
    pub fn result(&self) -> i64 {
        self.rax as i64
    }

    /// Can calls of this architecture be injected into the task?
    pub fn fits(&self) -> bool {
        self.cs == USER_CS
    }

    /// The instruction pointer after the injected instruction.
    pub fn after(insn: u64) -> u64 {
        insn + INSN.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_changes_only_what_it_must() {
        assert_eq!(size_of::<Regs>(), 27 * 8);
        let saved =
            Regs { rip: 7, rax: -512i64 as u64, orig_rax: 35, rsp: 99, cs: USER_CS, ..Regs::default() };
        let call = saved.calling(0x1000, 323, [1, 2, 3]);
        assert_eq!((call.rip, call.rax, call.orig_rax), (0x1000, 323, u64::MAX));
        assert_eq!((call.rdi, call.rsi, call.rdx), (1, 2, 3));
        assert_eq!(Regs { rip: 7, rax: saved.rax, orig_rax: 35, rdi: 0, rsi: 0, rdx: 0, ..call }, saved);
        assert_eq!(saved.result(), -512);
        assert_eq!(ALIGN, 1);
        assert_eq!(Regs::after(call.ip()), 0x1000 + INSN.len() as u64);
        assert!(saved.fits() && !Regs { cs: 0x23, ..saved }.fits());
    }
}
