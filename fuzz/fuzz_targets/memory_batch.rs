#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::memory::fuzz::memory_batch::run(data));
