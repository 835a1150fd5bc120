//! Files of the writable layer that are made, written, appended to, cut, renamed, deleted, mapped, while a model of them in
//! memory says what they must be.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::MAP_SHARED;

use super::book::{Book, Checked, RW, Random, map, unmap};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

/// Pages of the file that stays mapped.
const MAPPED: usize = 32;
/// The most names, and the most bytes of a file.
const NAMES: usize = 80;
const BYTES: usize = 40 << 10;

#[derive(Clone, PartialEq)]
enum Entry {
    Dir,
    File(Vec<u8>),
    Link(String),
}

pub struct Files {
    root: String,
    model: BTreeMap<String, Entry>,
    rng: Random,
    next: u64,
    /// A file that is appended to through a descriptor that stays open.
    log: File,
    logged: Vec<u8>,
    mapped: Book,
    _mapped: File,
}

impl Files {
    pub fn new(setup: &Setup) -> Checked<Files> {
        let root = format!("{}/mutate-files-{}", setup.dir, setup.number);
        let fail = |e: std::io::Error| format!("{root}: {e}");
        fs::create_dir(&root).map_err(fail)?;
        let mapped = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(format!("{root}/mapped"))
            .map_err(fail)?;
        mapped.set_len((MAPPED * PAGE) as u64).map_err(fail)?;
        let log = File::options().append(true).create_new(true).open(format!("{root}/log")).map_err(fail)?;
        let at = map(std::ptr::null_mut(), MAPPED, RW, MAP_SHARED, mapped.as_raw_fd())?;
        let book = Book::new(at, MAPPED, setup.salt);
        let (model, logged) = (BTreeMap::new(), Vec::new());
        Ok(Files {
            root,
            model,
            rng: Random::new(setup.salt),
            next: 0,
            log,
            logged,
            mapped: book,
            _mapped: mapped,
        })
    }

    /// Up to so many bytes that have not been written before.
    fn bytes(&mut self, most: usize) -> Vec<u8> {
        self.next += 1;
        let mut bytes = vec![0; self.rng.below(most)];
        transship_testtools::pattern::Pattern::new(self.next).fill(&mut bytes);
        bytes
    }

    /// A name that is new, in a directory that is there.
    fn fresh(&mut self) -> String {
        self.next += 1;
        let dirs: Vec<_> = self.model.iter().filter(|(_, e)| **e == Entry::Dir).map(|(n, _)| n).collect();
        match self.rng.below(dirs.len() + 1) {
            0 => format!("n{}", self.next),
            i => format!("{}/n{}", dirs[i - 1], self.next),
        }
    }

    /// One of the entries that `wanted` chooses.
    fn pick(&mut self, wanted: impl Fn(&Entry) -> bool) -> Option<String> {
        let names: Vec<_> = self.model.iter().filter(|(_, e)| wanted(e)).map(|(n, _)| n).collect();
        if names.is_empty() { None } else { Some(names[self.rng.below(names.len())].clone()) }
    }

    /// Changes the content of a file in one of several ways.
    fn change(&mut self, name: &str) -> std::io::Result<()> {
        let path = format!("{}/{name}", self.root);
        let (how, fresh) = (self.rng.below(4), self.bytes(BYTES / 4));
        let Some(Entry::File(content)) = self.model.get_mut(name) else { return Ok(()) };
        let at = self.rng.below(content.len() + 1);
        match how {
            0 => {
                File::options().append(true).open(path)?.write_all(&fresh)?;
                content.extend(fresh);
                if content.len() > BYTES {
                    File::options().write(true).open(format!("{}/{name}", self.root))?.set_len(100)?;
                    content.truncate(100);
                }
            }
            1 => {
                File::options().write(true).open(path)?.write_all_at(&fresh, at as u64)?;
                content.resize(content.len().max(at + fresh.len()), 0);
                content[at..at + fresh.len()].copy_from_slice(&fresh);
            }
            2 => {
                File::options().write(true).open(path)?.set_len(at as u64)?;
                content.truncate(at);
            }
            _ => {
                let file = File::options().read(true).write(true).open(path)?;
                let pages = content.len().div_ceil(PAGE);
                if pages > 0 {
                    let mapped = map(std::ptr::null_mut(), pages, RW, MAP_SHARED, file.as_raw_fd());
                    let mapped = mapped.map_err(std::io::Error::other)?;
                    let count = fresh.len().min(content.len() - at);
                    // SAFETY: within the mapping: `at + count` is at most the file's length.
                    unsafe { std::ptr::copy_nonoverlapping(fresh.as_ptr(), mapped.add(at), count) };
                    content[at..at + count].copy_from_slice(&fresh[..count]);
                    unmap(mapped, pages).map_err(std::io::Error::other)?;
                }
            }
        }
        Ok(())
    }

    fn rename(&mut self) -> std::io::Result<()> {
        let Some(from) = self.pick(|_| true) else { return Ok(()) };
        let mut to = self.fresh();
        // sometimes over a file that is there
        if self.model[&from] != Entry::Dir && self.rng.below(3) == 0 {
            to = self.pick(|e| *e != Entry::Dir).unwrap_or(to);
        }
        if to == from || to.starts_with(&format!("{from}/")) {
            return Ok(());
        }
        fs::rename(format!("{}/{from}", self.root), format!("{}/{to}", self.root))?;
        let below = format!("{from}/");
        let moved: Vec<_> =
            self.model.keys().filter(|n| **n == from || n.starts_with(&below)).cloned().collect();
        for name in moved {
            if let Some(entry) = self.model.remove(&name) {
                self.model.insert(format!("{to}{}", &name[from.len()..]), entry);
            }
        }
        Ok(())
    }

    fn remove(&mut self) -> std::io::Result<()> {
        let Some(name) = self.pick(|_| true) else { return Ok(()) };
        let path = format!("{}/{name}", self.root);
        if self.model[&name] == Entry::Dir {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
        let below = format!("{name}/");
        self.model.retain(|n, _| *n != name && !n.starts_with(&below));
        Ok(())
    }

    fn act(&mut self) -> std::io::Result<()> {
        let full = self.model.len() >= NAMES;
        match self.rng.below(16) {
            0..=3 if !full => {
                let (name, content) = (self.fresh(), self.bytes(BYTES));
                fs::write(format!("{}/{name}", self.root), &content)?;
                self.model.insert(name, Entry::File(content));
            }
            4 if !full => {
                let name = self.fresh();
                // not deeper than a few
                if name.matches('/').count() < 3 {
                    fs::create_dir(format!("{}/{name}", self.root))?;
                    self.model.insert(name, Entry::Dir);
                }
            }
            5 if !full => {
                let (name, target) = (self.fresh(), format!("target-{}", self.next));
                std::os::unix::fs::symlink(&target, format!("{}/{name}", self.root))?;
                self.model.insert(name, Entry::Link(target));
            }
            6 | 7 => self.rename()?,
            8 | 9 => self.remove()?,
            10 => {
                let line = self.bytes(200);
                self.log.write_all(&line)?;
                self.logged.extend(line);
            }
            _ => {
                if let Some(name) = self.pick(|e| matches!(e, Entry::File(_))) {
                    self.change(&name)?;
                }
            }
        }
        Ok(())
    }

    /// What is really there, below `dir`.
    fn found(&self, dir: &str, found: &mut BTreeMap<String, Entry>) -> std::io::Result<()> {
        for entry in fs::read_dir(format!("{}/{dir}", self.root))? {
            let entry = entry?;
            let own = entry.file_name().to_string_lossy().into_owned();
            let name = if dir.is_empty() { own } else { format!("{dir}/{own}") };
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.found(&name, found)?;
                found.insert(name, Entry::Dir);
            } else if kind.is_symlink() {
                found.insert(name, Entry::Link(fs::read_link(entry.path())?.to_string_lossy().into_owned()));
            } else {
                found.insert(name, Entry::File(fs::read(entry.path())?));
            }
        }
        Ok(())
    }
}

/// How two contents differ.
fn compare(name: &str, wanted: &Entry, found: Option<&Entry>) -> Checked {
    match (wanted, found) {
        (wanted, Some(found)) if wanted == found => Ok(()),
        (_, None) => Err(format!("{name} is missing")),
        (Entry::File(wanted), Some(Entry::File(found))) => {
            let first = wanted.iter().zip(found).position(|(a, b)| a != b);
            let (first, wanted, found) =
                (first.unwrap_or(wanted.len().min(found.len())), wanted.len(), found.len());
            Err(format!("{name}: {found} bytes, should be {wanted}; the first that differs is {first}"))
        }
        _ => Err(format!("{name} is of another kind, or points elsewhere")),
    }
}

impl Behaviour for Files {
    fn step(&mut self) -> Checked {
        self.act().map_err(|e| format!("{}: {e}", self.root))?;
        let page = self.rng.below(MAPPED);
        self.mapped.write(page)
    }

    fn verify(&mut self) -> Checked<usize> {
        let mut found = BTreeMap::new();
        self.found("", &mut found).map_err(|e| format!("{}: {e}", self.root))?;
        compare("log", &Entry::File(self.logged.clone()), found.remove("log").as_ref())?;
        let Some(Entry::File(mapped)) = found.remove("mapped") else {
            return Err("mapped is missing".into());
        };
        for page in 0..MAPPED {
            self.mapped.check(page)?;
            if mapped[page * PAGE..][..PAGE] != *self.mapped.page(page) {
                return Err(format!("mapped: page {page} is another in the file than in memory"));
            }
        }
        self.model.iter().try_for_each(|(name, wanted)| compare(name, wanted, found.get(name)))?;
        if let Some(name) = found.keys().find(|name| !self.model.contains_key(*name)) {
            return Err(format!("{name} should not be there"));
        }
        Ok(MAPPED + self.model.len())
    }

    fn sample(&mut self) -> *mut u8 {
        self.mapped.at
    }
}
