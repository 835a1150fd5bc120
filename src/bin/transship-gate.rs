//! The gates of a restore and the tools of a dump, as a program of their own: small, because CRIU starts it many times while a
//! container stands still. What it does, and as what it is called, is [`transship::criu::gate`].

use std::process::ExitCode;

fn main() -> ExitCode {
    transship::criu::gate::main_if_invoked().unwrap_or_else(|| {
        eprintln!("transship-gate is called by runc and CRIU while a container is moved, not by hand.");
        ExitCode::FAILURE
    })
}
