//! The fuzz target of the archives of tmpfs mounts: see [`crate::fuzz`].

/// An archive extracted; nothing outside of its directory changes. And a header alone.
pub mod criu_tar {
    use std::io::Write;

    use super::super::gzip::Stored;
    use super::super::header::{self, BLOCK, Header};
    use super::super::staged::Known;
    use super::super::{flat, read, write};
    use crate::fuzz::{Cage, Input};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => extract(input.rest()),
            1 => extract(&framed(&mended(input.rest()))),
            _ => one(input.rest()),
        }
    }

    fn extract(archive: &[u8]) {
        flatly(archive);
        let cage = Cage::new();
        let staged = cage.make("staged");
        std::fs::write(staged.join("1"), b"content").expect("a staged file");
        let _ = read::extract(&cage.root(), &staged, archive);
        cage.check(&["staged"]);
    }

    /// What the quick program takes, it would have made so; and nothing in it is anywhere else.
    fn flatly(archive: &[u8]) {
        let Some(entries) = flat::read(archive) else { return };
        let mut space = [0; flat::LEN];
        let mut again = flat::Writer::new(&mut space);
        for entry in entries {
            assert!(!entry.name.contains(&b'/') && entry.name != b".." && entry.name != b".");
            again.add(&entry).expect("it came from an archive");
        }
        assert!(again.finish() == archive);
    }

    /// A header that is understood is written as one that says the same.
    fn one(bytes: &[u8]) {
        let bytes = mended(bytes);
        let mut blocks = bytes.as_chunks::<BLOCK>().0.iter();
        let mut next = || blocks.next().copied().ok_or_else(|| anyhow::anyhow!("the end"));
        let Ok(Ok(Some(head))) = next().map(|first| Header::decode(&first, &mut next)) else { return };
        let again = head.encode().expect("it came from a header");
        let mut blocks = again.as_chunks::<BLOCK>().0.iter();
        let mut next = || blocks.next().copied().ok_or_else(|| anyhow::anyhow!("the end"));
        let first = next().expect("a header is a block");
        assert_eq!(Header::decode(&first, &mut next).expect("it was written here"), Some(head));
    }

    /// Every block that could be a header with the checksum that it should have.
    fn mended(archive: &[u8]) -> Vec<u8> {
        let mut out = archive.to_vec();
        for block in out.as_chunks_mut::<BLOCK>().0 {
            if block[257..262] == *b"ustar" {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        out
    }

    fn framed(archive: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut stored = Stored::new(&mut out).expect("memory");
        stored.write_all(archive).and_then(|()| stored.flush()).expect("memory");
        stored.finish().expect("memory");
        out
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let dir = crate::fuzz::dir();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("sub")).expect("a directory");
        std::fs::write(at("sub/file"), b"content").expect("a file");
        std::fs::hard_link(at("sub/file"), at("two")).expect("a link");
        std::os::unix::fs::symlink("../beside", at("link")).expect("a link");
        std::os::unix::fs::symlink("x".repeat(200), at("long")).expect("a link");
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRUSR).expect("a fifo");
        let sparse = std::fs::File::create(at("sparse")).expect("a file");
        sparse.set_len(1 << 20).expect("a file");
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", 300_000).expect("a file");
        let mut archive = Vec::new();
        write::archive(dir.path(), &Known::default(), &mut archive).expect("a small tree");
        // without the frame: its head is 20 bytes, a block's 5
        let mut plain = Vec::new();
        let mut rest = &archive[20..];
        while let [_, a, b, _, _, tail @ ..] = rest {
            let len = usize::from(u16::from_le_bytes([*a, *b])).min(tail.len());
            plain.extend_from_slice(&tail[..len]);
            rest = &tail[len..];
        }
        let named = |kind: u8, name: &[u8], target: &[u8], size: u64| {
            let (name, target) = (name.to_vec(), target.to_vec());
            Header { kind, name, target, mode: 0o700, size, ..Header::default() }
                .encode()
                .expect("short names")
        };
        // what it must not do: write, or link, through a link of its own
        let out = [
            &[1][..],
            &named(header::DIR, b"./", b"", 0),
            &named(header::SYMLINK, b"./a", b"..", 0),
            &named(header::LINK, b"./b", b"./a/beside", 0),
            &named(header::FILE, b"./a/beside", b"", 0),
            &[0; 2 * BLOCK],
        ]
        .concat();
        // a reference to what is staged, and one that lies
        let body = br#"{"id":1,"size":7,"block":4096,"seed":5,"digest":0}"#;
        let mut body = body.to_vec();
        let len = body.len() as u64;
        body.resize(BLOCK, 0);
        let staged = [
            &[1][..],
            &named(header::DIR, b"./", b"", 0),
            &named(header::REFERENCE, b"./r", b"", len),
            &body,
        ]
        .concat();
        let pieces = vec![(0, 4096), (1 << 20, 4096), (2 << 20, 1), (3 << 20, 1), (4 << 20, 1), (5 << 20, 1)];
        let head =
            Header { kind: header::SPARSE, sparse: Some((pieces, 1 << 40)), mtime: -5, ..Header::default() };
        vec![
            [&[0][..], &archive].concat(),
            [&[1][..], &plain].concat(),
            out,
            staged,
            [&[2][..], &head.encode().expect("a header")].concat(),
            [&[2][..], &named(header::SYMLINK, b"./a", b"..", 0)].concat(),
        ]
    }
}
