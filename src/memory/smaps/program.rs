//! The BPF iterator over one task's mappings: a program of a few instructions that the kernel calls with each of them, and that writes
//! what is asked for into a file which we read.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use super::btf::Layout;

// include/uapi/linux/bpf.h
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;
const SEQ_WRITE: i32 = 127;

/// The kernel lets only programs read its structures that say they are under the GPL, and offer it: this one is under the MIT license or
/// the GPL, as you like.
const LICENSE: &CStr = c"Dual MIT/GPL";

/// One mapping, as the program writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub start: u64,
    pub end: u64,
    /// VM_*.
    pub flags: u64,
}

const AREA: i16 = 24;

/// The program, in the kernel.
pub(super) struct Program(OwnedFd);

/// The program and one task.
pub(super) struct Iter(OwnedFd);

impl Program {
    /// # Errors
    /// The kernel does not take it: no such iterator, or no capability for it (CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN).
    pub fn load(layout: &Layout) -> Result<Program> {
        let code = code(layout);
        let mut attributes = ProgLoad {
            prog_type: PROG_TYPE_TRACING,
            insn_cnt: u32::try_from(code.len())?,
            insns: code.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            prog_name: *b"transship_flags\0",
            expected_attach_type: TRACE_ITER,
            attach_btf_id: layout.function,
            ..ProgLoad::default()
        };
        Ok(Program(bpf(PROG_LOAD, &mut attributes).context("loading a BPF program")?))
    }

    /// For this task. Linux 6.1; kernels before iterate over all tasks, which their reader sees by the addresses.
    pub fn of(&self, pid: i32) -> Result<Iter> {
        let task = TaskInfo { tid: pid.unsigned_abs(), ..TaskInfo::default() };
        let mut attributes = LinkCreate {
            prog_fd: number(&self.0),
            attach_type: TRACE_ITER,
            iter_info: (&raw const task) as u64,
            iter_info_len: u32::try_from(size_of::<TaskInfo>())?,
            ..LinkCreate::default()
        };
        Ok(Iter(bpf(LINK_CREATE, &mut attributes).context("making a BPF iterator")?))
    }
}

impl Iter {
    /// All mappings as they are now, ascending.
    pub fn read(&self) -> Result<Vec<Area>> {
        let mut attributes = IterCreate { link_fd: number(&self.0), flags: 0 };
        let mut file = File::from(bpf(ITER_CREATE, &mut attributes).context("starting a BPF iterator")?);
        let mut bytes = Vec::with_capacity(64 << 10);
        file.read_to_end(&mut bytes).context("reading a BPF iterator")?;
        let (words, rest) = bytes.as_chunks::<8>();
        let (areas, more) = words.as_chunks::<3>();
        ensure!(rest.is_empty() && more.is_empty(), "half a mapping");
        let area = |words: &[[u8; 8]; 3]| {
            let [start, end, flags] = words.map(u64::from_ne_bytes);
            Area { start, end, flags }
        };
        Ok(areas.iter().map(area).collect())
    }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// `struct bpf_insn`, as one word: code, registers, offset, immediate.
fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_ne_bytes();
    let [a, b, c, d] = immediate.to_ne_bytes();
    // bit fields begin where the byte order does
    let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
    u64::from_ne_bytes([code, registers, low, high, a, b, c, d])
}

/// ```c
/// int f(struct bpf_iter__task_vma *ctx) {
///     if (ctx->vma) bpf_seq_write(ctx->meta->seq, &(u64[]){ vma->vm_start, vma->vm_end, vma->vm_flags }, 24);
///     return 0;
/// }
/// ```
fn code(layout: &Layout) -> Vec<u64> {
    // what the kernel calls them with: pointers to meta (which begins with one to seq), task and vma (kernel/bpf/task_iter.c)
    const META: i16 = 0;
    const VMA: i16 = 16;
    const SEQ: i16 = 0;
    const FRAME: u8 = 10;
    let load = |to, from, offset| insn(0x79, to, from, offset, 0);
    let store = |offset, from| insn(0x7b, FRAME, from, offset, 0);
    let put = |to, value| insn(0xb7, to, 0, 0, value);
    let mut call = vec![load(6, 1, META), load(1, 6, SEQ)];
    for (member, place) in [layout.start, layout.end, layout.flags].into_iter().zip((-AREA..0).step_by(8)) {
        call.extend([load(3, 2, member), store(place, 3)]);
    }
    call.extend([
        insn(0xbf, 2, FRAME, 0, 0),
        insn(0x07, 2, 0, 0, -i32::from(AREA)),
        put(3, i32::from(AREA)),
        insn(0x85, 0, 0, 0, SEQ_WRITE),
    ]);
    let over = i16::try_from(call.len()).unwrap_or_default();
    let without = insn(0x15, 2, 0, over, 0);
    [&[load(2, 1, VMA), without][..], &call, &[put(0, 0), insn(0x95, 0, 0, 0, 0)]].concat()
}

/// bpf(2), for commands that give a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is one of the structures below, as long as is said; what they point to lives in the callers until this
    // returns. The kernel writes into nothing but them.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns (and a descriptor fits).
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

// Parts of `union bpf_attr`. Without padding: the kernel wants zeros wherever it does not know a field.

#[derive(Default)]
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_prog_fd: u32,
    core_relo_cnt: u32,
}

#[derive(Default)]
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    rest: u32,
}

#[repr(C)]
struct IterCreate {
    link_fd: u32,
    flags: u32,
}

/// `union bpf_iter_link_info`, its part for tasks.
#[derive(Default)]
#[repr(C)]
struct TaskInfo {
    tid: u32,
    pid: u32,
    pid_fd: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_reads_where_the_members_are() {
        let code = code(&Layout { function: 7, start: 8, end: 16, flags: 24 });
        let bytes: Vec<[u8; 8]> = code.iter().map(|i| i.to_ne_bytes()).collect();
        assert_eq!(code.len(), 16);
        if cfg!(target_endian = "little") {
            assert_eq!(bytes[0], [0x79, 0x12, 16, 0, 0, 0, 0, 0]);
            assert_eq!(bytes[1], [0x15, 0x02, 12, 0, 0, 0, 0, 0], "over all to the end's two");
            assert_eq!(bytes[4], [0x79, 0x23, 8, 0, 0, 0, 0, 0]);
            assert_eq!(bytes[5], [0x7b, 0x3a, 0xe8, 0xff, 0, 0, 0, 0]);
            assert_eq!(bytes[13], [0x85, 0, 0, 0, 127, 0, 0, 0]);
        }
    }

    #[test]
    fn attributes_have_no_padding() {
        // offsets as in include/uapi/linux/bpf.h
        assert_eq!(size_of::<ProgLoad>(), 120);
        assert_eq!(std::mem::offset_of!(ProgLoad, attach_btf_id), 108);
        assert_eq!(size_of::<LinkCreate>(), 32);
    }
}
