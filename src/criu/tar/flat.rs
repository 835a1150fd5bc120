//! The archive of a directory in which there are only nodes, links, empty files and mount points, as a container's /dev is, or nothing at
//! all: as [`super::write`] makes it and [`super::read`] takes it, byte for byte. Nothing here allocates, panics or needs a C library: the
//! program `transship-quick` has neither.

use super::gzip::{Crc, HEAD};
use super::header::{
    BLOCK, BLOCK_DEVICE, CHAR, DIR, FIFO, FILE, GID, GNU, MAGIC, MAJOR, MINOR, MODE, MTIME, NAME, SIZE,
    SYMLINK, TARGET, TYPE, UID, number, parse, seal,
};

/// How all names begin; the directory's own is that.
const SELF: &[u8; 2] = b"./";
/// Most entries, with the directory itself.
const MOST: usize = 60;
/// Before the content of the only stored block (RFC 1951): that it is the last one, its length, and that inverted.
const STORED: usize = 5;
const AT: usize = HEAD.len() + STORED;
/// What ends an archive.
const END: usize = 2 * BLOCK;
/// Checksum and length of the content.
const TAIL: usize = 8;
/// Most bytes of an archive.
pub const LEN: usize = AT + MOST * BLOCK + END + TAIL;
/// Of a name or a target, with the nul.
pub const TEXT: usize = NAME.end + 1;

const _: () = assert!(MOST * BLOCK + END <= u16::MAX as usize, "it has to be one block");

/// What an archive keeps of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// In the directory. Empty for itself.
    pub name: &'a [u8],
    /// What it is.
    pub kind: Kind<'a>,
    /// Permissions, without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 of its modification.
    pub mtime: i64,
}

/// What something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// With nothing in it that belongs to this archive.
    Directory,
    /// A file of no bytes.
    Empty,
    /// Where it leads to.
    Symlink(&'a [u8]),
    /// A pipe with a name.
    Fifo,
    /// Major and minor number.
    Char(u32, u32),
    /// Major and minor number.
    Block(u32, u32),
}

/// An archive in the making: the directory itself comes first.
pub struct Writer<'a> {
    to: &'a mut [u8; LEN],
    entries: usize,
}

impl<'a> Writer<'a> {
    /// `to` is all zeros.
    pub fn new(to: &'a mut [u8; LEN]) -> Self {
        Writer { to, entries: 0 }
    }

    /// None for what does not fit.
    pub fn add(&mut self, entry: &Entry) -> Option<()> {
        if self.entries == MOST {
            return None;
        }
        let at = AT + self.entries * BLOCK;
        encode(entry, self.to.get_mut(at..at + BLOCK)?.try_into().ok()?)?;
        self.entries += 1;
        Some(())
    }

    /// The archive.
    pub fn finish(self) -> &'a [u8] {
        let end = AT + self.entries * BLOCK + END;
        let (frame, tail) = frame(&self.to[AT..end]);
        self.to[..AT].copy_from_slice(&frame);
        self.to[end..end + TAIL].copy_from_slice(&tail);
        &self.to[..end + TAIL]
    }
}

/// What an archive holds, the directory itself first. None for any that a [`Writer`] would not have made so, byte for byte: then nothing is
/// known of it, not even whether it is an archive.
pub fn read(all: &[u8]) -> Option<impl Iterator<Item = Entry<'_>>> {
    let (content, tail) = all.get(AT..)?.split_at_checked(all.len().checked_sub(AT + TAIL)?)?;
    let (entries, end) = content.split_at_checked(content.len().checked_sub(END)?)?;
    let (blocks, rest) = entries.as_chunks::<BLOCK>();
    let framed = all.len() <= LEN && rest.is_empty() && end.iter().all(|b| *b == 0) && {
        let (frame, sum) = frame(content);
        all.get(..AT)? == frame && tail == sum
    };
    let mut found = blocks.iter().map(decode);
    let own = found.next()??;
    let right = framed
        && own.name.is_empty()
        && own.kind == Kind::Directory
        && found.all(|e| e.is_some_and(|e| !e.name.is_empty()));
    right.then(|| blocks.iter().filter_map(decode))
}

/// What stands before and behind the content.
fn frame(content: &[u8]) -> ([u8; AT], [u8; TAIL]) {
    let (mut before, mut behind) = ([0; AT], [0; TAIL]);
    before[..HEAD.len()].copy_from_slice(HEAD);
    let [a, b] = (content.len() as u16).to_le_bytes();
    before[HEAD.len()..].copy_from_slice(&[1, a, b, !a, !b]);
    let mut crc = Crc::new();
    crc.update(content);
    behind[..4].copy_from_slice(&crc.value().to_le_bytes());
    behind[4..].copy_from_slice(&(content.len() as u32).to_le_bytes());
    (before, behind)
}

/// Into a block of zeros.
fn encode(entry: &Entry, block: &mut [u8; BLOCK]) -> Option<()> {
    let of_directory: &[u8] = match entry.kind {
        Kind::Directory if !entry.name.is_empty() => b"/",
        _ => b"",
    };
    let mut at = NAME.start;
    for piece in [SELF.as_slice(), entry.name, of_directory] {
        block[NAME].get_mut(at..at + piece.len())?.copy_from_slice(piece);
        at += piece.len();
    }
    let (kind, device) = match entry.kind {
        Kind::Directory => (DIR, None),
        Kind::Empty => (FILE, None),
        Kind::Fifo => (FIFO, None),
        Kind::Char(major, minor) => (CHAR, Some((major, minor))),
        Kind::Block(major, minor) => (BLOCK_DEVICE, Some((major, minor))),
        Kind::Symlink(target) => {
            block[TARGET].get_mut(..target.len())?.copy_from_slice(target);
            (SYMLINK, None)
        }
    };
    number(&mut block[MODE], entry.mode.into());
    number(&mut block[UID], entry.uid.into());
    number(&mut block[GID], entry.gid.into());
    number(&mut block[SIZE], 0);
    number(&mut block[MTIME], entry.mtime.into());
    block[TYPE] = kind;
    block[MAGIC].copy_from_slice(GNU);
    if let Some((major, minor)) = device {
        number(&mut block[MAJOR], major.into());
        number(&mut block[MINOR], minor.into());
    }
    seal(block);
    Some(())
}

/// None for what [`encode`] would not have made so.
fn decode(block: &[u8; BLOCK]) -> Option<Entry<'_>> {
    let small = |field: core::ops::Range<usize>| u32::try_from(parse(&block[field])?).ok();
    let device = || Some((small(MAJOR)?, small(MINOR)?));
    let kind = match block[TYPE] {
        DIR => Kind::Directory,
        FILE => Kind::Empty,
        FIFO => Kind::Fifo,
        CHAR => device().map(|(major, minor)| Kind::Char(major, minor))?,
        BLOCK_DEVICE => device().map(|(major, minor)| Kind::Block(major, minor))?,
        SYMLINK => Kind::Symlink(text(&block[TARGET])),
        _ => return None,
    };
    let mut name = text(&block[NAME]).strip_prefix(SELF)?;
    if kind == Kind::Directory && !name.is_empty() {
        name = name.strip_suffix(b"/")?;
    }
    if name.contains(&b'/') || name == b"." || name == b".." {
        return None;
    }
    let mtime = parse(&block[MTIME])?.try_into().ok()?;
    let entry = Entry { name, kind, mode: small(MODE)?, uid: small(UID)?, gid: small(GID)?, mtime };
    // a size, a name that goes on behind a nul, a wrong checksum: whatever was not looked at
    let mut again = [0; BLOCK];
    encode(&entry, &mut again)?;
    (again == *block).then_some(entry)
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{flat, look};
    use super::super::{read as reader, staged, write as writer};
    use super::*;

    const OF: Entry<'_> = Entry { name: b"", kind: Kind::Directory, mode: 0o755, uid: 0, gid: 7, mtime: -9 };

    fn archive(entries: &[Entry]) -> Option<Vec<u8>> {
        let mut space = [0; LEN];
        let mut archive = Writer::new(&mut space);
        entries.iter().try_for_each(|e| archive.add(e))?;
        Some(archive.finish().to_vec())
    }

    /// Of everything one.
    fn full() -> Vec<Entry<'static>> {
        let of = |name, kind| Entry { name, kind, ..OF };
        vec![
            Entry { mode: 0o1777, uid: 1 << 31, mtime: 1 << 40, ..OF },
            of(b"null", Kind::Char(1, 3)),
            of(b"sda", Kind::Block(4095, 1_000_000)),
            of(b"stdin", Kind::Symlink(b"/proc/self/fd/0")),
            of(b"log", Kind::Fifo),
            of(b"console", Kind::Empty),
            of(b"pts", Kind::Directory),
        ]
    }

    #[test]
    fn what_was_written_is_read() {
        let entries = full();
        for n in 1..=entries.len() {
            let made = archive(&entries[..n]).unwrap();
            assert_eq!(read(&made).unwrap().collect::<Vec<_>>(), entries[..n]);
        }
    }

    #[test]
    fn it_is_what_our_tar_makes_and_takes() {
        let top = tempfile::tempdir().unwrap();
        let (from, to) = (top.path().join("from"), top.path().join("to"));
        std::fs::create_dir(&from).unwrap();
        flat(&from);
        let mut made = Vec::new();
        writer::archive(&from, &staged::Known::default(), &mut made).unwrap();
        let entries: Vec<Entry> = read(&made).unwrap().collect();
        assert!(archive(&entries).unwrap() == made);
        std::fs::create_dir(&to).unwrap();
        reader::extract(&to, top.path(), &made[..]).unwrap();
        assert_eq!(look(&to), look(&from));
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        let good = archive(&full()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(read(&bad).is_none(), "byte {at}");
        }
        for len in [0, 1, AT, AT + TAIL, good.len() - 1, good.len() - BLOCK] {
            assert!(read(&good[..len]).is_none(), "{len} bytes");
        }
        assert!(read(&[&good[..], &[0]].concat()).is_none());
        // the first is the directory, and nobody else; names do not lead out
        let of = |name, kind| Entry { name, kind, ..OF };
        let no: [&[Entry]; 7] = [
            &[],
            &[of(b"x", Kind::Directory)],
            &[of(b"", Kind::Fifo)],
            &[OF, OF],
            &[OF, of(b"..", Kind::Directory)],
            &[OF, of(b".", Kind::Fifo)],
            &[OF, of(b"a/b", Kind::Fifo)],
        ];
        for entries in no {
            assert!(read(&archive(entries).unwrap()).is_none(), "{entries:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let long = [b'n'; 101];
        let of = |name, kind| Entry { name, kind, ..OF };
        assert!(archive(&[OF, of(&long[..98], Kind::Fifo)]).is_some());
        assert!(archive(&[OF, of(&long[..99], Kind::Fifo)]).is_none());
        assert!(archive(&[OF, of(&long[..97], Kind::Directory)]).is_some());
        assert!(archive(&[OF, of(&long[..98], Kind::Directory)]).is_none());
        let linked = archive(&[OF, of(b"l", Kind::Symlink(&long[..100]))]).unwrap();
        assert_eq!(read(&linked).unwrap().last().unwrap().kind, Kind::Symlink(&long[..100]));
        assert!(archive(&[OF, of(b"l", Kind::Symlink(&long))]).is_none());
        let many = |n| std::iter::once(OF).chain(vec![of(b"f", Kind::Empty); n - 1]).collect::<Vec<_>>();
        assert_eq!(archive(&many(MOST)).unwrap().len(), LEN);
        assert!(archive(&many(MOST + 1)).is_none());
    }
}
