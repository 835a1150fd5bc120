//! Memory that can be checked to the last byte: every page carries its index, its version, a checksum and content that follows
//! from the first two. What version a page must have stands in a table beside it, and how many writes there were in all in a
//! counter: a page that came back older than it was, even together with its part of the table, is found.

/// Bytes of a page.
pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Words before the content: index, version, checksum.
const HEAD: usize = 3;
/// How many wrong pages are named.
const NAMED: usize = 20;

type Page = [u64; WORDS];

/// An anonymous mapping of whole pages.
pub struct Pages {
    memory: &'static mut [Page],
    versions: Vec<u32>,
    writes: u64,
}

/// What a check found.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub pages: usize,
    /// Wrong pages; a total of writes that does not add up counts as one more.
    pub wrong: u64,
    /// What was wrong with the first of them.
    pub named: Vec<String>,
}

/// One word of a page's content: it does not compress, and no two pages are alike.
#[inline(always)]
fn word(seed: u64, i: usize) -> u64 {
    let mut z = seed.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    z ^ (z >> 29)
}

fn seed(index: usize, version: u32) -> u64 {
    word((index as u64) << 32 | u64::from(version), 1)
}

fn write(page: &mut Page, index: usize, version: u32) {
    let seed = seed(index, version);
    let mut sum = 0u64;
    for (i, w) in page.iter_mut().enumerate().skip(HEAD) {
        *w = word(seed, i);
        sum = sum.wrapping_add(*w);
    }
    (page[0], page[1], page[2]) = (index as u64, u64::from(version), sum);
}

/// What is wrong with the page, if anything is.
fn fault(page: &Page, index: usize, version: u32) -> Option<String> {
    let seed = seed(index, version);
    let (mut sum, mut differ) = (0u64, 0);
    for (i, w) in page.iter().enumerate().skip(HEAD) {
        sum = sum.wrapping_add(*w);
        differ += u32::from(*w != word(seed, i));
    }
    if page[0] == index as u64 && page[1] == u64::from(version) && page[2] == sum && differ == 0 {
        return None;
    }
    let kind = if page.iter().all(|w| *w == 0) {
        "all zeros".to_owned()
    } else if page[0] == index as u64 && page[1] < u64::from(version) && page[2] == sum {
        format!("version {} instead of {version}", page[1])
    } else {
        format!("says index {} version {}, {differ} of {} words differ", page[0], page[1], WORDS - HEAD)
    };
    Some(format!("page {index}: {kind}"))
}

impl Pages {
    /// Maps and fills `bytes`.
    pub fn new(bytes: usize) -> Result<Self, String> {
        Self::mapped(bytes, libc::MAP_PRIVATE)
    }

    /// The same as shared memory.
    pub fn shared(bytes: usize) -> Result<Self, String> {
        Self::mapped(bytes, libc::MAP_SHARED)
    }

    fn mapped(bytes: usize, how: i32) -> Result<Self, String> {
        let count = (bytes / PAGE).max(1);
        // SAFETY: a fresh anonymous mapping, which nobody else knows of.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                how | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(format!("{bytes} bytes of memory: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the mapping is `count` pages long, aligned, zeroed, never unmapped and referred to by this slice alone.
        let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<Page>(), count) };
        let mut pages = Self { memory, versions: vec![0; count], writes: 0 };
        for index in 0..count {
            pages.write(index);
        }
        Ok(pages)
    }

    pub fn count(&self) -> usize {
        self.memory.len()
    }

    /// Gives the page its next version.
    #[inline]
    pub fn write(&mut self, index: usize) {
        self.versions[index] += 1;
        self.writes += 1;
        write(&mut self.memory[index], index, self.versions[index]);
    }

    /// Reads every byte.
    pub fn verify(&self) -> Verdict {
        let (mut wrong, mut named) = (0, Vec::new());
        for (index, (page, version)) in self.memory.iter().zip(&self.versions).enumerate() {
            if let Some(fault) = fault(page, index, *version) {
                wrong += 1;
                if named.len() < NAMED {
                    named.push(fault);
                }
            }
        }
        let total: u64 = self.versions.iter().map(|v| u64::from(*v)).sum();
        if total != self.writes {
            wrong += 1;
            named.push(format!("{} writes, but the versions add up to {total}", self.writes));
        }
        Verdict { pages: self.count(), wrong, named }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> Pages {
        let mut pages = Pages::new(64 * PAGE).unwrap();
        for i in 0..1000 {
            pages.write(i * 7 % 64);
        }
        pages
    }

    #[test]
    fn what_was_written_is_right() {
        assert_eq!(pages().verify(), Verdict { pages: 64, wrong: 0, named: vec![] });
    }

    #[test]
    fn every_kind_of_wrong_page_is_found() {
        let p = pages();
        // one bit
        p.memory[3][500] ^= 1 << 40;
        // zeros
        p.memory[4] = [0; WORDS];
        // an older version, right in itself
        let version = p.versions[5];
        write(&mut p.memory[5], 5, version - 1);
        // another page's content
        p.memory[6] = p.memory[7];
        let verdict = p.verify();
        assert_eq!(verdict.wrong, 4, "{verdict:?}");
        for (text, want) in
            verdict.named.iter().zip(["1 of 509 words", "zeros", "instead of", "says index 7"])
        {
            assert!(text.contains(want), "{text}: {want}");
        }
    }

    #[test]
    fn a_page_that_went_back_with_its_version_is_found() {
        let mut p = pages();
        p.versions[9] -= 1;
        let version = p.versions[9];
        write(&mut p.memory[9], 9, version);
        assert_eq!(p.verify().wrong, 1);
    }
}
