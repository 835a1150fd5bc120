//! Freezing, thawing, listing and killing what is in a cgroup and below it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::locate::{self, Kind};

/// Asked again this often while a freeze takes long: v1 may miss a task that was forking (kernel doc freezer-subsystem).
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The freezer of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Freezer {
    kind: Kind,
    dir: PathBuf,
}

impl Freezer {
    /// The freezer of the cgroup that a task is in.
    pub fn of_pid(pid: i32) -> Result<Self> {
        let read = |path: String| fs::read_to_string(&path).with_context(|| format!("reading {path}"));
        let cgroups = locate::parse_proc_cgroup(&read(format!("/proc/{pid}/cgroup"))?);
        let mounts = locate::parse_mountinfo(&read("/proc/self/mountinfo".into())?);
        let (kind, dir) = locate::freezer_dir(&cgroups, &mounts)
            .with_context(|| format!("no freezer cgroup for pid {pid}"))?;
        let freezer = Self { kind, dir };
        if !freezer.dir.join(freezer.control()).exists() {
            bail!("pid {pid} is in the root cgroup, which cannot be frozen ({})", freezer.dir.display());
        }
        Ok(freezer)
    }

    /// A freezer whose kind and directory are known.
    pub fn at(kind: Kind, dir: PathBuf) -> Self {
        Self { kind, dir }
    }

    /// The cgroup's directory; what CRIU takes as `freeze_cgroup`, v1 and v2 alike.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Of which cgroup version it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    fn control(&self) -> &'static str {
        match self.kind {
            Kind::V1 => "freezer.state",
            Kind::V2 => "cgroup.freeze",
        }
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.dir.join(name);
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|mut f| f.write_all(value.as_bytes()))
            .with_context(|| format!("writing {value} to {}", path.display()))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    fn ask(&self, frozen: bool) -> Result<()> {
        match (self.kind, frozen) {
            (Kind::V1, true) => self.write(self.control(), "FROZEN"),
            (Kind::V1, false) => self.write(self.control(), "THAWED"),
            (Kind::V2, true) => self.write(self.control(), "1"),
            (Kind::V2, false) => self.write(self.control(), "0"),
        }
    }

    /// Is everything in the cgroup frozen now?
    pub fn is_frozen(&self) -> Result<bool> {
        Ok(match self.kind {
            Kind::V1 => self.read("freezer.state")?.trim() == "FROZEN",
            Kind::V2 => self.read("cgroup.events")?.lines().any(|l| l == "frozen 1"),
        })
    }

    /// Freezes; returns when every task is frozen. `true`: it already was (a paused container), so an abort should leave it so.
    /// After a timeout the cgroup is thawed again, if we froze it.
    pub fn freeze(&self, timeout: Duration) -> Result<bool> {
        if self.is_frozen()? {
            return Ok(true);
        }
        let begun = Instant::now();
        self.ask(true)?;
        let mut asked = begun;
        let mut nap = Duration::from_micros(20);
        while !self.is_frozen()? {
            let now = Instant::now();
            if now - begun > timeout {
                self.ask(false)?;
                bail!("{} did not freeze within {timeout:?}", self.dir.display());
            }
            if self.kind == Kind::V1 && now - asked > ASK_AGAIN {
                self.ask(true)?;
                asked = now;
            }
            // Freezing takes a fraction of a millisecond as a rule: look often at first.
            if now - begun < Duration::from_micros(500) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(nap);
                nap = (nap * 2).min(Duration::from_millis(5));
            }
        }
        Ok(false)
    }

    /// Thaws. Fine when the cgroup is not frozen, and when it is gone.
    pub fn thaw(&self) -> Result<()> {
        match self.ask(false) {
            Err(_) if !self.dir.exists() => Ok(()),
            other => other,
        }
    }

    /// The processes in the cgroup and in those below it, as this process's pid namespace numbers them.
    pub fn pids(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        collect(&self.dir, &mut pids)
            .with_context(|| format!("listing the processes of {}", self.dir.display()))?;
        Ok(pids)
    }

    /// Kills everything in the cgroup, frozen or not, none of it running another instruction of its own if it was frozen.
    /// Returns when the cgroup is empty (zombies aside, which the kernel does not list).
    pub fn kill_all(&self, timeout: Duration) -> Result<()> {
        let begun = Instant::now();
        let at_once = self.kind == Kind::V2 && self.dir.join("cgroup.kill").exists();
        let mut nap = Duration::from_micros(200);
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            // a threaded cgroup has the file and takes nothing
            if !at_once || self.write("cgroup.kill", "1").is_err() {
                for pid in pids {
                    // Gone meanwhile is as good.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            // v1 tasks die when they are thawed: the signal is there before, so they die in the kernel. v2 needs no thaw to die, but
            // a cgroup left frozen would hold whatever joins it.
            self.thaw()?;
            if begun.elapsed() > timeout {
                bail!(
                    "processes in {} survive SIGKILL for {timeout:?}: {:?}",
                    self.dir.display(),
                    self.pids()?
                );
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(10));
        }
    }
}

/// The process that a thread belongs to; none if it has ended, or is outside of our pid namespace (0).
fn leader(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("Tgid:"))?.trim().parse().ok()
}

fn collect(dir: &Path, pids: &mut BTreeSet<i32>) -> io::Result<()> {
    let gone = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
    match fs::read_to_string(dir.join("cgroup.procs")) {
        // 0 is a process outside of our pid namespace: none that we may touch.
        Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0)),
        // A threaded cgroup lists its processes at the domain above it, where others are listed too; here it has its threads. runc
        // makes such ones below a cgroup that holds processes itself.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            match fs::read_to_string(dir.join("cgroup.threads")) {
                Ok(text) => pids.extend(text.lines().filter_map(|l| leader(l.parse().ok()?))),
                Err(e) if gone(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Err(e) if gone(&e) => {}
        Err(e) => return Err(e),
    }
    let entries = match fs::read_dir(dir) {
        Err(e) if gone(&e) => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), pids)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// What runc makes of a container's cgroup whose parent holds processes: `cgroup.procs` cannot be read, `cgroup.kill` does nothing.
    #[test]
    fn processes_in_a_threaded_cgroup_are_listed_and_killed() {
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(Path::new)
            .into_iter()
            .find(|d| d.join("cgroup.procs").exists() && !d.join("freezer.state").exists());
        let dir = root.map(|r| r.join(format!("transship-threaded-{}", std::process::id())));
        let Some(dir) = dir.filter(|d| fs::create_dir_all(d.join("c")).is_ok()) else {
            return println!("skipped: no cgroup v2 that we may write to");
        };
        fs::write(dir.join("c/cgroup.type"), "threaded").unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        fs::write(dir.join("c/cgroup.threads"), child.id().to_string()).unwrap();
        assert_eq!(
            fs::read(dir.join("c/cgroup.procs")).unwrap_err().raw_os_error(),
            Some(libc::EOPNOTSUPP),
            "it is threaded"
        );
        let freezer = Freezer::at(Kind::V2, dir.join("c"));
        let listed = freezer.pids();
        let killer = {
            let freezer = freezer.clone();
            std::thread::spawn(move || freezer.kill_all(Duration::from_secs(5)))
        };
        // a zombie is listed until it is collected
        let until = Instant::now() + Duration::from_secs(5);
        let mut ended = None;
        while ended.is_none() && Instant::now() < until {
            ended = child.try_wait().unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        let killed = killer.join().unwrap();
        for d in [dir.join("c"), dir] {
            fs::remove_dir(d).unwrap();
        }
        assert_eq!(listed.unwrap(), [child.id() as i32].into());
        assert!(ended.is_some(), "it was not killed");
        killed.unwrap();
    }
}
