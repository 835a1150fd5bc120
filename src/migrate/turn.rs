//! Whose turn it is to stand still: the number of containers that are frozen on a node at the same time is limited, so that each freeze has
//! the processors to itself. What is copied while containers run is not limited here.
//!
//! A turn is a lock on one of so many files: a shim that dies gives its turn back, and no agent has to be there.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::capture::Context;
use crate::control::RUN_DIR;

/// Between two looks whether there is a free one.
const LOOK: Duration = Duration::from_millis(5);

/// A turn to stand still, until it is dropped. Nothing where there is no limit.
#[derive(Debug)]
pub(super) struct Turn(#[expect(dead_code, reason = "held, not read")] Option<Flock<File>>);

/// The turns of this node.
#[derive(Debug)]
pub(super) struct Turns {
    dir: PathBuf,
    most: u32,
}

impl Turns {
    /// At most so many at a time; 0: no limit.
    pub fn of_node(most: u32) -> Turns {
        Turns::in_dir(&Path::new(RUN_DIR).join("frozen"), most)
    }

    fn in_dir(dir: &Path, most: u32) -> Turns {
        Turns { dir: dir.to_owned(), most }
    }

    /// One, if it is free.
    fn try_take(&self) -> Result<Option<Turn>> {
        if self.most == 0 {
            return Ok(Some(Turn(None)));
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| format!("making {}", self.dir.display()))?;
        for n in 0..self.most {
            let path = self.dir.join(n.to_string());
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = file.with_context(|| format!("opening {}", path.display()))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(held) => return Ok(Some(Turn(Some(held)))),
                Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
            }
        }
        Ok(None)
    }

    /// Waits for one, at most so long; shows the peer signs of life.
    ///
    /// # Errors
    /// The migration was given up, the connection was lost, or the files cannot be had.
    pub fn take(&self, cx: &Context<'_>, limit: Duration) -> Result<Option<Turn>> {
        let begun = Instant::now();
        loop {
            cx.go_on()?;
            let turn = self.try_take()?;
            if turn.is_some() || begun.elapsed() >= limit {
                return Ok(turn);
            }
            cx.link.wire().alive()?;
            std::thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_at_a_time_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("frozen");
        let turns = Turns::in_dir(&dir, 2);
        let first = turns.try_take().unwrap().unwrap();
        let _second = turns.try_take().unwrap().unwrap();
        assert!(turns.try_take().unwrap().is_none());
        assert!(Turns::in_dir(&dir, 3).try_take().unwrap().is_some(), "the limit was raised");
        drop(first);
        assert!(turns.try_take().unwrap().is_some());
    }

    #[test]
    fn no_limit() {
        let turns = Turns::in_dir(Path::new("/nonexistent"), 0);
        let _first = turns.try_take().unwrap().unwrap();
        assert!(turns.try_take().unwrap().is_some());
    }
}
