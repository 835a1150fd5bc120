//! Anonymous memory whose every page is checked each round, a part of it rewritten.

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

const BLOCK: usize = 4096;

pub fn run(args: &mut Args) -> Result<(), String> {
    let blocks = (args.number("MB")? << 20) as usize / BLOCK;
    let dirty = blocks * args.option_number("dirty", 1)?.min(100) as usize / 100;
    let mut memory = vec![0u8; blocks * BLOCK];
    // what a block holds follows from its place and from how often it has been written
    let mut generation = vec![0u32; blocks];
    let seed = |block: usize, generation: u32| (block as u64) << 32 | u64::from(generation);
    for (i, block) in memory.chunks_mut(BLOCK).enumerate() {
        Pattern::new(seed(i, 0)).fill(block);
    }
    let mut next = 0;
    say::rounds("memory", args, |_| {
        let mut wrong = 0;
        for (i, block) in memory.chunks(BLOCK).enumerate() {
            wrong += Pattern::new(seed(i, generation[i])).wrong(block);
        }
        for _ in 0..dirty {
            generation[next] += 1;
            Pattern::new(seed(next, generation[next])).fill(&mut memory[next * BLOCK..(next + 1) * BLOCK]);
            next = (next + 1) % blocks;
        }
        Ok(format!("wrong={wrong} bytes={}", memory.len()))
    })
}
