//! Code that is written while the program runs, in memory that is writable and executable at once, and called.

use libc::{MAP_PRIVATE, PROT_EXEC};

use super::book::{Checked, RW, Random, map};
use super::content::PAGE;
use super::worker::{Behaviour, Setup};

const PAGES: usize = 32;
/// Functions, each with room for more than it needs.
const FUNCTIONS: usize = PAGES * PAGE / SIZE;
const SIZE: usize = 256;

pub struct Jit {
    code: *mut u8,
    returns: Vec<u32>,
    rng: Random,
}

/// A function that returns `number`.
#[cfg(target_arch = "x86_64")]
fn code(number: u32) -> [u8; 16] {
    // mov eax, number; ret; int3 ...
    let mut code = [0xcc; 16];
    code[0] = 0xb8;
    code[1..5].copy_from_slice(&number.to_le_bytes());
    code[5] = 0xc3;
    code
}

/// A function that returns `number`.
#[cfg(target_arch = "aarch64")]
fn code(number: u32) -> [u8; 16] {
    // movz w0, low; movk w0, high, lsl 16; ret; brk 0
    let words =
        [0x5280_0000 | (number & 0xffff) << 5, 0x72a0_0000 | (number >> 16) << 5, 0xd65f_03c0, 0xd420_0000];
    let mut code = [0; 16];
    for (bytes, word) in code.chunks_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    code
}

/// Makes the new instructions visible to the CPU that runs them.
#[cfg(target_arch = "aarch64")]
fn flush(at: *mut u8, bytes: usize) {
    unsafe extern "C" {
        fn __clear_cache(from: *mut u8, to: *mut u8);
    }
    // SAFETY: the range is mapped; only caches are touched.
    unsafe { __clear_cache(at, at.add(bytes)) }
}

#[cfg(target_arch = "x86_64")]
fn flush(_: *mut u8, _: usize) {}

impl Jit {
    pub fn new(setup: &Setup) -> Checked<Jit> {
        let code = map(std::ptr::null_mut(), PAGES, RW | PROT_EXEC, MAP_PRIVATE, -1)?;
        let mut jit = Jit { code, returns: vec![0; FUNCTIONS], rng: Random::new(setup.salt) };
        (0..FUNCTIONS).for_each(|i| jit.generate(i));
        Ok(jit)
    }

    fn place(&self, function: usize) -> *mut u8 {
        assert!(function < FUNCTIONS);
        // SAFETY: within the pages of code.
        unsafe { self.code.add(function * SIZE) }
    }

    fn generate(&mut self, function: usize) {
        let number = self.rng.below(u32::MAX as usize) as u32;
        let code = code(number);
        // SAFETY: a function has room for more than these bytes, and nobody runs it now.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.place(function), code.len()) };
        flush(self.place(function), code.len());
        self.returns[function] = number;
    }

    fn call(&self, function: usize) -> Checked {
        let (at, wanted) = (self.place(function), code(self.returns[function]));
        // SAFETY: as many bytes as `generate` has written.
        let bytes = unsafe { std::slice::from_raw_parts(at, wanted.len()) };
        if bytes != wanted {
            return Err(format!(
                "the code of function {function} at {at:p} is {bytes:02x?} instead of {wanted:02x?}"
            ));
        }
        // SAFETY: these are the bytes of a function that takes nothing and returns a number.
        let got = unsafe { std::mem::transmute::<*mut u8, extern "C" fn() -> u32>(at)() };
        if got != self.returns[function] {
            return Err(format!(
                "function {function} returned {got:#x} instead of {:#x}",
                self.returns[function]
            ));
        }
        Ok(())
    }
}

impl Behaviour for Jit {
    fn step(&mut self) -> Checked {
        for _ in 0..12 {
            let function = self.rng.below(FUNCTIONS);
            self.call(function)?;
            self.generate(function);
            self.call(function)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Checked<usize> {
        (0..FUNCTIONS).try_for_each(|i| self.call(i))?;
        Ok(PAGES)
    }

    fn sample(&mut self) -> *mut u8 {
        self.code
    }
}
