//! A socketpair between this process and a child; a number goes over and comes back plus one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use transship_testtools::args::Args;

use crate::{say, tree};

pub fn run(args: &Args) -> Result<(), String> {
    let (mut ours, mut theirs) = UnixStream::pair().map_err(|e| format!("socketpair: {e}"))?;
    let child = tree::fork(|| {
        let mut bytes = [0; 8];
        while theirs.read_exact(&mut bytes).is_ok() {
            let answer = u64::from_le_bytes(bytes).wrapping_add(1).to_le_bytes();
            if theirs.write_all(&answer).is_err() {
                break;
            }
        }
    })?;
    let mut wrong = 0;
    say::rounds("unix-pair", args, |n| {
        let mut bytes = [0; 8];
        let asked = ours.write_all(&n.to_le_bytes()).and_then(|()| ours.read_exact(&mut bytes));
        if asked.is_err() || u64::from_le_bytes(bytes) != n + 1 {
            wrong += 1;
        }
        Ok(format!("wrong={wrong} child={child}"))
    })
}
