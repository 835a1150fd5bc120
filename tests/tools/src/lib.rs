//! What the test programs share: command-line options, pseudo-random content that can be checked later, clocks, signals and
//! latencies. The programs themselves are in `src/bin/`: `ts-client` (a redis client outside of the containers), `ts-probe`
//! (workloads inside of them, for the tests), `ts-load` (workloads for measurements) and `ts-bench` (the measurements).

pub mod args;
pub mod latency;
pub mod pattern;
pub mod signals;
pub mod time;
