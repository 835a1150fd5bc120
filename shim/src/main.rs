//! The binary `containerd-shim-transship-v2`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    transship_shim::main()
}
