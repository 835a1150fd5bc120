#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::migrate::fuzz::migrate_stream::run(data));
