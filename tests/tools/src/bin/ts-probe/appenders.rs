//! Several threads that append to one file, each through a description of its own; some lines are synced, some not.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use transship_testtools::{args::Args, signals};

use crate::say;

/// Every so many lines of a writer are followed by fsync.
const SYNC: u64 = 64;

pub fn run(args: &mut Args) -> Result<(), String> {
    let (path, writers) = (args.position("FILE")?, args.number("N")?);
    let lines = AtomicU64::new(0);
    let wrong = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let (path, lines, wrong) = (&path, &lines, &wrong);
            scope.spawn(move || match write(path, writer, lines) {
                Ok(()) => {}
                Err(e) => {
                    eprintln!("ts-probe: {path}: {e}");
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        say::rounds("appenders", args, |_| {
            let (lines, wrong) = (lines.load(Ordering::Relaxed), wrong.load(Ordering::Relaxed));
            Ok(format!("wrong={wrong} lines={lines}"))
        })
    })
}

fn write(path: &str, writer: u64, lines: &AtomicU64) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    for n in 1.. {
        if signals::stops() > 0 {
            break;
        }
        let line = format!("{writer} {n}\n");
        // one write a line: with O_APPEND the kernel keeps them whole
        assert_eq!(file.write(line.as_bytes())?, line.len());
        lines.fetch_add(1, Ordering::Relaxed);
        if n % SYNC == 0 {
            File::sync_data(&file)?;
            signals::pause(std::time::Duration::from_millis(1));
        }
    }
    Ok(())
}
