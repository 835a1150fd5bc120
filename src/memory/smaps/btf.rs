//! The kernel's description of its own types, `/sys/kernel/btf/vmlinux`: the few of them that [`super::program`] needs. The format is
//! Documentation/bpf/btf.rst's; the crates that read it are unmaintained, or do not say where a member is.

use anyhow::{Context, Result, bail, ensure};

/// Where it is.
pub(super) const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Words of a type before what its kind adds: name, info, size or type.
const WORDS: usize = 3;

const STRUCT: u32 = 4;
const FUNC: u32 = 12;

/// What is needed of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Number of the function that the iterator's programs stand for.
    pub function: u32,
    /// Where in `struct vm_area_struct`, in bytes.
    pub start: i16,
    pub end: i16,
    pub flags: i16,
}

impl Layout {
    pub fn of(btf: &[u8]) -> Result<Layout> {
        let types = Types::of(btf)?;
        let (area, _) = types.find(STRUCT, "vm_area_struct")?;
        let member = |name: &str| -> Result<i16> {
            let bits = types.member(area, name)?.with_context(|| format!("no {name}"))?;
            ensure!(bits % 8 == 0, "{name} is in the middle of a byte");
            i16::try_from(bits / 8).with_context(|| format!("{name} is far away"))
        };
        let (_, function) = types.find(FUNC, "bpf_iter_task_vma")?;
        Ok(Layout {
            function,
            start: member("vm_start")?,
            end: member("vm_end")?,
            flags: member("vm_flags")?,
        })
    }
}

struct Types<'a> {
    /// All types, as words.
    words: Vec<u32>,
    /// Where each begins; the first has the number 1.
    begins: Vec<u32>,
    strings: &'a [u8],
}

impl<'a> Types<'a> {
    fn of(btf: &'a [u8]) -> Result<Types<'a>> {
        ensure!(btf.first_chunk::<2>().map(|m| u16::from_ne_bytes(*m)) == Some(MAGIC), "no BTF");
        let header = |at: usize| -> Result<usize> {
            let word = btf.get(at..).and_then(<[u8]>::first_chunk::<4>).context("half a header")?;
            Ok(u32::from_ne_bytes(*word) as usize)
        };
        let len = header(4)?;
        let part = |at: usize| -> Result<&'a [u8]> {
            let (from, size) = (len + header(at)?, header(at + 4)?);
            btf.get(from..from + size).context("half a part")
        };
        let (types, strings) = (part(8)?, part(16)?);
        let words = types.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w)).collect();
        let mut all = Types { words, begins: Vec::new(), strings };
        let mut at = 0;
        while at < all.words.len() {
            ensure!(at + WORDS <= all.words.len(), "half a type");
            all.begins.push(u32::try_from(at)?);
            at += WORDS + all.more(at)?;
        }
        Ok(all)
    }

    fn kind(&self, at: usize) -> u32 {
        self.words[at + 1] >> 24 & 0x1f
    }

    /// Members, parameters, values.
    fn count(&self, at: usize) -> usize {
        (self.words[at + 1] & 0xffff) as usize
    }

    /// Words that a type's kind adds.
    fn more(&self, at: usize) -> Result<usize> {
        let count = self.count(at);
        Ok(match self.kind(at) {
            // pointers, modifiers, forward declarations, functions, floats
            2 | 7..=12 | 16 | 18 => 0,
            // integers, variables, declarations' tags
            1 | 14 | 17 => 1,
            // arrays
            3 => 3,
            // enums and prototypes
            6 | 13 => 2 * count,
            // structs and unions, sections, enums of 64 bits
            4 | 5 | 15 | 19 => 3 * count,
            other => bail!("an unknown kind of type: {other}"),
        })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let text = self.strings.get(name as usize..).unwrap_or_default();
        text.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Where a type is, and its number.
    fn find(&self, kind: u32, name: &str) -> Result<(usize, u32)> {
        let found = self.begins.iter().zip(1..).map(|(at, number)| (*at as usize, number));
        let mut found = found.filter(|(at, _)| self.kind(*at) == kind);
        found.find(|(at, _)| self.is_named(self.words[*at], name)).with_context(|| format!("no {name}"))
    }

    /// Where in a struct a member begins, in bits; it may be in one without a name.
    fn member(&self, at: usize, wanted: &str) -> Result<Option<u32>> {
        // with it, the upper eight bits are the size of a bit field
        let fields = self.words[at + 1] >> 31 == 1;
        let members = &self.words[at + WORDS..][..WORDS * self.count(at)];
        for [name, kind, bits] in members.as_chunks::<WORDS>().0 {
            let bits = if fields { bits & 0x00ff_ffff } else { *bits };
            if self.is_named(*name, wanted) {
                return Ok(Some(bits));
            }
            if self.is_named(*name, "") {
                let inner = kind.checked_sub(1).and_then(|i| self.begins.get(i as usize));
                let inner = *inner.context("a member without a type")? as usize;
                // a bit field without a name is of another kind
                if matches!(self.kind(inner), 4 | 5)
                    && let Some(within) = self.member(inner, wanted)?
                {
                    return Ok(Some(bits + within));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRINGS: &[u8] = b"\0vm_area_struct\0vm_start\0vm_end\0vm_flags\0bpf_iter_task_vma\0";

    fn name(of: &str) -> u32 {
        let at = STRINGS.windows(of.len() + 2).position(|w| w == format!("\0{of}\0").as_bytes());
        u32::try_from(at.unwrap() + 1).unwrap()
    }

    fn kind(kind: u32, count: u32) -> u32 {
        kind << 24 | count
    }

    fn btf(types: &[u32]) -> Vec<u8> {
        let len = |n: usize| u32::try_from(n).unwrap();
        let header = [24, 0, 4 * len(types.len()), 4 * len(types.len()), len(STRINGS.len())];
        let words = header.iter().chain(types).flat_map(|w| w.to_ne_bytes());
        MAGIC.to_ne_bytes().into_iter().chain([1, 0]).chain(words).chain(STRINGS.iter().copied()).collect()
    }

    fn types() -> Vec<u32> {
        let long = [0, kind(1, 0), 8, 64];
        let inner = [0, kind(4, 2), 16, name("vm_start"), 1, 0, name("vm_end"), 1, 64];
        let outer = [name("vm_area_struct"), kind(4, 2), 32, 0, 2, 64, name("vm_flags"), 1, 192];
        let function = [name("bpf_iter_task_vma"), kind(12, 0), 0];
        [&long[..], &inner, &outer, &function].concat()
    }

    #[test]
    fn members_are_found_in_structs_without_a_name() {
        let layout = Layout { function: 4, start: 8, end: 16, flags: 24 };
        assert_eq!(Layout::of(&btf(&types())).unwrap(), layout);
    }

    #[test]
    fn what_is_missing_or_broken_is_said() {
        let said = |btf: &[u8]| Layout::of(btf).unwrap_err().to_string();
        let whole = btf(&types());
        assert_eq!(said(b"nonsense"), "no BTF");
        assert_eq!(said(&btf(&[0, kind(30, 0), 0])), "an unknown kind of type: 30");
        assert_eq!(said(&btf(&types()[..22])), "no bpf_iter_task_vma");
        assert_eq!(said(&btf(&types()[22..])), "no vm_area_struct");
        for cut in 0..whole.len() {
            assert!(Layout::of(&whole[..cut]).is_err(), "{cut}");
        }
        // a struct in itself would be one without end: no compiler makes it
        let mut words = types();
        words[17] = 99;
        assert_eq!(said(&btf(&words)), "a member without a type");
    }

    #[test]
    fn this_kernel_describes_its_mappings() {
        match std::fs::read(PATH) {
            Ok(btf) => assert!(Layout::of(&btf).unwrap().function > 0),
            Err(e) => println!("SKIPPED: {PATH}: {e}"),
        }
    }
}
