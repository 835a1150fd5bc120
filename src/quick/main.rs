//! `transship-quick`: what CRIU starts again and again while a container stands still, as the smallest program that can do it. It has no C
//! library and nothing that runs before its own first instruction, and so is there in a tenth of a millisecond.
//!
//! It is called as `DIR/quick/NAME`. NAME is
//! - `action`: every stage of a restore is passed at once, but for the first call at `post-restore`, at which the shim is asked;
//! - `tar`: archives of directories with neither content nor depth ([`transship::criu::tar::flat`]) are made and taken.
//!
//! With the argument `stand-in` alone it is a process with a handful of pages that waits to be ended ([`transship::criu::stand_in`]).
//!
//! Everything else, and everything that fails, is the full program's, which it becomes: `DIR/NAME` ([`transship::criu::gate`]), with the
//! same arguments. So it needs no error messages but one.
//!
//! Whatever it calls must neither allocate, nor panic, nor use the C library or the standard library: neither has been set up, and the
//! functions that they would call are not even linked. The modules that it takes from the library say so of themselves.
//! Its file is linked as `build.rs` says.

#![cfg_attr(quick, no_main)]

#[cfg(quick)]
mod archive;
#[cfg(quick)]
mod memory;
#[cfg(quick)]
mod run;
#[cfg(quick)]
mod start;
#[cfg(quick)]
mod sys;

#[cfg(not(quick))]
fn main() -> std::process::ExitCode {
    eprintln!("transship-quick is not for this kind of machine: transship-gate does its work.");
    std::process::ExitCode::FAILURE
}
