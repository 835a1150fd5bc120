//! What a file held when it was last sent, block by block, so that only blocks that changed are sent again. Pure.
//!
//! A block's hash covers its bytes and where its holes are. Blocks without data are not listed: a sparse file of any
//! size costs what its data costs, 16 bytes a block, 0.4 % at most.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Smallest block.
const MIN: u64 = 4 << 10;
/// Largest block.
const MAX: u64 = 1 << 20;
/// Blocks that a file has at most when it is first sent, up to 256 GiB.
const COUNT: u64 = 256 << 10;

/// The blocks of a file that have data, each with a hash of the kind `H`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks<H = u64> {
    size: u64,
    seed: u64,
    /// Number of the block and hash, ascending.
    list: Vec<(u64, H)>,
}

/// The block size for a file of this size: it stays as the file grows.
pub fn block_size(file: u64) -> u64 {
    (file / COUNT).next_power_of_two().clamp(MIN, MAX)
}

impl<H: Copy> Blocks<H> {
    /// None yet. The seed differs from migration to migration.
    pub fn new(size: u64, seed: u64) -> Blocks<H> {
        Blocks { size, seed, list: Vec::new() }
    }

    /// Bytes of one block.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The seed given.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Adds a block; they come in order.
    pub fn push(&mut self, block: u64, hash: H) {
        debug_assert!(self.list.last().is_none_or(|(last, _)| *last < block));
        self.list.push((block, hash));
    }

    /// The hash of a block; none for a hole.
    pub fn get(&self, block: u64) -> Option<H> {
        self.list.binary_search_by_key(&block, |(b, _)| *b).ok().map(|at| self.list[at].1)
    }

    /// All of them with their hashes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, H)> + '_ {
        self.list.iter().copied()
    }

    /// Blocks with data from `first` up to but not including `end`.
    pub fn between(&self, first: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
        let from = self.list.partition_point(|(b, _)| *b < first);
        self.list[from..].iter().map(|(b, _)| *b).take_while(move |b| *b < end)
    }
}

/// Hash of a block out of its pieces of data: offset within the block and bytes. None without any.
pub fn hash<'a>(seed: u64, pieces: impl Iterator<Item = (u64, &'a [u8])>) -> Option<u64> {
    let mut sum = None;
    for (offset, bytes) in pieces {
        let place = (offset << 32) | bytes.len() as u64;
        sum = Some(xxh3_64_with_seed(bytes, sum.unwrap_or(seed).wrapping_add(place)));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_grow_with_the_file() {
        for (file, size) in [
            (0, 4 << 10),
            (1 << 30, 4 << 10),
            ((1 << 30) + (256 << 10), 8 << 10),
            (10 << 30, 64 << 10),
            (u64::MAX, 1 << 20),
        ] {
            assert_eq!(block_size(file), size, "{file}");
        }
    }

    #[test]
    fn a_hash_knows_bytes_and_holes() {
        let of = |pieces: &[(u64, &[u8])]| hash(7, pieces.iter().copied());
        assert_eq!(of(&[]), None);
        let whole = of(&[(0, b"abcd")]);
        assert!(whole.is_some() && whole == of(&[(0, b"abcd")]));
        for other in
            [of(&[(0, b"abce")]), of(&[(1, b"abcd")]), of(&[(0, b"abcd\0")]), of(&[(0, b"ab"), (2, b"cd")])]
        {
            assert_ne!(whole, other);
        }
        assert_ne!(hash(8, [(0, &b"abcd"[..])].into_iter()), whole);
        // zeros written are not a hole
        assert_ne!(of(&[(0, &[0; 4096])]), None);
    }

    #[test]
    fn blocks_are_found() {
        let mut blocks = Blocks::new(4096, 1);
        for n in [0, 3, 4, 1 << 50] {
            blocks.push(n, n + 1);
        }
        assert_eq!((blocks.get(3), blocks.get(2), blocks.get(1 << 50)), (Some(4), None, Some((1 << 50) + 1)));
        assert_eq!(blocks.between(1, 4).collect::<Vec<_>>(), [3]);
        assert_eq!(blocks.between(1, u64::MAX).collect::<Vec<_>>(), [3, 4, 1 << 50]);
    }
}
