#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::criu::tar::fuzz::criu_tar::run(data));
