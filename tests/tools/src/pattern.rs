//! Pseudo-random bytes that follow from a seed alone, so that content can be checked without being kept. They do not
//! compress and no two pages are alike.

/// xorshift64*, started from a mixed seed so that neighbouring seeds have nothing in common.
pub struct Pattern(u64);

impl Pattern {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((z ^ (z >> 31)) | 1)
    }

    fn next(&mut self) -> [u8; 8] {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
    }

    /// Fills `bytes` with the sequence.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next()[..chunk.len()]);
        }
    }

    /// How many of `bytes` are not what the sequence says.
    pub fn wrong(&mut self, bytes: &[u8]) -> u64 {
        let mut wrong = 0;
        for chunk in bytes.chunks(8) {
            let want = self.next();
            if chunk != &want[..chunk.len()] {
                wrong += chunk.iter().zip(want).filter(|(a, b)| *a != b).count() as u64;
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_right_and_any_change_is_seen() {
        let mut bytes = vec![0; 1003];
        Pattern::new(7).fill(&mut bytes);
        assert_eq!(Pattern::new(7).wrong(&bytes), 0);
        assert!(Pattern::new(8).wrong(&bytes) > 900);
        bytes[1001] ^= 1;
        assert_eq!(Pattern::new(7).wrong(&bytes), 1);
    }
}
