//! Fuzz targets of a peer's writable layer: see [`crate::fuzz`].

use super::entry::{self, Entry};
use super::xattr::OverlayXattrs;
use super::{Apply, Kind, LayerKind, Meta, Sink, Time, Totals, WritableLayer, Xattr};
use crate::fuzz::{Cage, Input, chunk};

/// One of each kind of entry, in an order that can be applied.
fn samples() -> Vec<Entry> {
    let meta = |mode| Meta {
        mode,
        mtime: Time { secs: 5, nanos: 7 },
        atime: Time { secs: -1, nanos: 0 },
        ..Meta::default()
    };
    let node = |path: &[u8], kind| Entry::Node { path: path.to_vec(), kind, meta: meta(0o640) };
    let marked = Meta {
        flags: 0x10,
        xattrs: vec![
            Xattr { name: b"trusted.overlay.opaque".to_vec(), value: b"y".to_vec() },
            Xattr { name: b"user.x".to_vec(), value: vec![0; 9] },
        ],
        ..meta(0o755)
    };
    vec![
        node(b"", Kind::Directory),
        node(b"char", Kind::CharDevice { major: 1, minor: 3 }),
        Entry::Node { path: b"dir".to_vec(), kind: Kind::Directory, meta: marked },
        node(b"dir/file", Kind::File { size: 9000 }),
        node(b"dir/gone", Kind::Whiteout),
        node(b"fifo", Kind::Fifo),
        Entry::Link { path: b"link".to_vec(), target: b"dir/file".to_vec() },
        node(b"sock", Kind::Socket),
        node(b"symlink", Kind::Symlink { target: b"../../beside".to_vec() }),
        node(b"block", Kind::BlockDevice { major: 7, minor: 0 }),
        Entry::Round { format: entry::ROUND_FORMAT },
        Entry::Remove { path: b"fifo".to_vec() },
        node(b"file", Kind::Patch { size: 8192 }),
        Entry::Hole { offset: 0, len: 4096 },
        Entry::End(Totals { entries: 2, bytes: 3 }),
    ]
}

/// One entry: read, written, judged.
pub mod layer_entry {
    use super::*;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let mut entries = Vec::new();
        while !input.is_empty() {
            let bytes = input.chunk();
            let Ok(entry) = Entry::decode(bytes) else { continue };
            let mut again = Vec::new();
            entry.encode(&mut again);
            assert_eq!(again, bytes, "an entry with two encodings: {entry:?}");
            let fine = [OverlayXattrs::None, OverlayXattrs::User, OverlayXattrs::Trusted];
            if fine.into_iter().any(|overlay| entry.check(overlay).is_ok())
                && let Some(path) = entry.path()
            {
                let escapes = path.starts_with(b"/") || path.split(|b| *b == b'/').any(|name| name == b"..");
                assert!(!escapes && !path.contains(&0), "{entry:?}");
                let (parent, name) = entry::split(path);
                assert!(path.is_empty() || !name.is_empty() && entry::order(parent, path).is_lt());
            }
            entries.push(entry);
        }
        for pair in entries.windows(2) {
            if let (Some(a), Some(b)) = (pair[0].path(), pair[1].path()) {
                assert_eq!(entry::order(a, b), entry::order(b, a).reverse());
            }
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let encoded = |entry: &Entry| {
            let mut out = Vec::new();
            entry.encode(&mut out);
            chunk(&out)
        };
        samples().iter().map(encoded).chain([samples().iter().flat_map(encoded).collect()]).collect()
    }
}

/// Entries and data in any order, written into a directory; nothing outside of it changes.
pub mod layer_apply {
    use super::*;

    const ENTRY: u8 = 0;
    const DATA: u8 = 1;
    const ROUND: u8 = 2;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let kind = match input.byte() % 3 {
            0 => LayerKind::Overlay { userxattr: false },
            1 => LayerKind::Overlay { userxattr: true },
            _ => LayerKind::Full,
        };
        let cage = Cage::new();
        let layer = WritableLayer { dir: cage.root(), kind };
        let mut apply = Apply::for_layer(&layer).expect("an empty directory");
        let (mut entries, mut bytes, mut failed) = (0, 0, false);
        while !input.is_empty() && !failed {
            failed = match input.byte() % 3 {
                ENTRY => match Entry::decode(input.chunk()) {
                    // the sums are the peer's to get right: here they always are
                    Ok(Entry::End(_)) => {
                        let taken = apply.entry(&Entry::End(Totals { entries, bytes }));
                        (entries, bytes) = (0, 0);
                        taken.is_err()
                    }
                    Ok(entry) => {
                        entries += u64::from(entry.path().is_some());
                        apply.entry(&entry).is_err()
                    }
                    Err(_) => true,
                },
                DATA => {
                    let (offset, piece) = (input.number(), input.chunk());
                    bytes += piece.len() as u64;
                    apply.data(offset, piece).is_err()
                }
                _ => apply.round().is_err(),
            };
        }
        if !failed {
            let _ = apply.finish_rounds();
        }
        cage.check(&[]);
        // whatever flags were set: nothing stays behind
        Apply::for_layer(&layer).expect("the layer can be emptied");
    }

    /// A script of what a source sends.
    struct Script(Vec<u8>);

    impl Sink for Script {
        fn entry(&mut self, entry: &Entry) -> anyhow::Result<()> {
            let mut out = Vec::new();
            entry.encode(&mut out);
            self.0.push(ENTRY);
            self.0.extend(chunk(&out));
            if matches!(entry, Entry::End(_)) {
                self.0.push(ROUND);
            }
            Ok(())
        }

        fn data(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
            for (n, piece) in bytes.chunks(4096).enumerate() {
                self.0.push(DATA);
                self.0.extend((offset + 4096 * n as u64).to_le_bytes());
                self.0.extend(chunk(piece));
            }
            Ok(())
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let mut script = Script(vec![0]);
        let mut all = samples();
        all.sort_by(|a, b| match (a.path(), b.path()) {
            (Some(a), Some(b)) => entry::order(a, b),
            _ => std::cmp::Ordering::Equal,
        });
        let end = Entry::End(Totals::default());
        let node = |path: &[u8], kind| Entry::Node {
            path: path.to_vec(),
            kind,
            meta: Meta { mode: 0o700, ..Meta::default() },
        };
        let first: Vec<_> = samples().into_iter().take(9).collect();
        for entry in &first {
            script.entry(entry).expect("it only notes");
            if matches!(entry, Entry::Node { kind: Kind::File { .. }, .. }) {
                script.data(4096, &[7; 300]).expect("it only notes");
            }
        }
        script.entry(&end).expect("it only notes");
        let second = [
            Entry::Round { format: entry::ROUND_FORMAT },
            node(b"", Kind::Directory),
            node(b"dir", Kind::Directory),
            node(b"dir/file", Kind::Patch { size: 12_288 }),
            Entry::Hole { offset: 0, len: 4096 },
        ];
        for entry in &second {
            script.entry(entry).expect("it only notes");
        }
        script.data(8192, b"new").expect("it only notes");
        for entry in [Entry::Remove { path: b"fifo".to_vec() }, node(b"fifo", Kind::Directory), end] {
            script.entry(&entry).expect("it only notes");
        }
        let mut full = script.0.clone();
        full[0] = 2;
        // what it must not do: write through a link of its own
        let mut through = Script(vec![0]);
        for entry in [
            node(b"", Kind::Directory),
            node(b"a", Kind::Symlink { target: b"..".to_vec() }),
            node(b"a/beside", Kind::File { size: 3 }),
        ] {
            through.entry(&entry).expect("it only notes");
        }
        through.data(0, b"bad").expect("it only notes");
        vec![script.0, full, through.0]
    }
}
