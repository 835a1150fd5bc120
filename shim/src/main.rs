//! The binary `containerd-shim-transship-v2`.

#[allow(dead_code, unused_imports)]
mod console;
#[allow(dead_code, unused_imports)]
mod events;
#[allow(dead_code, unused_imports)]
mod io;
#[allow(dead_code, unused_imports)]
mod oom;
#[allow(dead_code, unused_imports)]
mod stats;

fn main() {}
