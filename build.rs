//! How `transship-quick` is linked (see `src/quick/main.rs`): without the C library's start-up code and without a dynamic linker, at a
//! fixed address, so that nothing has to be relocated before it runs.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |key: &str, values: &[&str]| std::env::var(key).is_ok_and(|v| values.contains(&v.as_str()));
    // where it is more than a message (the same condition as in src/quick/main.rs)
    if is("CARGO_CFG_TARGET_OS", &["linux"]) && is("CARGO_CFG_TARGET_ARCH", &["x86_64", "aarch64"]) {
        for arg in ["-nostartfiles", "-no-pie", "-Wl,--no-dynamic-linker"] {
            println!("cargo:rustc-link-arg-bin=transship-quick={arg}");
        }
    }
}
