//! Registers of an aarch64 task: pure decisions about what to set for an injected call. No system calls here.
//!
//! arm64 rewinds an interrupted call *before* the stop that ptrace sees (arch/arm64/kernel/signal.c, do_signal): the program
//! counter is then at its `svc` again and x0 is the first argument. Putting the registers back therefore repeats the call.
//! A relative timeout of a repeated call starts anew: the kernel's own way out (restart_syscall) is lost when the program counter
//! was elsewhere in between.

/// `struct user_pt_regs`, as PTRACE_GETREGSET(NT_PRSTATUS) gives it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    regs: [u64; 31],
    sp: u64,
    pc: u64,
    pstate: u64,
}

/// `svc #0`, little endian.
pub const INSN: &[u8] = &[0x01, 0x00, 0x00, 0xd4];
/// Code addresses are multiples of this.
pub const ALIGN: u64 = 4;

/// PSTATE.nRW: the task runs 32-bit code.
const PSTATE_32: u64 = 0x10;

impl Regs {
    /// Where the task would go on.
    pub fn ip(&self) -> u64 {
        self.pc
    }

    /// Registers that make the task call `nr` from the instruction at `insn`.
    pub fn calling(&self, insn: u64, nr: u64, args: [u64; 3]) -> Self {
        let mut call = *self;
        call.regs[..3].copy_from_slice(&args);
        call.regs[8] = nr;
        call.pc = insn;
        call
    }

    /// What the call returned.
    pub fn result(&self) -> i64 {
        self.regs[0] as i64
    }

    /// Can calls of this architecture be injected into the task?
    pub fn fits(&self) -> bool {
        self.pstate & PSTATE_32 == 0
    }

    /// The program counter after the injected instruction.
    pub fn after(insn: u64) -> u64 {
        insn + INSN.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_changes_only_what_it_must() {
        assert_eq!(size_of::<Regs>(), 34 * 8);
        let mut saved = Regs { pc: 7, sp: 99, ..Regs::default() };
        saved.regs[3] = 5;
        let call = saved.calling(0x1000, 282, [1, 2, 3]);
        assert_eq!((call.pc, call.sp, call.regs[8], call.regs[3]), (0x1000, 99, 282, 5));
        assert_eq!(call.regs[..3], [1, 2, 3]);
        assert_eq!(call.result(), 1);
        assert_eq!(INSN.len() as u64 % ALIGN, 0);
        assert_eq!(Regs::after(call.ip()), 0x1000 + INSN.len() as u64);
        assert!(saved.fits() && !Regs { pstate: 0x10, ..saved }.fits());
    }
}
