//! Attacks on the destination's directory that need more than a bad entry: things swapped between two entries, devices, marks that overlayfs
//! would believe. What can be seen in an entry alone is tested in `entry`, streams in the wrong order in `tests` and `tests_rounds`.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::PathBuf;

use super::testing;
use super::*;
use crate::policy::Policy;

fn skip() -> bool {
    let why = testing::cannot_run();
    why.inspect(|why| println!("SKIP: {why}")).is_some()
}

fn node(path: &str, kind: Kind) -> Entry {
    Entry::Node { path: path.into(), kind, meta: Meta { mode: 0o755, ..Meta::default() } }
}

fn marked(path: &str, kind: Kind, name: &str, value: &[u8]) -> Entry {
    let xattrs = vec![Xattr { name: name.into(), value: value.to_vec() }];
    Entry::Node { path: path.into(), kind, meta: Meta { mode: 0o755, xattrs, ..Meta::default() } }
}

fn end(entries: u64, bytes: u64) -> Entry {
    Entry::End(Totals { entries, bytes })
}

/// A layer's directory beside a folder of the node with one file, which nothing may change.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        for name in ["layer", "node"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("node/victim"), "x").unwrap();
        Bed { dir }
    }

    fn layer(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    /// A name in the layer becomes a link to the node's folder; what was there is put aside.
    fn swap(&self, name: &str) {
        let path = self.layer().join(name);
        fs::rename(&path, self.layer().join("aside")).unwrap();
        symlink(self.dir.path().join("node"), path).unwrap();
    }

    fn untouched(&self) {
        let node = self.dir.path().join("node");
        let names: Vec<_> = fs::read_dir(&node).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["victim"]);
        let victim = node.join("victim");
        assert_eq!(fs::read(&victim).unwrap(), b"x");
        let meta = victim.metadata().unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777, node.metadata().unwrap().uid()), (1, 0o644, 0));
    }
}

#[test]
fn what_is_swapped_for_a_link_leads_nowhere() {
    if skip() {
        return;
    }
    let root = || node("", Kind::Directory);
    let owned = |path: &str| Entry::Node {
        path: path.into(),
        kind: Kind::Directory,
        meta: Meta { mode: 0o777, uid: 7, ..Meta::default() },
    };
    // a directory while it is filled: the rest goes where it is now, and so do its attributes
    let bed = Bed::new();
    let mut apply = Apply::new(&bed.layer()).unwrap();
    [root(), owned("d")].iter().for_each(|e| apply.entry(e).unwrap());
    bed.swap("d");
    apply.entry(&node("d/victim", Kind::File { size: 1 })).unwrap();
    apply.data(0, b"y").unwrap();
    apply.entry(&end(3, 1)).unwrap();
    apply.finish().unwrap();
    assert_eq!(fs::read(bed.layer().join("aside/victim")).unwrap(), b"y");
    bed.untouched();

    // what a later round refers to
    let rounds: [(&str, Vec<Entry>); 4] = [
        ("patch", vec![node("d", Kind::Directory), node("d/victim", Kind::Patch { size: 0 })]),
        ("remove", vec![node("d", Kind::Directory), Entry::Remove { path: b"d/victim".to_vec() }]),
        ("link", vec![Entry::Link { path: b"a".to_vec(), target: b"d/victim".to_vec() }]),
        ("attributes", vec![owned("d")]),
    ];
    for (what, entries) in rounds {
        let bed = Bed::new();
        let mut apply = Apply::new(&bed.layer()).unwrap();
        for entry in [root(), node("d", Kind::Directory), node("d/victim", Kind::File { size: 1 }), end(3, 0)]
        {
            apply.entry(&entry).unwrap();
        }
        apply.round().unwrap();
        bed.swap("d");
        let run = |apply: &mut Apply| -> Result<()> {
            apply.entry(&Entry::Round { format: entry::ROUND_FORMAT })?;
            apply.entry(&root())?;
            entries.iter().try_for_each(|e| apply.entry(e))?;
            apply.entry(&end(1 + entries.len() as u64, 0))
        };
        // refused, or done to a new directory in the link's place
        let refused = run(&mut apply).is_err();
        assert_eq!(refused, matches!(what, "patch" | "link"), "{what}");
        drop(apply);
        bed.untouched();
    }

    // flags that forbid changes come at the very end
    let bed = Bed::new();
    let mut apply = Apply::new(&bed.layer()).unwrap();
    let immutable = Entry::Node {
        path: b"d".to_vec(),
        kind: Kind::File { size: 0 },
        meta: Meta { mode: 0o644, flags: 0x10, ..Meta::default() },
    };
    [root(), immutable, end(2, 0)].iter().for_each(|e| apply.entry(e).unwrap());
    let path = bed.layer().join("d");
    fs::rename(&path, bed.layer().join("aside")).unwrap();
    symlink(bed.dir.path().join("node/victim"), &path).unwrap();
    let _ = apply.finish();
    fs::write(bed.dir.path().join("node/victim"), "x").unwrap();
    bed.untouched();
}

#[test]
fn the_layer_is_not_reached_through_a_link() {
    let bed = Bed::new();
    fs::remove_dir(bed.layer()).unwrap();
    symlink(bed.dir.path().join("node"), bed.layer()).unwrap();
    assert!(Apply::new(&bed.layer()).is_err());
    let kind = LayerKind::Overlay { userxattr: false };
    assert!(Apply::for_layer(&WritableLayer { dir: bed.layer(), kind }).is_err());
    bed.untouched();
}

#[test]
fn devices_are_those_of_the_policy() {
    if skip() {
        return;
    }
    // of a container that cannot make nodes itself
    let spec = serde_json::json!({"process": {"capabilities": {"bounding": ["CAP_CHOWN"]}}});
    let try_it = |policy: &Policy, kind: Kind| {
        let bed = Bed::new();
        let mut apply = Apply::new(&bed.layer()).unwrap().only_devices(policy.nodes(&spec));
        apply.entry(&node("", Kind::Directory)).unwrap();
        apply.entry(&node("a", kind)).map_err(|e| format!("{e:#}"))?;
        Ok::<_, String>(fs::symlink_metadata(bed.layer().join("a")).unwrap())
    };
    let policy = Policy::default();
    let disk = Kind::BlockDevice { major: 8, minor: 0 };
    let memory = Kind::CharDevice { major: 1, minor: 1 };
    for bad in [disk.clone(), memory, Kind::BlockDevice { major: 1, minor: 3 }] {
        let said = try_it(&policy, bad).unwrap_err();
        assert!(said.contains("`devices`"), "{said}");
    }
    let null = try_it(&policy, Kind::CharDevice { major: 1, minor: 3 }).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(try_it(&policy, Kind::Whiteout).unwrap().rdev(), 0);
    assert!(try_it(&policy, Kind::Fifo).unwrap().file_type().is_fifo());
    assert!(try_it(&policy, Kind::Socket).unwrap().file_type().is_socket());
    let kmsg = Kind::CharDevice { major: 1, minor: 11 };
    assert!(try_it(&policy, kmsg.clone()).is_err());
    try_it(&Policy { devices: vec!["/dev/kmsg".into()], ..Policy::default() }, kmsg).unwrap();
    try_it(&Policy { privileged: true, ..Policy::default() }, disk).unwrap();
    let able = crate::policy::tests::record("ctr-1.7").spec;
    assert!(
        policy.nodes(&able)(true, 8, 0),
        "CAP_MKNOD makes any node; its device rules say what it can open"
    );
}

#[test]
fn marks_that_lead_elsewhere() {
    if skip() {
        return;
    }
    let try_it = |entry: Entry| {
        let bed = Bed::new();
        let mut apply = Apply::new(&bed.layer()).unwrap();
        apply.entry(&node("", Kind::Directory)).unwrap();
        let result = apply.entry(&entry);
        bed.untouched();
        result
    };
    for (name, value) in [
        ("redirect", &b"/../../../etc"[..]),
        ("redirect", b"../up"),
        ("redirect", b"a/b"),
        ("redirect", b"/"),
        ("metacopy", b""),
        ("origin", b"handle"),
        ("upper", b"handle"),
        ("nlink", b"U+1"),
        ("opaque", b"yes"),
        ("uuid", b"short"),
        ("new", b"y"),
    ] {
        let entry = marked("d", Kind::Directory, &format!("trusted.overlay.{name}"), value);
        assert!(try_it(entry).is_err(), "{name}={}", value.escape_ascii());
    }
    try_it(marked("d", Kind::Directory, "trusted.overlay.opaque", b"y")).unwrap();
    try_it(marked("d", Kind::Directory, "trusted.overlay.redirect", b"/a/b")).unwrap();
    for name in ["security.evm", "system.posix_acl", "trusted", "btrfs.compression"] {
        assert!(try_it(marked("d", Kind::Directory, name, b"x")).is_err(), "{name}");
    }
}

#[test]
fn odd_names_are_names() {
    if skip() {
        return;
    }
    let bed = Bed::new();
    let mut apply = Apply::new(&bed.layer()).unwrap();
    apply.entry(&node("", Kind::Directory)).unwrap();
    let long = [b'n'; 255];
    let names: [&[u8]; 5] = [b"\n", b"...", b"\xff\xfe", b"a\\b", &long];
    let mut sorted = names.to_vec();
    sorted.sort();
    for name in &sorted {
        let kind = Kind::File { size: 0 };
        let entry = Entry::Node { path: name.to_vec(), kind, meta: Meta { mode: 0o600, ..Meta::default() } };
        apply.entry(&entry).unwrap();
    }
    apply.entry(&end(6, 0)).unwrap();
    apply.finish().unwrap();
    let mut found: Vec<_> =
        fs::read_dir(bed.layer()).unwrap().map(|e| e.unwrap().file_name().as_bytes().to_vec()).collect();
    found.sort();
    assert_eq!(found, sorted);
    bed.untouched();
}
