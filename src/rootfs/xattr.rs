//! Which extended attributes travel with a layer. Pure; reading and writing them is `sys`.
//!
//! overlayfs keeps its marks in attributes of the upper directory (kernel: Documentation/filesystems/overlayfs.rst and
//! fs/overlayfs/overlayfs.h, `enum ovl_xattr`). Some say what the layer means and must arrive; some are file handles of
//! the source's disk; two say that the layer is not complete by itself.

use serde::{Deserialize, Serialize};

/// Where overlayfs keeps its marks in this layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OverlayXattrs {
    /// `trusted.overlay.*`: the usual mount.
    #[default]
    Trusted,
    /// `user.overlay.*`: a mount with `userxattr`.
    User,
    /// Nowhere: the layer is a whole tree, and such names are the container's own (an overlayfs inside of it).
    None,
}

impl OverlayXattrs {
    fn prefix(self) -> Option<&'static [u8]> {
        match self {
            OverlayXattrs::Trusted => Some(b"trusted.overlay."),
            OverlayXattrs::User => Some(b"user.overlay."),
            OverlayXattrs::None => None,
        }
    }
}

/// What to do with one attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is sent and set.
    Keep,
    /// It means something on the source's disk only.
    Drop,
    /// The layer cannot be moved, for this reason.
    Refuse(&'static str),
}

/// Judges an attribute by its name.
pub fn judge(name: &[u8], overlay: OverlayXattrs) -> Verdict {
    if let Some(mark) = overlay.prefix().and_then(|p| name.strip_prefix(p)) {
        return judge_overlay(mark);
    }
    match name {
        // A keyed hash over the inode's number and generation: the destination's kernel makes its own.
        b"security.evm" => Verdict::Drop,
        b"system.posix_acl_access" | b"system.posix_acl_default" => Verdict::Keep,
        _ if [&b"user."[..], b"trusted.", b"security."].iter().any(|p| name.starts_with(p)) => Verdict::Keep,
        // "btrfs.compression", "system.nfs4_acl", "ceph.quota": settings of the source's filesystem.
        _ => Verdict::Drop,
    }
}

fn judge_overlay(mark: &[u8]) -> Verdict {
    // Marks set by an overlayfs that runs inside the container are stored with the prefix doubled; they are data.
    if mark.starts_with(b"overlay.") {
        return Verdict::Keep;
    }
    match mark {
        // "y": hides the directory below; "x": holds whiteouts in the form of attributes.
        b"opaque" => Verdict::Keep,
        // Whiteouts in the form of attributes, and the mark of directories with them as Linux 6.7 wrote it.
        b"whiteout" | b"whiteouts" => Verdict::Keep,
        // The name under which a renamed directory is found in the layers below: they are the same image's there.
        b"redirect" => Verdict::Keep,
        // The immutable and append-only flags that the container sees (the inode itself must stay writable).
        b"protattr" => Verdict::Keep,
        // Identifies the mount to the container (f_fsid), which should not see it change.
        b"uuid" => Verdict::Keep,
        // "May hold entries whose inode numbers need translation": a hint that the kernel removes when it is wrong.
        b"impure" => Verdict::Keep,
        // The file handle and UUID of the file that this one was copied up from, on the source's disk.
        b"origin" => Verdict::Drop,
        // The file handle of the upper directory, for index entries.
        b"upper" => Verdict::Drop,
        // Written with index=on only, where names that were never copied up find their new content through the index
        // beside the upper directory. containerd mounts with index=off.
        b"nlink" => Verdict::Refuse("hard links of the image were written through overlayfs with index=on"),
        // The content is still in the image's file only.
        b"metacopy" => {
            Verdict::Refuse("overlayfs with metacopy=on keeps no content of this file in the layer")
        }
        _ => Verdict::Refuse("it is a mark of overlayfs that this version does not know"),
    }
}

/// Is this a value that overlayfs gives to this mark of its own? A mark from elsewhere is believed by the kernel that mounts the layer.
pub(crate) fn is_value(name: &[u8], value: &[u8], overlay: OverlayXattrs) -> bool {
    let Some(mark) = mark(name, overlay).filter(|m| !m.starts_with(b"overlay.")) else { return true };
    match mark {
        b"opaque" => matches!(value, b"y" | b"x"),
        b"impure" => value == b"y",
        b"whiteout" | b"whiteouts" => matches!(value, b"" | b"y"),
        b"uuid" => value.len() == 16,
        b"protattr" => value.len() <= 2 && value.iter().all(|b| matches!(b, b'i' | b'a')),
        // a name beside it, or a path from the image's root
        b"redirect" => {
            let path = value.strip_prefix(b"/").unwrap_or(value);
            let names = path.split(|b| *b == b'/');
            (value.len() < 4096 && (path.len() < value.len() || !path.contains(&b'/')))
                && names.into_iter().all(|n| !n.is_empty() && n != b"." && n != b".." && !n.contains(&0))
        }
        _ => true,
    }
}

/// Is this the mark of a directory that hides what is below?
pub(crate) fn is_opaque(name: &[u8], value: &[u8]) -> bool {
    (name == b"trusted.overlay.opaque" || name == b"user.overlay.opaque") && value == b"y"
}

/// What follows overlayfs' prefix, if the attribute is one of its marks.
pub(crate) fn mark(name: &[u8], overlay: OverlayXattrs) -> Option<&[u8]> {
    overlay.prefix().and_then(|p| name.strip_prefix(p))
}

/// Is this one of overlayfs' marks that are sent?
pub(crate) fn is_sent_mark(name: &[u8], overlay: OverlayXattrs) -> bool {
    mark(name, overlay).is_some() && judge(name, overlay) == Verdict::Keep
}

/// Does this mark decide which directory of the image shows through one of the layer's?
pub(crate) fn is_layout(name: &[u8]) -> bool {
    [&b"trusted.overlay."[..], b"user.overlay."]
        .iter()
        .filter_map(|p| name.strip_prefix(*p))
        .any(|mark| matches!(mark, b"opaque" | b"redirect" | b"whiteouts"))
}

/// Does a fresh directory have to lose this attribute before it is filled? overlayfs' own marks and the label that the
/// destination's security module gave stay, unless the stream says otherwise.
pub(crate) fn is_leftover(name: &[u8], overlay: OverlayXattrs) -> bool {
    let mark = overlay.prefix().is_some_and(|p| name.starts_with(p));
    !mark
        && judge(name, overlay) == Verdict::Keep
        && (!name.starts_with(b"security.") || name == b"security.capability")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_marks_by_mount_kind() {
        use OverlayXattrs::*;
        assert_eq!(judge(b"trusted.overlay.origin", Trusted), Verdict::Drop);
        assert_eq!(judge(b"trusted.overlay.origin", User), Verdict::Keep);
        assert_eq!(judge(b"user.overlay.origin", User), Verdict::Drop);
        assert_eq!(judge(b"user.overlay.origin", Trusted), Verdict::Keep);
        assert_eq!(judge(b"trusted.overlay.origin", None), Verdict::Keep);
        for name in ["opaque", "redirect", "whiteout", "protattr", "impure", "uuid", "overlay.origin"] {
            assert_eq!(judge(format!("trusted.overlay.{name}").as_bytes(), Trusted), Verdict::Keep, "{name}");
        }
        for name in ["metacopy", "nlink", "somethingnew"] {
            let verdict = judge(format!("trusted.overlay.{name}").as_bytes(), Trusted);
            assert!(matches!(verdict, Verdict::Refuse(_)), "{name}");
        }
    }

    #[test]
    fn values_of_marks() {
        let fine = |mark: &str, value: &[u8]| {
            is_value(format!("trusted.overlay.{mark}").as_bytes(), value, OverlayXattrs::Trusted)
        };
        for (mark, good, bad) in [
            ("opaque", &b"y"[..], &b"z"[..]),
            ("impure", b"y", b""),
            ("whiteout", b"", b"/x"),
            ("uuid", &[7; 16], b"short"),
            ("protattr", b"ia", b"x"),
            ("redirect", b"name", b"a/b"),
            ("redirect", b"/a/b", b"/a/../../etc"),
            ("redirect", b"/a", b"/"),
            ("redirect", b"...", b".."),
            ("redirect", b"x", b""),
        ] {
            assert!(fine(mark, good) && !fine(mark, bad), "{mark}");
        }
        // data of a nested overlayfs, and of none
        assert!(fine("overlay.redirect", b"/../.."));
        assert!(is_value(b"trusted.overlay.redirect", b"/../..", OverlayXattrs::None));
    }

    #[test]
    fn ordinary_attributes() {
        for name in
            ["user.a", "trusted.b", "security.capability", "security.selinux", "system.posix_acl_access"]
        {
            assert_eq!(judge(name.as_bytes(), OverlayXattrs::Trusted), Verdict::Keep, "{name}");
        }
        for name in ["security.evm", "btrfs.compression", "system.nfs4_acl", "userx", ""] {
            assert_eq!(judge(name.as_bytes(), OverlayXattrs::Trusted), Verdict::Drop, "{name}");
        }
    }

    #[test]
    fn leftovers_of_a_fresh_root() {
        for name in ["user.a", "system.posix_acl_default", "security.capability"] {
            assert!(is_leftover(name.as_bytes(), OverlayXattrs::Trusted), "{name}");
        }
        for name in ["trusted.overlay.uuid", "trusted.overlay.opaque", "security.selinux"] {
            assert!(!is_leftover(name.as_bytes(), OverlayXattrs::Trusted), "{name}");
        }
    }
}
