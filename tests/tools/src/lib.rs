//! What the test programs share: command-line options, pseudo-random content that can be checked later, clocks and signals.
//! The programs themselves are in `src/bin/`: `ts-client` (a redis client outside of the containers) and `ts-probe`
//! (workloads inside of them).

pub mod args;
pub mod pattern;
pub mod signals;
pub mod time;
