#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship_shim::fuzz::shim_requests::run(data));
