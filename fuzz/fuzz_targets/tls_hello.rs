#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::tls::fuzz::tls_hello::run(data));
