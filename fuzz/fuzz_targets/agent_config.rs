#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::agent::fuzz::agent_config::run(data));
