//! The binary `transship`: the operator's command line and the node's agent. Everything lives in the library.

fn main() {}
