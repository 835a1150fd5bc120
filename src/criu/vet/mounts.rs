//! The mount table: `mountpoints-*.img`.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use super::tasks::allowed_by;
use super::{Subject, image};
use crate::criu::options::{MASKED_FILE, resolve_in_root};
use crate::policy::model::Spec;

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
}

#[derive(Clone, Copy)]
struct Wanted {
    kind: Option<u32>,
    bind: bool,
    readonly: bool,
}

pub(super) fn check(subject: &Subject<'_>, spec: &Spec) -> Result<()> {
    let mut tables = image::all(subject.images, "mountpoints-")?;
    let Some((_, table)) = tables.pop() else { bail!("the checkpoint has no table of mounts") };
    ensure!(tables.is_empty(), "the checkpoint has several mount namespaces, which takes CAP_SYS_ADMIN");
    let mounts: Vec<Mount> = image::read(&table, MNTS_MAGIC)?.unwrap_or_default();
    let rootfs = subject.bundle.join("rootfs");
    let expected = Expected::of(spec, &|path| resolve_in_root(&rootfs, path));
    let here =
        |path: &str| Path::new(path).exists() && !subject.policy.unmasked_paths.iter().any(|p| p == path);
    table_fits(&mounts, &expected, &here)?;
    let root =
        nix::fcntl::open(&rootfs, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("opening {}", rootfs.display()))?;
    mounts.iter().try_for_each(|m| no_link(&root, &m.at))
}

impl Expected {
    fn of(spec: &Spec, resolve: &dyn Fn(&str) -> String) -> Expected {
        let mut mounts: HashMap<String, Vec<Wanted>> = HashMap::new();
        for mount in spec.mounts.iter().flatten() {
            let kind = match mount.kind.as_deref() {
                Some("proc") => Some(PROC),
                Some("sysfs") => Some(SYSFS),
                Some("tmpfs") => Some(TMPFS),
                Some("devpts") => Some(DEVPTS),
                Some("mqueue") => Some(MQUEUE),
                Some("cgroup" | "cgroup2") => Some(CGROUP),
                _ => None,
            };
            let wanted = Wanted { kind, bind: mount.is_bind(), readonly: mount.is_readonly() };
            mounts.entry(resolve(&mount.destination)).or_default().push(wanted);
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
        let plugin = mount.with_plugin == Some(true) || mount.deleted == Some(true) || mount.kind == AUTO;
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
        covered(mounts, path, there.is_some(), "read-only", here)?;
    }
    for path in &expected.masked {
        covered(mounts, path, covering(mounts, path).is_some(), "masked", here)?;
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

fn covered(mounts: &[Mount], path: &str, is: bool, how: &str, here: &dyn Fn(&str) -> bool) -> Result<()> {
    // what is not in a file system of the node's has nothing of the node's to show
    let reachable = surrounding(mounts, path).is_some_and(|m| matches!(m.kind, PROC | SYSFS));
    if is || !reachable || !here(path) {
        return Ok(());
    }
    bail!(
        "the checkpoint does not have {path} {how}, which exists on this node; {}",
        allowed_by("unmasked_paths")
    )
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
        return Ok(()); // runc's, whatever the image says
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
            let there = [m.at.trim_end_matches('/'), mount.root.as_str()].concat();
            (m.device, m.kind) == (mount.device, mount.kind) && m.root == "/" && there == at
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
    let kind = if mount.kind == CGROUP2 { CGROUP } else { mount.kind };
    let fits =
        wanted.iter().find(|w| !w.bind && w.kind.is_some_and(|k| k == kind || k == CGROUP && kind == TMPFS));
    let Some(fits) = fits else {
        bail!("the spec has no such mount (type {})", mount.kind);
    };
    // whole hierarchies of cgroup v1 are the node's: runc's come from outside
    ensure!(mount.kind != CGROUP, "a hierarchy of the node's cgroups");
    ensure!(mount.is_readonly() || !fits.readonly, "it can be written to");
    Ok(())
}

/// What runc brings: from where, it knows itself; but whether it can be written to, the image says.
fn from_outside(mount: &Mount, key: &str, expected: &Expected) -> Result<()> {
    let at = mount.at.as_str();
    let masked = expected.masked.contains(at) && (key == MASKED_FILE || key == at);
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
