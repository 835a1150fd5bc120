//! Which directory is the writable layer: containerd's mounts read as text. Pure; no file is touched here.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::OverlayXattrs;

/// One mount as containerd describes it (`types.Mount` of its snapshots and tasks API, whichever crate's struct).
#[derive(Clone, Copy, Debug)]
pub struct MountSpec<'a> {
    /// `overlay`, `bind`, `ext4`...
    pub kind: &'a str,
    /// A device or directory; `overlay` for overlayfs.
    pub source: &'a str,
    /// One option an element.
    pub options: &'a [String],
}

/// What the directory of a [`WritableLayer`] holds. Both sides of a migration must have the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LayerKind {
    /// overlayfs' upper directory: only what differs from the image.
    Overlay {
        /// The mount keeps its marks in `user.overlay.*` instead of `trusted.overlay.*` (option `userxattr`).
        userxattr: bool,
    },
    /// The container's whole tree (native snapshotter, a block device). The destination's directory starts as a copy of
    /// the image and is emptied before the entries are applied.
    Full,
}

impl LayerKind {
    /// Which extended attributes are overlayfs' own marks in a layer of this kind.
    pub fn overlay_xattrs(self) -> OverlayXattrs {
        match self {
            LayerKind::Overlay { userxattr: false } => OverlayXattrs::Trusted,
            LayerKind::Overlay { userxattr: true } => OverlayXattrs::User,
            LayerKind::Full => OverlayXattrs::None,
        }
    }
}

/// The directory that holds what the container has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritableLayer {
    /// Where it is on this node.
    pub dir: PathBuf,
    /// What it holds.
    pub kind: LayerKind,
}

impl WritableLayer {
    /// Reads the mounts of a container's root filesystem. `rootfs` is where they are mounted, if they are: it is needed
    /// for snapshotters that mount a block device, whose content can be reached in no other way.
    ///
    /// # Errors
    /// No writable layer (a read-only view), several mounts, or a filesystem that is not known here.
    pub fn from_mounts(mounts: &[MountSpec<'_>], rootfs: Option<&Path>) -> Result<Self> {
        let mount = match mounts {
            [one] => one,
            [] => bail!("the container has no root filesystem mount, so its writable layer cannot be found"),
            many => bail!(
                "the container's root filesystem is made of {} mounts ({}); only snapshotters with one mount are supported",
                many.len(),
                many.iter().map(|m| m.kind).collect::<Vec<_>>().join(", ")
            ),
        };
        let has = |name: &str| mount.options.iter().any(|o| o == name);
        if has("ro") {
            bail!("the container's root filesystem ({} {}) is mounted read-only", mount.kind, mount.source);
        }
        match mount.kind {
            "overlay" => {
                let Some(upper) = mount.options.iter().find_map(|o| o.strip_prefix("upperdir=")) else {
                    bail!("the container's overlay mount has no upperdir: it is a read-only view");
                };
                let kind = LayerKind::Overlay { userxattr: has("userxattr") };
                Ok(WritableLayer { dir: absolute(upper, "upperdir")?, kind })
            }
            // The native snapshotter, and the overlayfs snapshotter for a snapshot without a parent. containerd writes
            // "bind"; mount(2) itself takes any type together with the option.
            kind if kind == "bind" || has("bind") || has("rbind") => {
                Ok(WritableLayer { dir: absolute(mount.source, "bind source")?, kind: LayerKind::Full })
            }
            "ext4" | "ext3" | "ext2" | "xfs" | "btrfs" | "zfs" => match rootfs {
                Some(dir) => Ok(WritableLayer { dir: dir.to_owned(), kind: LayerKind::Full }),
                None => {
                    bail!("the writable layer is on {} {}, which is not mounted", mount.kind, mount.source)
                }
            },
            other => bail!(
                "the writable layer is a mount of type {other:?}, which is not supported \
                 (supported: overlay, bind, ext4, xfs, btrfs, zfs)"
            ),
        }
    }
}

/// A path that does not depend on the working directory.
fn absolute(path: &str, what: &str) -> Result<PathBuf> {
    if !path.starts_with('/') {
        bail!("the {what} {path:?} of the container's root filesystem is not an absolute path");
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, source: &str, options: &[&str], rootfs: Option<&str>) -> Result<WritableLayer> {
        let options: Vec<String> = options.iter().map(|o| o.to_string()).collect();
        WritableLayer::from_mounts(&[MountSpec { kind, source, options: &options }], rootfs.map(Path::new))
    }

    #[test]
    fn overlay_upper() {
        let options = ["index=off", "workdir=/s/7/work", "upperdir=/s/7/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let layer = read("overlay", "overlay", &options, None).unwrap();
        assert_eq!(
            layer,
            WritableLayer { dir: "/s/7/fs".into(), kind: LayerKind::Overlay { userxattr: false } }
        );
        let layer = read("overlay", "overlay", &["userxattr", "upperdir=/s/7/fs"], None).unwrap();
        assert_eq!(layer.kind, LayerKind::Overlay { userxattr: true });
        assert_eq!(layer.kind.overlay_xattrs(), OverlayXattrs::User);
    }

    #[test]
    fn whole_trees() {
        let layer = read("bind", "/s/7", &["rw", "rbind"], None).unwrap();
        assert_eq!(layer, WritableLayer { dir: "/s/7".into(), kind: LayerKind::Full });
        let layer = read("ext4", "/dev/dm-3", &["rw"], Some("/run/c/rootfs")).unwrap();
        assert_eq!(layer, WritableLayer { dir: "/run/c/rootfs".into(), kind: LayerKind::Full });
    }

    #[test]
    fn refusals_say_why() {
        let text = |r: Result<WritableLayer>| r.unwrap_err().to_string();
        assert!(text(read("overlay", "overlay", &["lowerdir=/a:/b"], None)).contains("no upperdir"));
        assert!(text(read("bind", "/s/7", &["ro", "rbind"], None)).contains("read-only"));
        assert!(text(read("ext4", "/dev/dm-3", &[], None)).contains("not mounted"));
        assert!(text(read("erofs", "/x", &[], None)).contains("erofs"));
        assert!(text(read("overlay", "overlay", &["upperdir=fs"], None)).contains("absolute"));
        assert!(text(WritableLayer::from_mounts(&[], None)).contains("no root filesystem"));
        let two = [MountSpec { kind: "erofs", source: "/a", options: &[] }; 2];
        assert!(text(WritableLayer::from_mounts(&two, None)).contains("2 mounts (erofs, erofs)"));
    }
}
