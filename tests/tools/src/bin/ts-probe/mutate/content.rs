//! What a page holds: it follows from the page's place and its version alone, so every byte of it can be checked. Where the
//! memory comes from and who writes it is the behaviours' business.
//!
//! Version 0 is a page that was never written or that was given back: zeros. Of the others some are zeros too (written ones), some
//! hold one byte in zeros, some compress well, most do not: a mover that elides, compresses or compares must get all of them right.

use transship_testtools::pattern::Pattern;

/// Bytes of a page. Larger pages of other machines only mean that several of ours lie in one of theirs.
pub const PAGE: usize = 4096;

/// Older and newer versions that a wrong page is compared with, so that the message can say what it is.
const KIN: u32 = 64;

fn seed(salt: u64, index: u64, version: u32) -> u64 {
    let mut z = salt ^ index.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ u64::from(version).rotate_left(40);
    z = (z ^ (z >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    z ^ (z >> 32)
}

/// Writes what the page holds in this version.
pub fn fill(page: &mut [u8], salt: u64, index: u64, version: u32) {
    let seed = seed(salt, index, version);
    match (version, seed % 16) {
        (0, _) | (_, 0) => page.fill(0),
        (_, 1) => {
            page.fill(0);
            page[(seed >> 8) as usize % PAGE] = (seed >> 32) as u8 | 1;
        }
        (_, 2..=4) => page.chunks_mut(8).for_each(|word| word.copy_from_slice(&seed.to_le_bytes())),
        _ => Pattern::new(seed).fill(page),
    }
}

/// Fails, saying how the page differs, unless it holds this version.
pub fn check(page: &[u8], salt: u64, index: u64, version: u32) -> Result<(), String> {
    let mut wanted = [0; PAGE];
    fill(&mut wanted, salt, index, version);
    if page == wanted {
        return Ok(());
    }
    let differs = |wanted: &[u8]| page.iter().zip(wanted).filter(|(a, b)| a != b).count();
    let count = differs(&wanted);
    let first = page.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or(0);
    let mut other = [0; PAGE];
    let mut is = |version| {
        fill(&mut other, salt, index, version);
        differs(&other) == 0
    };
    let older = (version.saturating_sub(KIN)..version).rev().find(|v| is(*v));
    let kin = older.or_else(|| (version + 1..version + KIN).find(|v| is(*v)));
    let what = match kin {
        _ if page.iter().all(|b| *b == 0) => "it is zeros".to_owned(),
        Some(kin) => format!("it is version {kin}"),
        None => format!(
            "{:02x?} in the place of {:02x?}",
            &page[first..][..8.min(PAGE - first)],
            &wanted[first..][..8.min(PAGE - first)]
        ),
    };
    Err(format!(
        "page {index} at {:p} should be version {version}, {count} bytes differ, the first at {first}: {what}",
        page.as_ptr()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_occurs_and_each_changed_byte_is_seen() {
        let mut kinds = [0; 4];
        for version in 1..200 {
            let mut page = [1; PAGE];
            fill(&mut page, 5, 9, version);
            check(&page, 5, 9, version).unwrap();
            let set = page.iter().filter(|b| **b != 0).count();
            let same = page.chunks(8).all(|c| c == &page[..8]);
            kinds[match (set, same) {
                (0, _) => 0,
                (1, _) => 1,
                (_, true) => 2,
                _ => 3,
            }] += 1;
            for at in [0, 7, 2048, PAGE - 1] {
                page[at] ^= 4;
                assert!(check(&page, 5, 9, version).is_err());
                page[at] ^= 4;
            }
        }
        assert!(kinds.iter().all(|k| *k > 0) && kinds[3] > 100, "{kinds:?}");
        check(&[0; PAGE], 5, 9, 0).unwrap();
    }

    #[test]
    fn the_message_says_what_the_page_is() {
        let (mut page, noisy) = ([0; PAGE], |v: &u32| seed(1, 2, *v) % 16 > 4);
        let mut versions = (1..100).filter(noisy);
        let (old, new) = (versions.next().unwrap(), versions.next().unwrap());
        fill(&mut page, 1, 2, old);
        assert!(check(&page, 1, 2, new).unwrap_err().contains(&format!("it is version {old}")));
        assert!(check(&page, 1, 3, old).unwrap_err().contains("in the place of"));
        assert!(check(&[0; PAGE], 1, 2, old).unwrap_err().contains("it is zeros"));
    }
}
