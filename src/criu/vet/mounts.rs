//! The mount table: `mountpoints-*.img`.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use super::{Caps, Measure, Subject, image, namespaces};
use crate::criu::options::{MASKED_FILE, resolve_in_root};
use crate::policy::{self, model::Spec};

const MNTS_MAGIC: u32 = 0x5556_3928;

/// `mnt_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    #[prost(uint32, required, tag = "1")]
    pub kind: u32,
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
    #[prost(uint32, required, tag = "3")]
    pub device: u32,
    #[prost(uint32, required, tag = "4")]
    pub parent: u32,
    #[prost(uint32, required, tag = "5")]
    pub flags: u32,
    #[prost(string, required, tag = "6")]
    pub root: String,
    #[prost(string, required, tag = "7")]
    pub at: String,
    #[prost(bool, optional, tag = "12")]
    pub with_plugin: Option<bool>,
    #[prost(bool, optional, tag = "13")]
    pub external: Option<bool>,
    #[prost(string, optional, tag = "14")]
    pub fsname: Option<String>,
    #[prost(bool, optional, tag = "16")]
    pub deleted: Option<bool>,
    #[prost(uint32, optional, tag = "17")]
    pub sb_flags: Option<u32>,
    #[prost(string, optional, tag = "18")]
    pub key: Option<String>,
}

// images/mnt.proto
pub const PROC: u32 = 1;
pub const SYSFS: u32 = 2;
pub const TMPFS: u32 = 5;
pub const DEVPTS: u32 = 6;
const CGROUP: u32 = 12;
const MQUEUE: u32 = 14;
const AUTO: u32 = 16;
const CGROUP2: u32 = 23;

/// File systems that only a spec of this node's may ask for, by the spec's word.
const OTHERS: [(&str, u32); 9] = [
    ("devtmpfs", 3),
    ("binfmt_misc", 4),
    ("pstore", 8),
    ("securityfs", 9),
    ("fusectl", 10),
    ("debugfs", 11),
    ("fuse", 15),
    ("overlay", 17),
    ("tracefs", 19),
];

/// Where crun's folder for masked ones lies, below its `--root`.
const EMPTY_DIRECTORY: &str = "/.empty-directory";

/// Flags of a mount that take something away, by the word of a spec that sets and the one that clears it.
const FLAGS: [(u32, &str, &str); 3] = [
    (libc::MS_NOSUID as u32, "nosuid", "suid"),
    (libc::MS_NODEV as u32, "nodev", "dev"),
    (libc::MS_NOEXEC as u32, "noexec", "exec"),
];

impl Mount {
    /// By which name runc knows what is mounted there, if it is runc that brings it.
    fn outside(&self) -> Option<&str> {
        match (&self.key, self.external) {
            (Some(key), _) => Some(key),
            // older CRIU
            (None, Some(true)) => Some(&self.root),
            _ => None,
        }
    }

    fn is_readonly(&self) -> bool {
        (self.flags | self.sb_flags.unwrap_or(0)) & libc::MS_RDONLY as u32 != 0
    }
}

/// What the spec says of the mounts, with links in the root followed.
struct Expected {
    /// Type, external, read-only, by place. One that stands there twice is mounted twice.
    mounts: HashMap<String, Vec<Wanted>>,
    masked: HashSet<String>,
    readonly: HashSet<String>,
    devices: HashSet<String>,
    /// The spec makes the root read-only.
    readonly_root: bool,
    /// It has a cgroup namespace of its own.
    own_cgroups: bool,
    /// What would allow a path that is not masked.
    unmasked: String,
}

#[derive(Clone)]
struct Wanted {
    kind: Option<u32>,
    /// A type that is known by its name alone.
    named: Option<String>,
    bind: bool,
    /// With what is mounted below.
    whole: bool,
    readonly: bool,
    /// Of [`FLAGS`].
    flags: u32,
}

impl Wanted {
    fn of(mount: &policy::model::Mount, measure: &Measure<'_>) -> Wanted {
        let local = matches!(measure, Measure::Spec { .. });
        let word = mount.kind.as_deref();
        let kind = match word {
            Some("proc") => Some(PROC),
            Some("sysfs") => Some(SYSFS),
            Some("tmpfs") => Some(TMPFS),
            Some("devpts") => Some(DEVPTS),
            Some("mqueue") => Some(MQUEUE),
            Some("cgroup" | "cgroup2") => Some(CGROUP),
            other => OTHERS.iter().find(|(name, _)| local && Some(*name) == other).map(|(_, kind)| *kind),
        };
        let named = word.filter(|_| local && kind.is_none()).map(str::to_string);
        let mut flags = 0;
        for option in mount.options() {
            for (flag, sets, clears) in FLAGS {
                flags = if option == sets { flags | flag } else { flags };
                flags = if option == clears { flags & !flag } else { flags };
            }
        }
        // a dump of ours is of a container whose folders are listed: nothing else is mounted there
        let whole = local && mount.is_bind() && mount.options().any(|o| o == "rbind");
        Wanted { kind, named, bind: mount.is_bind(), whole, readonly: mount.is_readonly(), flags }
    }

    fn is(&self, mount: &Mount) -> bool {
        if self.bind {
            return false;
        }
        let kind = if mount.kind == CGROUP2 { CGROUP } else { mount.kind };
        let by_name = || {
            let named = mount.kind == AUTO && mount.fsname.is_some();
            named && self.named == mount.fsname
        };
        self.kind.is_some_and(|k| k == kind || k == CGROUP && kind == TMPFS) || by_name()
    }
}

pub(super) fn check(subject: &Subject<'_>, spec: &Spec, caps: Caps) -> Result<()> {
    if caps.has("CAP_SYS_ADMIN") {
        return Ok(()); // it may have made mounts of its own
    }
    let mut tables = image::all(subject.images, "mountpoints-")?;
    let Some((_, table)) = tables.pop() else { bail!("the checkpoint has no table of mounts") };
    ensure!(tables.is_empty(), "the checkpoint has several mount namespaces, which takes CAP_SYS_ADMIN");
    let mounts: Vec<Mount> = image::read(&table, MNTS_MAGIC)?.unwrap_or_default();
    let rootfs = subject.bundle.join("rootfs");
    let expected = Expected::of(spec, &subject.measure, &|path| resolve_in_root(&rootfs, path));
    let unmasked = subject.measure.policy().map(|p| p.unmasked_paths.as_slice()).unwrap_or_default();
    let here = |path: &str| Path::new(path).exists() && !unmasked.iter().any(|p| p == path);
    table_fits(&mounts, &expected, &here)?;
    let root =
        nix::fcntl::open(&rootfs, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("opening {}", rootfs.display()))?;
    mounts.iter().try_for_each(|m| no_link(&root, &m.at))
}

impl Expected {
    /// Below a folder that comes with all that is mounted in it: then CRIU has noted a tmpfs there, and makes a new one.
    fn brought_whole(&self, at: &str) -> bool {
        let mut above = at;
        while let Some((parent, _)) = above.rsplit_once('/').filter(|(parent, _)| !parent.is_empty()) {
            if self.mounts.get(parent).into_iter().flatten().any(|w| w.whole) {
                return true;
            }
            above = parent;
        }
        false
    }

    fn of(spec: &Spec, measure: &Measure<'_>, resolve: &dyn Fn(&str) -> String) -> Expected {
        let mut mounts: HashMap<String, Vec<Wanted>> = HashMap::new();
        for mount in spec.mounts.iter().flatten() {
            mounts.entry(resolve(&mount.destination)).or_default().push(Wanted::of(mount, measure));
        }
        let linux = spec.linux.as_ref();
        let paths = |list: Option<&Vec<String>>| list.into_iter().flatten().map(|p| resolve(p)).collect();
        let own = linux.iter().flat_map(|l| l.devices.iter().flatten()).map(|d| resolve(&d.path));
        let usual = ["null", "zero", "full", "random", "urandom", "tty"].map(|d| format!("/dev/{d}"));
        Expected {
            mounts,
            masked: paths(linux.and_then(|l| l.masked_paths.as_ref())),
            readonly: paths(linux.and_then(|l| l.readonly_paths.as_ref())),
            devices: own.chain(usual).collect(),
            readonly_root: spec.root.as_ref().is_some_and(|r| r.readonly == Some(true)),
            own_cgroups: namespaces::has_own(spec, "cgroup"),
            unmasked: measure.allowed_by("unmasked_paths"),
        }
    }
}

/// Pure. `here` tells whether a path that is to be masked exists on this node.
fn table_fits(mounts: &[Mount], expected: &Expected, here: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for mount in mounts {
        let at = mount.at.as_str();
        ensure!(plain(at) && at.starts_with('/'), "the checkpoint mounts something at {at:?}");
        ensure!(plain(&mount.root), "the checkpoint mounts {:?} at {at}", mount.root);
        let known = expected.mounts.get(at).into_iter().flatten().any(|w| w.is(mount));
        let plugin = mount.with_plugin == Some(true)
            || mount.deleted == Some(true)
            || mount.kind == AUTO && !known && mount.outside().is_none();
        ensure!(!plugin, "the checkpoint mounts something unusual at {at}");
        let times = seen.entry(at).or_default();
        *times += 1;
        let allowed = expected.mounts.get(at).map_or(1, Vec::len);
        ensure!(*times <= allowed, "the checkpoint mounts at {at} more often than the spec");
        let told = || format!("the checkpoint's mount at {at}");
        one(mount, mounts, expected).with_context(told)?;
        // CRIU takes mounts of one device for bind mounts of one another
        for other in mounts.iter().filter(|o| o.device == mount.device && o.id != mount.id) {
            alike(mount, other).with_context(told)?;
        }
    }
    for path in &expected.readonly {
        let there = covering(mounts, path).filter(|m| m.is_readonly());
        covered(mounts, path, there.is_some(), ("read-only", &expected.unmasked), here)?;
    }
    for path in &expected.masked {
        covered(mounts, path, covering(mounts, path).is_some(), ("masked", &expected.unmasked), here)?;
    }
    Ok(())
}

/// What is mounted at a path, on top of what the path lies in.
fn covering<'a>(mounts: &'a [Mount], path: &str) -> Option<&'a Mount> {
    let top = surrounding(mounts, path)?;
    mounts.iter().find(|m| m.at == path && m.parent == top.id)
}

/// The mount in which a path lies.
fn surrounding<'a>(mounts: &'a [Mount], path: &str) -> Option<&'a Mount> {
    let below = |m: &&Mount| {
        m.at != path && (m.at == "/" || path.strip_prefix(m.at.as_str()).is_some_and(|r| r.starts_with('/')))
    };
    mounts.iter().filter(below).max_by_key(|m| m.at.len())
}

fn covered(
    mounts: &[Mount],
    path: &str,
    is: bool,
    (how, advice): (&str, &str),
    here: &dyn Fn(&str) -> bool,
) -> Result<()> {
    // what is not in a file system of the node's has nothing of the node's to show
    let reachable = surrounding(mounts, path).is_some_and(|m| matches!(m.kind, PROC | SYSFS));
    if is || !reachable || !here(path) {
        return Ok(());
    }
    bail!("the checkpoint does not have {path} {how}, which exists on this node; {advice}")
}

fn alike(mount: &Mount, other: &Mount) -> Result<()> {
    let inside = |m: &Mount| m.at != "/" && m.outside().is_none();
    let both = inside(mount) && inside(other);
    ensure!(!both || mount.kind == other.kind, "it and that at {} are said to be one", other.at);
    let own = |m: &Mount| m.outside().is_some_and(|key| key == m.at) && !m.at.starts_with("/dev/");
    ensure!(!inside(mount) || !own(other), "it is said to be what runc brings for {}", other.at);
    Ok(())
}

fn one(mount: &Mount, mounts: &[Mount], expected: &Expected) -> Result<()> {
    let at = mount.at.as_str();
    if at == "/" {
        // runc brings it, but CRIU makes it read-only, or not
        ensure!(mount.is_readonly() || !expected.readonly_root, "it can be written to");
        return Ok(());
    }
    if let Some(key) = mount.outside() {
        return from_outside(mount, key, expected);
    }
    let wanted = expected.mounts.get(at).map(Vec::as_slice).unwrap_or_default();
    if expected.masked.contains(at) {
        ensure!(mount.kind == TMPFS && mount.root == "/", "a mask that is none (type {})", mount.kind);
        return Ok(());
    }
    if expected.readonly.contains(at) {
        // a bind mount of the very place
        let fits = surrounding(mounts, at).is_some_and(|m| {
            let below = at.strip_prefix(m.at.trim_end_matches('/')).unwrap_or_default();
            let there = [m.root.trim_end_matches('/'), below].concat();
            (m.device, m.kind) == (mount.device, mount.kind) && mount.root == there
        });
        ensure!(fits, "it shows {} there", mount.root);
        ensure!(mount.is_readonly(), "it can be written to");
        return Ok(());
    }
    if at == "/dev/console" {
        let number = mount.root.strip_prefix('/').unwrap_or_default();
        let fine = mount.kind == DEVPTS && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        ensure!(fine, "it shows {} there", mount.root);
        return Ok(());
    }
    ensure!(mount.root == "/", "it shows {} there, not the whole of a file system", mount.root);
    if mount.kind == TMPFS && expected.brought_whole(at) {
        return Ok(());
    }
    // with a cgroup namespace of its own the hierarchies of cgroup v1 lie in a tmpfs there
    let hierarchy = mount.kind == CGROUP && mount.is_readonly() && expected.own_cgroups;
    let above = at.rsplit_once('/').filter(|_| hierarchy).and_then(|(parent, _)| expected.mounts.get(parent));
    let mut wanted = wanted.iter().chain(above.into_iter().flatten());
    let Some(fits) = wanted.find(|w| w.is(mount)) else {
        bail!("the spec has no such mount (type {})", mount.kind);
    };
    // whole hierarchies of cgroup v1 are the node's: runc's come from outside
    ensure!(mount.kind != CGROUP || hierarchy, "a hierarchy of the node's cgroups");
    // runc leaves the tmpfs writable in which it binds the hierarchies of cgroup v1
    let holder = mount.kind == TMPFS && fits.kind == Some(CGROUP);
    ensure!(mount.is_readonly() || !fits.readonly || holder, "it can be written to");
    Ok(())
}

/// What runc brings: from where, it knows itself; but whether it can be written to, the image says.
fn from_outside(mount: &Mount, key: &str, expected: &Expected) -> Result<()> {
    let at = mount.at.as_str();
    let of_crun = key.ends_with(EMPTY_DIRECTORY) && !expected.mounts.contains_key(key);
    let masked = expected.masked.contains(at) && (key == MASKED_FILE || key == at || of_crun);
    if masked || expected.devices.contains(at) && (key == at || key == MASKED_FILE) {
        return Ok(());
    }
    ensure!(key == at, "it is what runc brings for {key}");
    let fits = |w: &&Wanted| w.bind || w.kind == Some(CGROUP);
    let own = expected.mounts.get(at).into_iter().flatten().find(fits);
    // cgroup v1: one bind mount for each hierarchy
    let parent = at.rsplit_once('/').and_then(|(parent, _)| expected.mounts.get(parent));
    let above = parent.into_iter().flatten().find(|w| w.kind == Some(CGROUP));
    let Some(wanted) = own.or(above) else { bail!("the spec has no such mount") };
    ensure!(mount.is_readonly() || !wanted.readonly, "it can be written to");
    let missing = if wanted.bind { wanted.flags & !(mount.flags | mount.sb_flags.unwrap_or(0)) } else { 0 };
    let words: Vec<&str> = FLAGS.iter().filter(|f| missing & f.0 != 0).map(|f| f.1).collect();
    ensure!(words.is_empty(), "it is not {}, as the spec wants it", words.join(", "));
    Ok(())
}

fn plain(path: &str) -> bool {
    path.starts_with('/') && !path.split('/').any(|p| p == "..") && path.len() < libc::PATH_MAX as usize
}

/// CRIU mounts by path, outside of the container: a link in the writable layer must not lead it elsewhere. What lies in mounts that are only
/// made then cannot be looked at, and has no links.
fn no_link(root: &impl AsFd, at: &str) -> Result<()> {
    let below = PathBuf::from(at.trim_start_matches('/'));
    if below.as_os_str().is_empty() {
        return Ok(());
    }
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW).resolve(
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    );
    match openat2(root.as_fd(), &below, how) {
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        Err(e) => bail!("in the container's root, a link lies on the way to its mount {at} ({})", e.desc()),
    }
}
