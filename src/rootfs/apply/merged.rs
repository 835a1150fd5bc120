//! Entries of an upper directory as the mounted overlay would be told of them. Pure.
//!
//! An upper directory must not change under a mounted overlay (kernel: Documentation/filesystems/overlayfs.rst, "Changes
//! to underlying filesystems"): the mount keeps what it has looked up, names that do not exist included, and a directory
//! that it knows from the image alone never gets an upper one. So the last changes are made *through* the mount, as a
//! task of the container would make them, and overlayfs writes its own marks: it copies directories up, leaves
//! whiteouts, makes new directories opaque. What cannot be said that way asks for the mount to be taken away.

use crate::rootfs::entry::{Kind, Meta, Xattr};
use crate::rootfs::xattr::{self, OverlayXattrs};

/// Attributes as they are set through the mount: without overlayfs' marks, those of a nested overlayfs under their own
/// names.
pub fn seen_through(meta: &Meta, overlay: OverlayXattrs) -> Meta {
    let mut seen = Meta { xattrs: Vec::new(), ..meta.clone() };
    for x in &meta.xattrs {
        match xattr::mark(&x.name, overlay) {
            None => seen.xattrs.push(x.clone()),
            // The prefix is doubled in the layer.
            Some(mark) if mark.starts_with(b"overlay.") => {
                let prefix = x.name.len() - mark.len();
                let name = [&x.name[..prefix], &mark[b"overlay.".len()..]].concat();
                seen.xattrs.push(Xattr { name, value: x.value.clone() });
            }
            // The flags of `protattr` come at the very end.
            Some(_) => {}
        }
    }
    seen
}

/// Why an entry cannot be made through the mount. `has` tells the marks that the layer's directory has already under
/// this name.
pub fn cannot(
    kind: &Kind,
    meta: &Meta,
    overlay: OverlayXattrs,
    has: impl Fn(&[u8]) -> Option<Vec<u8>>,
) -> Option<String> {
    for x in &meta.xattrs {
        let Some(mark) = xattr::mark(&x.name, overlay) else { continue };
        let fixed = match mark {
            b"redirect" | b"whiteout" | b"whiteouts" => true,
            b"opaque" => x.value != b"y" || *kind != Kind::Directory,
            _ => false,
        };
        if fixed && has(&x.name).as_deref() != Some(&x.value[..]) {
            return Some(format!("the mark {} is new", x.name.escape_ascii()));
        }
    }
    None
}

/// Is this the attribute in which overlayfs keeps flags that forbid changes?
pub fn is_flags(name: &[u8], overlay: OverlayXattrs) -> bool {
    xattr::mark(name, overlay) == Some(b"protattr")
}

/// The flags in its value (fs/overlayfs/util.c, `ovl_set_protattr`).
pub fn flags_of(value: &[u8]) -> u32 {
    let flag = |letter: u8, flag: u32| if value.contains(&letter) { flag } else { 0 };
    flag(b'i', 0x10) | flag(b'a', 0x20)
}

/// Does the directory hide that of the image?
pub fn is_opaque(meta: &Meta) -> bool {
    meta.xattrs.iter().any(|x| xattr::is_opaque(&x.name, &x.value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(xattrs: &[(&str, &str)]) -> Meta {
        let xattr =
            |(n, v): &(&str, &str)| Xattr { name: n.as_bytes().to_vec(), value: v.as_bytes().to_vec() };
        Meta { flags: 0x80, xattrs: xattrs.iter().map(xattr).collect(), ..Meta::default() }
    }

    #[test]
    fn marks_are_translated() {
        let layer = meta(&[
            ("trusted.overlay.impure", "y"),
            ("trusted.overlay.opaque", "y"),
            ("trusted.overlay.overlay.opaque", "y"),
            ("trusted.overlay.protattr", "ia"),
            ("user.overlay.opaque", "y"),
            ("user.a", "b"),
        ]);
        let seen = seen_through(&layer, OverlayXattrs::Trusted);
        let want = meta(&[("trusted.overlay.opaque", "y"), ("user.overlay.opaque", "y"), ("user.a", "b")]);
        assert_eq!(seen, want);
        assert_eq!((flags_of(b"ia"), flags_of(b"a"), flags_of(b"")), (0x30, 0x20, 0));
        assert_eq!(seen_through(&layer, OverlayXattrs::None), layer);
    }

    #[test]
    fn what_only_the_layer_can_say() {
        let why = |kind: Kind, xattrs: &[(&str, &str)], has: Option<&str>| {
            let has = has.map(|h| h.as_bytes().to_vec());
            cannot(&kind, &meta(xattrs), OverlayXattrs::Trusted, |_| has.clone()).is_some()
        };
        let redirect = [("trusted.overlay.redirect", "/a")];
        assert!(why(Kind::Directory, &redirect, None));
        assert!(why(Kind::Directory, &redirect, Some("/b")));
        assert!(!why(Kind::Directory, &redirect, Some("/a")));
        assert!(!why(Kind::Directory, &[("trusted.overlay.opaque", "y")], None));
        assert!(why(Kind::Directory, &[("trusted.overlay.opaque", "x")], None));
        assert!(why(Kind::File { size: 0 }, &[("trusted.overlay.whiteout", "y")], None));
        assert!(!why(Kind::Directory, &[("trusted.overlay.impure", "y"), ("user.x", "")], None));
    }
}
