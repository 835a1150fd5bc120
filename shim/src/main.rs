//! The binary `containerd-shim-transship-v2`.

#[allow(dead_code, unused_imports)]
mod console;
#[allow(dead_code, unused_imports)]
mod io;

fn main() {}
