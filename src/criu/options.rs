//! What a dump is asked for: options such that stock `runc restore` (1.1 to 1.3) of the result works, on another node.
//!
//! [`dump_options`] is a pure function of the spec and of [`Facts`] about the running container; [`Facts::gather`] does the looking.
//! The rules are those of runc's checkpoint (libcontainer/criu_linux.go), with these differences:
//! - the network namespace is always external, also when the spec has no path: on the destination the spec gets one;
//! - the network is not locked by CRIU: we fence it;
//! - the tasks are left where they are, frozen.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use super::rpc::{CgMode, CriuOpts, ExtMount, NetworkLock};
use crate::cgroup;

/// The key under which runc's restore passes the network namespace.
pub const EXT_NETNS: &str = "extRootNetNS";
/// The key under which runc's restore passes the pid namespace.
pub const EXT_PIDNS: &str = "extRootPidNS";

/// What masked files are bind mounts of, and by which name the images know them all.
pub const MASKED_FILE: &str = "/dev/null";

/// Character devices that runc puts into every container besides those of the spec.
const DEFAULT_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/random", "/dev/full", "/dev/tty", "/dev/zero", "/dev/urandom"];

/// What an operator may set.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Largest deleted-but-open file that is carried along, bytes.
    pub ghost_limit: u32,
    /// CRIU's log level, 0 to 4.
    pub log_level: i32,
    /// Seconds that seizing the (frozen) tasks may take.
    pub seize_timeout: u32,
    /// Drop TCP connections that no process has accepted yet, instead of failing.
    pub tcp_skip_in_flight: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { ghost_limit: 64 << 20, log_level: 4, seize_timeout: 10, tcp_skip_in_flight: false }
    }
}

/// What a look at the running container tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The init's pid, as we see it.
    pub pid: i32,
    /// The root file system as the host sees it.
    pub rootfs: PathBuf,
    /// Inode of the init's network namespace.
    pub netns: u64,
    /// Inode of the pid namespace that the spec names by path, if it does.
    pub pidns: Option<u64>,
    /// Directory of the cgroup that is frozen.
    pub freezer: PathBuf,
    /// Names of the mounted v1 hierarchies (`cpu`, `freezer`, `cpu,cpuacct` ...); empty where there is only v2.
    pub v1_hierarchies: Vec<String>,
    /// Those of the spec's masked paths that are files in the container.
    pub masked_files: Vec<String>,
    /// Those that are directories under a bind mount: crun's; runc mounts a tmpfs of its own over each.
    pub masked_binds: Vec<String>,
    /// Mount destinations and device paths whose place differs because of symbolic links in the root file system.
    pub resolved: BTreeMap<String, String>,
}

impl Facts {
    /// Looks at a container. `rootfs` is the host's path of its root (`bundle/rootfs`).
    pub fn gather(spec: &Spec, pid: i32, rootfs: &Path, freezer: &Path) -> Result<Self> {
        let inode = |path: &Path| {
            path.metadata().map(|m| m.ino()).with_context(|| format!("reading {}", path.display()))
        };
        let pidns = namespace(spec, LinuxNamespaceType::Pid).flatten().map(|p| inode(&p)).transpose()?;
        let v1_hierarchies = if cgroup::is_unified() { Vec::new() } else { cgroup::v1_hierarchies()? };
        let mut facts = Self {
            pid,
            rootfs: rootfs.to_owned(),
            netns: inode(Path::new(&format!("/proc/{pid}/ns/net")))?,
            pidns,
            freezer: freezer.to_owned(),
            v1_hierarchies,
            ..Self::default()
        };
        if let Some(paths) = spec.linux().as_ref().and_then(|l| l.masked_paths().as_ref()) {
            let is_file = |p: &&String| {
                let there = format!("/proc/{pid}/root/{}", p.trim_start_matches('/'));
                std::fs::metadata(there).is_ok_and(|m| !m.is_dir())
            };
            facts.masked_files = paths.iter().filter(is_file).cloned().collect();
            let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))
                .with_context(|| format!("reading the mounts of {pid}"))?;
            let is_bind = |p: &&String| !facts.masked_files.contains(p) && is_bind_of_directory(&mounts, p);
            facts.masked_binds = paths.iter().filter(is_bind).cloned().collect();
        }
        for path in external_paths(spec, &facts.v1_hierarchies) {
            let place = resolve_in_root(rootfs, &path);
            if place != path {
                facts.resolved.insert(path, place);
            }
        }
        Ok(facts)
    }
}

/// Whether the last mount at `path` in this mountinfo shows less than a whole file system, as a bind mount does.
fn is_bind_of_directory(mountinfo: &str, path: &str) -> bool {
    let mut roots = mountinfo.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(3);
        let (root, at) = (words.next()?, words.next()?);
        (at == path).then_some(root)
    });
    roots.next_back().is_some_and(|root| root != "/")
}

/// The namespace of this kind in the spec: absent, new (`Some(None)`) or by path.
pub fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    let all = spec.linux().as_ref()?.namespaces().as_ref()?;
    let found = all.iter().find(|n| n.typ() == kind)?;
    Some(found.path().clone().filter(|p| !p.as_os_str().is_empty()))
}

fn is_bind(mount: &Mount) -> bool {
    let option = |o: &String| matches!(o.as_str(), "bind" | "rbind");
    mount.typ().as_deref() == Some("bind")
        || mount.options().as_ref().is_some_and(|all| all.iter().any(option))
}

/// Paths in the container whose mounts are the restorer's, in runc's order.
fn external_paths(spec: &Spec, v1_hierarchies: &[String]) -> Vec<String> {
    let own_cgroupns = namespace(spec, LinuxNamespaceType::Cgroup).is_some();
    let mut paths = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let at = mount.destination().to_string_lossy().into_owned();
        if is_bind(mount) {
            paths.push(at);
        } else if mount.typ().as_deref() == Some("cgroup") && !own_cgroupns {
            // Without a cgroup namespace runc binds every v1 hierarchy into a tmpfs.
            paths.extend(v1_hierarchies.iter().map(|h| format!("{}/{h}", at.trim_end_matches('/'))));
        }
    }
    let devices = spec.linux().as_ref().and_then(|l| l.devices().as_ref());
    let named: Vec<String> =
        devices.into_iter().flatten().map(|d| d.path().to_string_lossy().into_owned()).collect();
    let default = DEFAULT_DEVICES.iter().map(|d| (*d).to_owned()).filter(|d| !named.contains(d));
    paths.extend(default);
    paths.extend(named.iter().cloned());
    paths
}

/// Whether a dump of ours has no paths of cgroups in its images (see `cgroup_image`): the tasks then inherit the cgroups of the restoring
/// CRIU, which runc has put into the container's; that works with `runc restore`'s default mode, the only one of runc 1.1. Not with
/// a private cgroup namespace, which CRIU 4.2 loses when it ignores cgroups (runc #5417); runc passes the new root on restore.
pub fn leaves_cgroups_out(spec: &Spec) -> bool {
    !matches!(namespace(spec, LinuxNamespaceType::Cgroup), Some(None))
}

/// The cgroup of a container whose tasks must be put there by the restorer, because the dump has left it out; from its bundle.
pub fn cgroup_left_out(bundle: &Path) -> Result<Option<String>> {
    let config = bundle.join("config.json");
    let spec = Spec::load(&config).with_context(|| format!("reading {}", config.display()))?;
    let path = spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref());
    Ok(path.filter(|_| leaves_cgroups_out(&spec)).map(|p| p.to_string_lossy().into_owned()))
}

/// The options of a DUMP. Directories, page server and notifications are [`super::dump`]'s.
pub fn dump_options(spec: &Spec, facts: &Facts, limits: &Limits) -> Result<CriuOpts> {
    let text =
        |p: &Path| p.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", p.display()));
    ensure!(facts.pid > 0, "no init to dump");
    let same = |path: String| {
        let at = facts.resolved.get(&path).cloned().unwrap_or(path);
        ExtMount { key: at.clone(), val: at }
    };
    let mut ext_mnt: Vec<ExtMount> =
        external_paths(spec, &facts.v1_hierarchies).into_iter().map(same).collect();
    // All masked files are the same mount on a restore: /dev/null.
    ext_mnt.extend(facts.masked_files.iter().map(|p| ExtMount { key: p.clone(), val: MASKED_FILE.into() }));
    // crun's restore has an empty directory for each.
    ext_mnt.extend(facts.masked_binds.iter().cloned().map(same));

    let mut external = vec![format!("net[{}]:{EXT_NETNS}", facts.netns)];
    external.extend(facts.pidns.map(|ino| format!("pid[{ino}]:{EXT_PIDNS}")));

    let cgroups = if leaves_cgroups_out(spec) { CgMode::Ignore } else { CgMode::Soft };
    Ok(CriuOpts {
        pid: Some(facts.pid),
        root: Some(text(&facts.rootfs)?),
        // With the frozen cgroup given as `freeze_cgroup`: CRIU puts it back to frozen and detaches, so nothing runs.
        leave_running: Some(true),
        freeze_cgroup: Some(text(&facts.freezer)?),
        timeout: Some(limits.seize_timeout),
        ext_mnt,
        external,
        // runc manages no network devices, and says so at both ends.
        empty_ns: Some(libc::CLONE_NEWNET as u32),
        network_lock: Some(NetworkLock::Skip as i32),
        manage_cgroups: Some(true),
        manage_cgroups_mode: Some(cgroups as i32),
        orphan_pts_master: Some(true),
        tcp_established: Some(true),
        tcp_skip_in_flight: Some(limits.tcp_skip_in_flight),
        ext_unix_sk: Some(true),
        file_locks: Some(true),
        link_remap: Some(true),
        ghost_limit: Some(limits.ghost_limit),
        log_level: Some(limits.log_level),
        ..CriuOpts::default()
    })
}

/// Where a path of the container lies when the symbolic links in its root file system are followed without leaving it
/// (what runc does with every mount destination). Components that do not exist are taken as they are.
pub fn resolve_in_root(rootfs: &Path, path: &str) -> String {
    let mut todo: Vec<OsString> = components(Path::new(path));
    todo.reverse();
    let mut at: Vec<OsString> = Vec::new();
    let mut links = 0;
    while let Some(next) = todo.pop() {
        if next == ".." {
            at.pop();
            continue;
        }
        let here: PathBuf = rootfs
            .components()
            .map(|c| c.as_os_str())
            .chain(at.iter().map(|c| c.as_os_str()))
            .chain([&*next])
            .collect();
        match std::fs::read_link(&here) {
            // As many as the kernel follows; then the rest is taken literally.
            Ok(target) if links < 40 => {
                links += 1;
                if target.is_absolute() {
                    at.clear();
                }
                todo.extend(components(&target).into_iter().rev());
            }
            _ => at.push(next),
        }
    }
    let mut out = String::new();
    for c in &at {
        out.push('/');
        out.push_str(&c.to_string_lossy());
    }
    if out.is_empty() { "/".into() } else { out }
}

fn components(path: &Path) -> Vec<OsString> {
    let keep = |c: Component<'_>| match c {
        Component::Normal(c) => Some(c.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.1.0","root":{{"path":"rootfs"}},
            "mounts":[
              {{"destination":"/proc","type":"proc","source":"proc"}},
              {{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup"}},
              {{"destination":"/var/run/secrets","type":"bind","source":"/x","options":["rbind","ro"]}},
              {{"destination":"/etc/hosts","type":"none","source":"/y","options":["bind"]}}],
            "linux":{{"namespaces":[{namespaces}],"maskedPaths":["/proc/kcore","/proc/acpi"],
              "devices":[{{"path":"/dev/fuse","type":"c","major":10,"minor":229}},{{"path":"/dev/null","type":"c","major":1,"minor":3}}]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn facts() -> Facts {
        Facts {
            pid: 42,
            rootfs: "/b/rootfs".into(),
            netns: 4026,
            freezer: "/sys/fs/cgroup/freezer/c".into(),
            v1_hierarchies: vec!["cpu,cpuacct".into(), "freezer".into()],
            masked_files: vec!["/proc/kcore".into()],
            resolved: [("/var/run/secrets".to_owned(), "/run/secrets".to_owned())].into(),
            ..Facts::default()
        }
    }

    fn mounts(o: &CriuOpts) -> Vec<(&str, &str)> {
        o.ext_mnt.iter().map(|m| (m.key.as_str(), m.val.as_str())).collect()
    }

    #[test]
    fn mounts_are_those_that_runc_passes_on_restore() {
        let o = dump_options(&spec(r#"{"type":"pid"},{"type":"network"}"#), &facts(), &Limits::default())
            .unwrap();
        let same = |p| (p, p);
        assert_eq!(
            mounts(&o),
            [
                same("/sys/fs/cgroup/cpu,cpuacct"),
                same("/sys/fs/cgroup/freezer"),
                same("/run/secrets"),
                same("/etc/hosts"),
                same("/dev/random"),
                same("/dev/full"),
                same("/dev/tty"),
                same("/dev/zero"),
                same("/dev/urandom"),
                same("/dev/fuse"),
                same("/dev/null"),
                ("/proc/kcore", "/dev/null"),
            ]
        );
    }

    #[test]
    fn directories_that_crun_masks_are_external_too() {
        let info = "206 205 0:75 / /proc rw - proc proc rw\n\
                    222 206 254:0 /run/r/.empty-directory /proc/acpi ro - ext4 /dev/vda rw\n\
                    225 206 0:80 / /sys/firmware ro - tmpfs tmpfs ro\n";
        assert!(is_bind_of_directory(info, "/proc/acpi"));
        assert!(!is_bind_of_directory(info, "/sys/firmware"), "runc's");
        assert!(!is_bind_of_directory(info, "/proc/scsi"), "none");
        let facts = Facts { masked_binds: vec!["/proc/acpi".into()], ..facts() };
        let o = dump_options(&spec(""), &facts, &Limits::default()).unwrap();
        assert_eq!(mounts(&o).last(), Some(&("/proc/acpi", "/proc/acpi")));
    }

    #[test]
    fn the_network_is_always_external_and_never_locked() {
        for ns in [r#"{"type":"network"}"#, r#"{"type":"network","path":"/run/netns/x"}"#] {
            let o = dump_options(&spec(ns), &facts(), &Limits::default()).unwrap();
            assert_eq!(o.external, ["net[4026]:extRootNetNS"]);
            assert_eq!(o.network_lock, Some(3));
            assert_eq!(o.empty_ns, Some(0x4000_0000));
        }
    }

    #[test]
    fn a_private_cgroup_namespace_needs_the_cgroups_in_the_images() {
        let with = dump_options(&spec(r#"{"type":"cgroup"}"#), &facts(), &Limits::default()).unwrap();
        assert_eq!(with.manage_cgroups_mode, Some(CgMode::Soft as i32));
        assert!(!mounts(&with).iter().any(|m| m.0.starts_with("/sys/fs/cgroup")), "real mounts, not ours");
        let without = dump_options(&spec(""), &facts(), &Limits::default()).unwrap();
        assert_eq!(without.manage_cgroups_mode, Some(CgMode::Ignore as i32));
    }

    #[test]
    fn a_pid_namespace_by_path_is_external() {
        let facts = Facts { pidns: Some(7), ..facts() };
        let o = dump_options(&spec(r#"{"type":"pid","path":"/proc/9/ns/pid"}"#), &facts, &Limits::default())
            .unwrap();
        assert_eq!(o.external, ["net[4026]:extRootNetNS", "pid[7]:extRootPidNS"]);
    }

    #[test]
    fn the_limits_and_the_freezer_are_passed_on() {
        let limits = Limits { ghost_limit: 5, log_level: 1, seize_timeout: 3, tcp_skip_in_flight: true };
        let o = dump_options(&spec(""), &facts(), &limits).unwrap();
        assert_eq!(
            (o.ghost_limit, o.log_level, o.timeout, o.tcp_skip_in_flight),
            (Some(5), Some(1), Some(3), Some(true))
        );
        assert_eq!(o.freeze_cgroup.as_deref(), Some("/sys/fs/cgroup/freezer/c"));
        assert_eq!((o.leave_running, o.tcp_established, o.link_remap), (Some(true), Some(true), Some(true)));
    }

    #[test]
    fn links_are_followed_inside_the_root_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("run/a")).unwrap();
        std::fs::create_dir(root.join("var")).unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, root.join(at)).unwrap();
        link("/run", "var/run");
        link("../../../../run", "var/up");
        link("loop", "loop");
        for (path, want) in [
            ("/var/run/secrets/x", "/run/secrets/x"),
            ("/var/up/a", "/run/a"),
            ("/var/run/../etc", "/etc"),
            ("relative/x", "/relative/x"),
            ("/", "/"),
            ("/../../x", "/x"),
        ] {
            assert_eq!(resolve_in_root(root, path), want, "{path}");
        }
        assert!(resolve_in_root(root, "/loop/x").ends_with("/x"));
    }
}
