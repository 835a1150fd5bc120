//! Standard streams under load: lines as fast as they are taken, and a stdin that is read only when asked.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;

use transship_testtools::{args::Args, signals};

use crate::say;

/// Numbers as fast as they are taken, on stdout in digits and a line each, on stderr in letters (0 is `a`) and a semicolon each:
/// both can be told apart byte by byte wherever they were mixed. TERM ends it after a whole pair.
pub fn flood(args: &Args) -> Result<(), String> {
    let stop = args.option_number("numbers", u64::MAX)?;
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    for n in 1..=stop {
        if signals::stops() > 0 {
            break;
        }
        // stdout is line-buffered: one write each
        writeln!(out, "{n}").map_err(|e| format!("stdout: {e}"))?;
        let letters: String =
            n.to_string().bytes().map(|b| char::from(b - b'0' + b'a')).chain([';']).collect();
        err.write_all(letters.as_bytes()).map_err(|e| format!("stderr: {e}"))?;
    }
    Ok(())
}

/// Bytes of one block of [`pour`].
const BLOCK: usize = 4096;

/// Numbered blocks on stdout, 16 a write; ends after so many megabytes, or at TERM.
pub fn pour(args: &mut Args) -> Result<(), String> {
    let blocks = args.number("MB")? * 256;
    // not through std's line buffer
    let out = std::io::stdout().as_fd().try_clone_to_owned().map_err(|e| format!("stdout: {e}"))?;
    let mut out = File::from(out);
    let mut buffer = vec![0; 16 * BLOCK];
    let mut next = 0;
    while next < blocks && signals::stops() == 0 {
        for block in buffer.chunks_mut(BLOCK) {
            block.fill(next.to_le_bytes()[0]);
            block[..8].copy_from_slice(&next.to_le_bytes());
            next += 1;
        }
        out.write_all(&buffer).map_err(|e| format!("stdout: {e}"))?;
    }
    Ok(())
}

/// Says `ready`, reads nothing until the first USR1, then repeats each line of stdin, and its end.
pub fn patient(_: &Args) -> Result<(), String> {
    say::line("ready");
    // SAFETY: waits for any signal; has no arguments.
    unsafe { libc::pause() };
    say::line("reading");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        say::line(&format!("in {line}"));
    }
    say::line("in-closed");
    while signals::stops() == 0 {
        signals::pause(std::time::Duration::from_secs(1));
    }
    Ok(())
}
