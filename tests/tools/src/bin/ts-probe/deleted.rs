//! A file that is open but has no name any more.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

pub fn run(args: &mut Args) -> Result<(), String> {
    let (path, size) = (args.position("FILE")?, args.number("MB")? << 20);
    let fail = |e: std::io::Error| format!("{path}: {e}");
    let mut file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).map_err(fail)?;
    let mut bytes = vec![0; size as usize];
    Pattern::new(size).fill(&mut bytes);
    file.write_all(&bytes).map_err(fail)?;
    std::fs::remove_file(&path).map_err(fail)?;
    say::rounds("deleted", args, |_| {
        bytes.fill(0);
        file.read_exact_at(&mut bytes, 0).map_err(fail)?;
        let links = std::os::unix::fs::MetadataExt::nlink(&file.metadata().map_err(fail)?);
        Ok(format!("wrong={} bytes={size} links={links}", Pattern::new(size).wrong(&bytes)))
    })
}
