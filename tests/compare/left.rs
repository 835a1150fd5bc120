//! What a container has left in the node: files, mounts, cgroups, processes. Looked at from outside, through the node's process 1.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Where containerd keeps the bundles of a namespace.
pub const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";
/// Where containerd keeps their work folders.
pub const WORK: &str = "/var/lib/containerd/io.containerd.runtime.v2.task";

/// The entries of a folder by name, with kind and mode. Nothing if there is no such folder.
pub fn entries(dir: &Path) -> BTreeMap<String, String> {
    let Ok(list) = std::fs::read_dir(dir) else { return BTreeMap::new() };
    let one = |entry: std::fs::DirEntry| {
        let meta = entry.path().symlink_metadata().ok()?;
        let kind = match meta.file_type() {
            t if t.is_dir() => "folder",
            t if t.is_symlink() => "link",
            t if t.is_fifo() => "FIFO",
            t if t.is_socket() => "socket",
            _ => "file",
        };
        let text = format!("{kind} {:o} {}:{}", meta.permissions().mode() & 0o7777, meta.uid(), meta.gid());
        Some((entry.file_name().to_string_lossy().into_owned(), text))
    };
    list.flatten().filter_map(one).collect()
}

/// What there is of a namespace's containers in the node whose process 1 is `pid`, by kind.
pub fn findings(pid: u32, namespace: &str, roots: &[&str]) -> BTreeMap<&'static str, Vec<String>> {
    let root = Path::new("/proc").join(pid.to_string()).join("root");
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    let mut found = BTreeMap::new();
    let names = |path: &str| {
        let dir = inside(path).join(namespace);
        entries(&dir).into_keys().collect::<Vec<_>>()
    };
    found.insert("bundles", names(BUNDLES));
    found.insert("work folders", names(WORK));
    found.insert("runc's state", roots.iter().flat_map(|root| names(root)).collect());
    found.insert("cgroups", cgroups(&inside("/sys/fs/cgroup"), namespace));
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let below = format!("/{namespace}/");
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    found.insert("mounts", points.filter(|p| p.contains(&below)).map(str::to_owned).collect());
    found.insert("processes", processes(pid, namespace));
    found
}

/// The cgroups of a namespace's containers, over all hierarchies.
pub fn cgroups(top: &Path, namespace: &str) -> Vec<String> {
    let hierarchies = std::fs::read_dir(top).into_iter().flatten().flatten().map(|e| e.path());
    let mut all: Vec<String> = Vec::new();
    for dir in hierarchies.chain([top.to_path_buf()]) {
        let Ok(list) = std::fs::read_dir(dir.join(namespace)) else { continue };
        for entry in list.flatten().filter(|e| e.path().is_dir()) {
            all.push(entry.path().strip_prefix(top).unwrap_or(&entry.path()).display().to_string());
        }
    }
    all.sort();
    all.dedup();
    all
}

/// Processes of the node that are in one of these cgroups, or have the namespace as a word of their command line: shims.
fn processes(pid: u32, namespace: &str) -> Vec<String> {
    let pid_namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = pid_namespace(&pid.to_string());
    let below = format!("/{namespace}/");
    let list = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = list.filter_map(|e| e.file_name().to_str().map(str::to_owned));
    let mut found = Vec::new();
    for other in pids.filter(|p| p.bytes().all(|b| b.is_ascii_digit())) {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{other}/{name}")).unwrap_or_default();
        let line = read("cmdline");
        let shim = line.split('\0').any(|word| word == namespace) && pid_namespace(&other) == own;
        if shim || read("cgroup").contains(&below) {
            found.push(line.split('\0').next().unwrap_or_default().to_owned());
        }
    }
    found.sort();
    found
}
