#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::net::fuzz::net_config::run(data));
