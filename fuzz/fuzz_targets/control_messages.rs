#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::control::fuzz::control_messages::run(data));
