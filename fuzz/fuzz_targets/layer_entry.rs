#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transship::rootfs::fuzz::layer_entry::run(data));
