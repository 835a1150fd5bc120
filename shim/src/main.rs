//! The binary `containerd-shim-transship-v2`.

fn main() {}
