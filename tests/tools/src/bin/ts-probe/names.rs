//! Open files whose names change: renamed, deleted, one of two names deleted, replaced by another file.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

const SIZE: usize = 100_000;

/// An open file and what must be true of it.
struct Open {
    what: &'static str,
    file: File,
    seed: u64,
    appended: u64,
    links: u64,
    /// Under which name it is found, if it has one.
    name: Option<String>,
}

impl Open {
    /// Made under `dir/WHAT`; then `change` does to its name what is to be tested.
    fn new(
        dir: &str,
        what: &'static str,
        links: u64,
        change: impl FnOnce(&str) -> std::io::Result<Option<String>>,
    ) -> Result<Open, String> {
        let path = format!("{dir}/{what}");
        let make = || {
            let mut file = OpenOptions::new().create_new(true).read(true).append(true).open(&path)?;
            let seed = what.len() as u64;
            let mut bytes = vec![0; SIZE];
            Pattern::new(seed).fill(&mut bytes);
            file.write_all(&bytes)?;
            let name = change(&path)?;
            Ok(Open { what, file, seed, appended: 0, links, name })
        };
        make().map_err(|e: std::io::Error| format!("{path}: {e}"))
    }

    fn has_name(&self, name: &str) -> std::io::Result<bool> {
        let (open, there) = (self.file.metadata()?, fs::metadata(name)?);
        Ok((there.dev(), there.ino()) == (open.dev(), open.ino()))
    }

    /// What is not as it must be; empty when all is. Then grows by one byte.
    fn check(&mut self) -> std::io::Result<String> {
        let meta = self.file.metadata()?;
        let mut found = String::new();
        let mut say = |text: String| found += &format!(",{}:{text}", self.what);
        if meta.nlink() != self.links {
            say(format!("{}-links", meta.nlink()));
        }
        if meta.len() != SIZE as u64 + self.appended {
            say(format!("{}-bytes", meta.len()));
        }
        let mut bytes = vec![0; SIZE];
        self.file.read_exact_at(&mut bytes, 0)?;
        if Pattern::new(self.seed).wrong(&bytes) > 0 {
            say("content".into());
        }
        if let Some(name) = &self.name {
            match self.has_name(name) {
                // moved between the two looks: the other node's inodes have other numbers
                Ok(false) if self.has_name(name)? => {}
                Ok(true) => {}
                Ok(false) => say("another-file-has-its-name".into()),
                Err(e) => say(format!("{:?}", e.kind())),
            }
        }
        self.file.write_all(b"+")?;
        self.appended += 1;
        Ok(found)
    }
}

pub fn run(args: &mut Args) -> Result<(), String> {
    let dir = args.position("DIR")?;
    let other = |path: &str, end: &str| format!("{path}-{end}");
    let mut open = vec![
        Open::new(&dir, "plain", 1, |p| Ok(Some(p.into())))?,
        Open::new(&dir, "renamed", 1, |p| fs::rename(p, other(p, "away")).map(|()| Some(other(p, "away"))))?,
        Open::new(&dir, "deleted", 0, |p| fs::remove_file(p).map(|()| None))?,
        // the name under which it was opened is gone, the other one is there
        Open::new(&dir, "linked", 1, |p| {
            fs::hard_link(p, other(p, "too"))?;
            fs::remove_file(p)?;
            Ok(Some(other(p, "too")))
        })?,
        Open::new(&dir, "replaced", 0, |p| {
            fs::write(other(p, "new"), "another file")?;
            fs::rename(other(p, "new"), p)?;
            Ok(None)
        })?,
        Open::new(&dir, "moved-directory", 1, |p| {
            let sub = other(p, "sub");
            fs::create_dir(&sub)?;
            fs::rename(p, format!("{sub}/f"))?;
            fs::rename(&sub, other(p, "sub2"))?;
            Ok(Some(format!("{}/f", other(p, "sub2"))))
        })?,
    ];
    say::rounds("names", args, |_| {
        let mut found = String::new();
        for file in &mut open {
            found += &file.check().unwrap_or_else(|e| format!(",{}:{e}", file.what).replace(' ', "-"));
        }
        let stray = fs::read_dir(&dir).map_err(|e| format!("{dir}: {e}"))?;
        for name in stray.flatten().map(|e| e.file_name().to_string_lossy().into_owned()) {
            if name.contains("link_remap") || name.contains(".cr.") {
                found += &format!(",stray:{name}");
            }
        }
        Ok(format!("wrong={} found={}", found.matches(',').count(), found.trim_start_matches(',')))
    })
}
