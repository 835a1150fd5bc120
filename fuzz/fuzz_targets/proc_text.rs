#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::memory::fuzz::proc_text::run(data));
