#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::memory::daemon::fuzz::lazy_pages::run(data));
