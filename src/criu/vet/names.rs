//! Names of the files in a folder of images: `core-1.img`, `descriptors.json`. And what runc reads there itself.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::Measure;
use crate::criu::stdio;
use crate::policy::model::Spec;

/// Names of images, without numbers.
const NAMES: [&str; 45] = [
    "cgroup.img",
    "core-#.img",
    "cpuinfo.img",
    "descriptors.json",
    "eventpoll-tfd.img",
    "fanotify-mark.img",
    "fdinfo-#.img",
    "fifo-data.img",
    "filelocks.img",
    "files.img",
    "fs-#.img",
    "ghost-file-#.img",
    "ids-#.img",
    "inotify-wd.img",
    "inventory.img",
    "ipcns-msg-#.img",
    "ipcns-sem-#.img",
    "ipcns-shm-#.img",
    "ipcns-var-#.img",
    "itimers-#.img",
    "memfd.img",
    "mm-#.img",
    "mountpoints-#.img",
    "netns-#.img",
    "pagemap-#.img",
    "pagemap-shmem-#.img",
    "pages-#.img",
    "pidns-#.img",
    "pipes-data.img",
    "posix-timers-#.img",
    "pstree.img",
    "remap-fpath.img",
    "rlimit-#.img",
    "seccomp.img",
    "sigacts-#.img",
    "signal-p-#.img",
    "signal-s-#.img",
    "sk-queues.img",
    "tcp-stream-#.img",
    "timens-#.img",
    "tmpfs-#.tar.gz.img",
    "tmpfs-dev-#.tar.gz.img",
    "tty-data.img",
    "tty-info.img",
    "utsns-#.img",
];

/// More of them, that only some containers have.
const RARE: [&str; 5] =
    ["userns-#.img", "bpfmap-data.img", "bpfmap-file.img", "stats-dump", "pages-shmem-#.img"];

/// Those of a network namespace, which crun's dumps have: [`super::network`] looks at them.
const NETWORK: [&str; 10] = [
    "netdev-#.img",
    "ifaddr-#.img",
    "route-#.img",
    "route6-#.img",
    "rule-#.img",
    "iptables-#.img",
    "ip6tables-#.img",
    "nftables-#.img",
    "netns-ct-#.img",
    "netns-exp-#.img",
];

/// What CRIU and runc open without `.img` behind it, besides what is listed above.
const PARENT: &str = "parent";

/// The name of an image with `#` in place of a number.
fn kind_of(name: &str) -> String {
    let Some((start, end)) = name.rsplit_once('-').and_then(|(start, rest)| {
        let (number, end) = rest.split_once('.')?;
        // no word among the names is made of such digits alone
        let fine = !number.is_empty() && number.bytes().all(|b| b.is_ascii_hexdigit());
        fine.then_some((start, end))
    }) else {
        return name.into();
    };
    format!("{start}-#.{end}")
}

pub(super) fn is_known(name: &str) -> bool {
    let kind = kind_of(name);
    NAMES.contains(&kind.as_str()) || RARE.contains(&kind.as_str())
}

pub(super) fn check(images: &Path, measure: &Measure<'_>, spec: &Spec) -> Result<()> {
    for entry in std::fs::read_dir(images).with_context(|| format!("reading {}", images.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let kind = entry.file_type()?;
        let text = name.to_string_lossy();
        let fine = match measure {
            // content of tmpfs files, which was put there by ourselves
            Measure::Policy { .. } if kind.is_dir() && text == "staged" => true,
            Measure::Policy { .. } => kind.is_file() && is_known(&text),
            Measure::Spec { parent } if text == PARENT => {
                // CRIU looks there for pages: in any folder of the node that it names
                let to = std::fs::read_link(entry.path()).unwrap_or_default();
                ensure!(
                    !parent.is_empty() && to == Path::new(parent),
                    "the checkpoint has a parent ({}), which it was not to have",
                    to.display()
                );
                true
            }
            // CRIU follows links: it would restore any file of the node as the container's memory
            Measure::Spec { .. } => {
                kind.is_dir() || kind.is_file() && (!text.ends_with(".img") || may_be_a_dumps(&text, spec))
            }
        };
        ensure!(fine, "the checkpoint has an image {name:?}, which a container's has not");
    }
    descriptors(images)
}

/// An image of a dump by an OCI runtime.
fn may_be_a_dumps(name: &str, spec: &Spec) -> bool {
    let of_a_plugin = name.starts_with("amdgpu-") && has_devices(spec);
    is_known(name) || NETWORK.contains(&kind_of(name).as_str()) || of_a_plugin
}

/// Does the spec give it devices? Then CRIU may have a plugin for what it does with them.
pub(super) fn has_devices(spec: &Spec) -> bool {
    spec.linux.iter().any(|l| l.devices.iter().flatten().next().is_some())
}

/// runc has CRIU pass its own descriptor N to the tasks for the N-th name, if that is a pipe's. Only 0, 1 and 2 are the container's; behind
/// them is, among others, the folder of images, through which `..` leads to all of the node.
fn descriptors(images: &Path) -> Result<()> {
    let path = images.join(stdio::FILE);
    let text = match std::fs::symlink_metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Ok(meta) if meta.len() <= 1 << 16 => std::fs::read(&path),
        Ok(meta) => bail!("{} has {} bytes", stdio::FILE, meta.len()),
        Err(e) => Err(e),
    };
    let text = text.with_context(|| format!("reading {}", path.display()))?;
    let names: Option<Vec<Option<String>>> =
        serde_json::from_slice(&text).with_context(|| format!("the checkpoint's {}", stdio::FILE))?;
    let count = names.map_or(0, |n| n.len());
    ensure!(count <= 3, "the checkpoint's {} names {count} descriptors, a container has three", stdio::FILE);
    Ok(())
}
