//! A tree of processes: children with a child each, and pipes through both.

use std::io::{PipeReader, PipeWriter, Read, Write};

use transship_testtools::args::Args;

use crate::say;

/// Forks; the child runs `work` and ends. Only while this process has a single thread.
pub fn fork(work: impl FnOnce()) -> Result<i32, String> {
    // SAFETY: called before any thread is started, so the child may do whatever the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", std::io::Error::last_os_error())),
        0 => {
            // SAFETY: prctl with these arguments touches no memory. Nobody outlives a workload that was killed.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            work();
            std::process::exit(0)
        }
        pid => Ok(pid),
    }
}

/// What it reads, written on plus one, until the other end closes.
fn relay(mut from: PipeReader, mut to: PipeWriter) {
    let mut byte = [0];
    while from.read_exact(&mut byte).is_ok() {
        byte[0] = byte[0].wrapping_add(1);
        if to.write_all(&byte).is_err() {
            break;
        }
    }
}

pub fn run(args: &mut Args) -> Result<(), String> {
    let children = args.number("N")?;
    let pipe = || std::io::pipe().map_err(|e| format!("pipe: {e}"));
    let mut ends = Vec::new();
    for _ in 0..children {
        // us -> child -> grandchild -> us
        let ((to_child, ours_in), (to_grandchild, child_out), (from_grandchild, grandchild_out)) =
            (pipe()?, pipe()?, pipe()?);
        let ends_of_ours = (ours_in, from_grandchild);
        fork(|| {
            let made = fork(|| relay(to_grandchild, grandchild_out));
            if made.is_ok() {
                relay(to_child, child_out);
            }
        })?;
        ends.push(ends_of_ours);
    }
    let mut wrong = 0;
    say::rounds("tree", args, |n| {
        for (to, from) in &mut ends {
            let mut byte = [n as u8];
            let asked = to.write_all(&byte).and_then(|()| from.read_exact(&mut byte));
            if asked.is_err() || byte[0] != (n as u8).wrapping_add(2) {
                wrong += 1;
            }
        }
        Ok(format!("wrong={wrong} processes={}", 1 + 2 * children))
    })
}
