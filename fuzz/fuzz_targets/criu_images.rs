#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::criu::fuzz::criu_images::run(data));
