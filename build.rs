//! How `transship-quick` is linked (see `src/quick/main.rs`): without the C library's start-up code and without a dynamic linker, at a
//! fixed address, so that nothing has to be relocated before it runs. Only where `cfg(quick)` is set here: elsewhere it is a message.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(quick)");
    let is = |key: &str, values: &[&str]| std::env::var(key).is_ok_and(|v| values.contains(&v.as_str()));
    if is("CARGO_CFG_TARGET_OS", &["linux"]) && is("CARGO_CFG_TARGET_ARCH", &["x86_64", "aarch64"]) {
        println!("cargo:rustc-cfg=quick");
        for arg in ["-nostartfiles", "-no-pie", "-Wl,--no-dynamic-linker"] {
            println!("cargo:rustc-link-arg-bin=transship-quick={arg}");
        }
    }
}
