//! A child that has ended and that nobody has waited for: its pid and its exit status have to stay until someone does.

use transship_testtools::args::Args;

use crate::{say, tree};

const STATUS: i32 = 37;

/// The state of a process, as /proc tells it.
fn state(pid: i32) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

/// Checks each round that the zombie is one; at the end reaps it.
pub fn run(args: &Args) -> Result<(), String> {
    let child = tree::fork(|| std::process::exit(STATUS))?;
    while state(child) != Some('Z') {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let mut wrong = 0;
    say::rounds("zombie", args, |_| {
        wrong += u64::from(state(child) != Some('Z'));
        Ok(format!("wrong={wrong}"))
    })?;
    let mut status = 0;
    // SAFETY: `status` is a valid place for the answer.
    let reaped = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
    let right = reaped == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == STATUS;
    say::line(if right { "zombie reaped" } else { "zombie lost" });
    Ok(())
}
