//! Files in a folder: one that is being appended to, or many that hold checkable content.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

pub fn append(args: &mut Args) -> Result<(), String> {
    let path = args.position("FILE")?;
    let mut file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(|e| format!("{path}: {e}"))?;
    say::rounds("append", args, |n| {
        file.write_all(format!("{n}\n").as_bytes()).map_err(|e| format!("{path}: {e}"))?;
        Ok(String::new())
    })
}

/// Files of one MiB each.
pub fn run(args: &mut Args) -> Result<(), String> {
    let (dir, files) = (args.position("DIR")?, args.number("MB")?);
    let path = |i: u64| Path::new(&dir).join(format!("file-{i}"));
    let mut bytes = vec![0; 1 << 20];
    for i in 0..files {
        Pattern::new(i).fill(&mut bytes);
        fs::write(path(i), &bytes).map_err(|e| format!("{}: {e}", path(i).display()))?;
    }
    say::rounds("files", args, |_| {
        let mut wrong = 0;
        for i in 0..files {
            match fs::read(path(i)) {
                Ok(b) if b.len() == 1 << 20 => wrong += Pattern::new(i).wrong(&b),
                _ => wrong += 1 << 20,
            }
        }
        Ok(format!("wrong={wrong} bytes={}", files << 20))
    })
}
