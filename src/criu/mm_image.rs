//! `mm-N.img`: the mappings of one task, and what each of them means for its pages.
//!
//! One `mm_entry` (images/mm.proto) with a `vma_entry` (images/vma.proto) for each mapping, behind the words IMG_COMMON_MAGIC and
//! MM_MAGIC. Of an `mm_entry` only its mappings are read.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

use super::images::IMG_COMMON_MAGIC;
use super::version::Version;
use crate::memory::RangeSet;

/// `MM_MAGIC` (criu/include/magic.h).
const MM_MAGIC: u32 = 0x5749_2820;

// mmap(2)'s flags as CRIU's images have them: those of the kernel, on all of its architectures but the ones with flags of their own,
// on which we do not run.
const MAP_PRIVATE: u32 = 0x2;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_GROWSDOWN: u32 = 0x100;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;

// criu/include/image.h
const VMA_AREA_VSYSCALL: u32 = 1 << 2;
const VMA_AREA_VDSO: u32 = 1 << 3;
const VMA_AREA_VVAR: u32 = 1 << 12;
const VMA_AREA_AIORING: u32 = 1 << 13;
const VMA_AREA_GUARD: u32 = 1 << 16;

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Mm {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<Vma>,
}

/// One mapping.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Vma {
    /// First byte.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// First byte behind it.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Where in its file it begins, in pages.
    #[prost(uint64, required, tag = "3")]
    pub pgoff: u64,
    /// CRIU's number of what is mapped.
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    /// mmap(2)'s protection.
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    /// mmap(2)'s flags.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// CRIU's `VMA_*`.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    /// -1 in every image.
    #[prost(sint64, required, tag = "8")]
    pub fd: i64,
}

impl Vma {
    /// CRIU registers it with userfaultfd in a lazy restore (`vma_entry_can_be_lazy`).
    pub fn can_be_lazy(&self) -> bool {
        self.flags & (MAP_ANONYMOUS | MAP_PRIVATE) == MAP_ANONYMOUS | MAP_PRIVATE
            && self.flags & (MAP_LOCKED | MAP_HUGETLB) == 0
            && self.status & (VMA_AREA_VDSO | VMA_AREA_VVAR | VMA_AREA_VSYSCALL | VMA_AREA_GUARD) == 0
    }

    /// A page of it that no image mentions is zero.
    pub fn is_anonymous(&self) -> bool {
        self.flags & (MAP_ANONYMOUS | MAP_PRIVATE) == MAP_ANONYMOUS | MAP_PRIVATE
            && self.status & (VMA_AREA_VDSO | VMA_AREA_VVAR | VMA_AREA_VSYSCALL | VMA_AREA_AIORING) == 0
    }

    /// The main thread's stack.
    pub fn is_stack(&self) -> bool {
        self.flags & MAP_GROWSDOWN != 0
    }
}

/// The first CRIU that knows guard pages.
const GUARDS: Version = Version { major: 4, minor: 2, sublevel: 0 };

/// Adds guard pages to `mm-ID.img`, in which there are none, as this CRIU would have done.
pub fn add_guards(images: &Path, id: u64, guards: &RangeSet, criu: Version) -> Result<()> {
    if guards.is_empty() || criu < GUARDS {
        return Ok(());
    }
    let path = images.join(format!("mm-{id}.img"));
    let add = || -> Result<()> {
        crate::private::write(&path, &with_guards(&std::fs::read(&path)?, guards)?).map_err(Into::into)
    };
    add().with_context(|| format!("adding guard pages to {}", path.display()))
}

fn with_guards(image: &[u8], guards: &RangeSet) -> Result<Vec<u8>> {
    let entry = entry(image)?;
    // as `collect_madv_guards` does (criu/mem.c): nothing is known but where; repeated fields may stand anywhere in a message
    let guard =
        |r: Range<u64>| Vma { start: r.start, end: r.end, status: VMA_AREA_GUARD, fd: -1, ..Vma::default() };
    let more = Mm { vmas: guards.iter().map(guard).collect() }.encode_to_vec();
    let len = u32::try_from(entry.len() + more.len()).context("a very long entry")?;
    Ok([&head()[..], &len.to_le_bytes(), entry, &more].concat())
}

fn head() -> Vec<u8> {
    [IMG_COMMON_MAGIC.to_le_bytes(), MM_MAGIC.to_le_bytes()].concat()
}

/// The one entry of an image.
fn entry(image: &[u8]) -> Result<&[u8]> {
    let rest = image.strip_prefix(&head()[..]).context("not an image of mappings")?;
    let (len, rest) = rest.split_first_chunk::<4>().context("half a length")?;
    rest.get(..u32::from_le_bytes(*len) as usize).context("half an entry")
}

/// The mappings of one task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings(pub Vec<Vma>);

impl Mappings {
    /// Reads `mm-ID.img`.
    pub fn read(images: &Path, id: u64) -> Result<Self> {
        let path = images.join(format!("mm-{id}.img"));
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Self::decode(&bytes).with_context(|| format!("reading {}", path.display()))
    }

    pub(super) fn decode(image: &[u8]) -> Result<Self> {
        let vmas = Mm::decode(entry(image)?).context("decoding mappings")?.vmas;
        ensure!(vmas.iter().all(|v| v.start < v.end), "an impossible mapping");
        Ok(Self(vmas))
    }

    fn set(&self, what: impl Fn(&Vma) -> bool) -> RangeSet {
        self.0.iter().filter(|v| what(v)).map(|v| v.start..v.end).collect()
    }

    /// Addresses whose pages may come after the tasks run.
    pub fn lazy(&self) -> RangeSet {
        self.set(Vma::can_be_lazy)
    }

    /// Addresses whose zero pages need no mention.
    pub fn anonymous(&self) -> RangeSet {
        self.set(Vma::is_anonymous)
    }

    /// The main stack.
    pub fn stacks(&self) -> RangeSet {
        self.set(Vma::is_stack)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn vma(start: u64, end: u64, flags: u32, status: u32) -> Vma {
        Vma { start, end, prot: 3, flags, status, fd: -1, ..Vma::default() }
    }

    /// Writes an image as CRIU does.
    pub fn write(images: &Path, id: u64, vmas: &[Vma]) {
        let entry = Mm { vmas: vmas.to_vec() }.encode_to_vec();
        let len = u32::try_from(entry.len()).unwrap();
        let bytes =
            [&IMG_COMMON_MAGIC.to_le_bytes()[..], &MM_MAGIC.to_le_bytes(), &len.to_le_bytes(), &entry]
                .concat();
        std::fs::write(images.join(format!("mm-{id}.img")), bytes).unwrap();
    }

    #[test]
    fn an_image_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let vmas = [vma(0x1000, 0x3000, 0x22, 1 << 9), vma(0x8000, 0x9000, 0x2, 1 << 6)];
        write(dir.path(), 7, &vmas);
        assert_eq!(Mappings::read(dir.path(), 7).unwrap().0, vmas);
        assert!(Mappings::read(dir.path(), 8).is_err());
        let bytes = std::fs::read(dir.path().join("mm-7.img")).unwrap();
        assert!(Mappings::decode(&bytes[..20]).is_err() && Mappings::decode(&bytes[1..]).is_err());
    }

    #[test]
    fn guard_pages_are_added_behind_the_mappings() {
        let dir = tempfile::tempdir().unwrap();
        let of = [vma(0x1000, 0x9000, 0x22, 1 << 9), vma(0xa000, 0xb000, 0x22, 1 << 9)];
        write(dir.path(), 7, &of);
        let guards: RangeSet = [0x2000..0x3000, 0x5000..0x7000].into_iter().collect();
        let before = Version { minor: GUARDS.minor - 1, ..GUARDS };
        for (criu, some) in [(before, &guards), (GUARDS, &RangeSet::new())] {
            add_guards(dir.path(), 7, some, criu).unwrap();
            assert_eq!(Mappings::read(dir.path(), 7).unwrap().0, of);
        }
        add_guards(dir.path(), 7, &guards, GUARDS).unwrap();
        let all = Mappings::read(dir.path(), 7).unwrap();
        let guard = |start, end| Vma { prot: 0, ..vma(start, end, 0, VMA_AREA_GUARD) };
        assert_eq!(all.0[..2], of);
        assert_eq!(all.0[2..], [guard(0x2000, 0x3000), guard(0x5000, 0x7000)]);
        assert_eq!(all.lazy().bytes(), 0x9000);
        assert!(add_guards(dir.path(), 8, &guards, GUARDS).is_err());
        // alloc_vma_area: all of CRIU's required fields are there, and this one is -1
        let one = guard(1, 2).encode_to_vec();
        assert_eq!(one, [8, 1, 16, 2, 24, 0, 32, 0, 40, 0, 48, 0, 56, 128, 128, 4, 64, 1]);
    }

    #[test]
    fn what_may_be_lazy_and_what_is_zero_by_itself() {
        let one = |flags, status| {
            let v = vma(0, 1, flags, status);
            (v.can_be_lazy(), v.is_anonymous())
        };
        assert_eq!(one(0x22, 1 << 9), (true, true));
        assert_eq!(one(0x22 | MAP_LOCKED, 1 << 9), (false, true));
        assert_eq!(one(0x22 | MAP_HUGETLB, 1 << 9), (false, true));
        assert_eq!(one(0x2, 1 << 6), (false, false), "a private file mapping");
        assert_eq!(one(0x21, 1 << 8), (false, false), "shared");
        assert_eq!(one(0x22, VMA_AREA_VDSO), (false, false));
        assert_eq!(one(0x22, VMA_AREA_AIORING), (true, false));
    }
}
