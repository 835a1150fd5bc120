//! A stack that grows deep, stays there for a while, and is checked on the way back.

use std::time::Duration;

use super::book::{Checked, Random};
use super::content::{self, PAGE};
use super::worker::{Behaviour, Setup};

/// Bytes of one frame's array, and the most frames: 3 MiB.
const FRAME: usize = 4 * PAGE;
const DEEPEST: usize = 192;

pub struct Stack {
    salt: u64,
    version: u32,
    rng: Random,
}

impl Stack {
    pub fn new(setup: &Setup) -> Checked<Stack> {
        Ok(Stack { salt: setup.salt, version: 0, rng: Random::new(setup.salt) })
    }
}

/// `bottom` is called at the deepest place with the address of a byte of the frame above.
#[inline(never)]
fn descend(salt: u64, version: u32, depth: usize, bottom: &mut dyn FnMut(*mut u8)) -> Checked {
    let mut frame = [0; FRAME];
    let frame = std::hint::black_box(&mut frame);
    for (i, page) in frame.chunks_mut(PAGE).enumerate() {
        content::fill(page, salt, (depth * 4 + i) as u64, version);
    }
    if depth == 0 {
        bottom(frame.as_mut_ptr());
    } else {
        descend(salt, version, depth - 1, bottom)?;
    }
    for (i, page) in frame.chunks(PAGE).enumerate() {
        content::check(page, salt, (depth * 4 + i) as u64, version)
            .map_err(|e| format!("depth {depth}: {e}"))?;
    }
    Ok(())
}

impl Behaviour for Stack {
    fn step(&mut self) -> Checked {
        self.version += 1;
        let depth = 1 + self.rng.below(DEEPEST);
        descend(self.salt, self.version, depth, &mut |_| std::thread::sleep(Duration::from_millis(8)))
    }

    fn verify(&mut self) -> Checked<usize> {
        self.version += 1;
        descend(self.salt, self.version, DEEPEST, &mut |_| {})?;
        Ok(DEEPEST * FRAME / PAGE)
    }

    #[cfg(test)]
    fn notices(&mut self) -> bool {
        // SAFETY: flips a byte of the frame that is alive above.
        descend(self.salt, 1, 3, &mut |at| unsafe { *at ^= 1 }).is_err()
    }

    fn sample(&mut self) -> *mut u8 {
        std::ptr::null_mut()
    }
}
