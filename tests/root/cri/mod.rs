//! Pods, as kubelet asks containerd for them: a client of the CRI (runtime.v1) for the tests, and the comparison of what it sees of a runtime
//! handler with what it sees of runc's.
//!
//! | file | what lives there |
//! |---|---|
//! | `config.rs`, `answers.rs`, `stats.rs` | the messages, of the CRI's only the fields that are used or compared |
//! | `client.rs` | the calls |
//! | `stream.rs` | exec, attach and port-forward: web sockets |
//! | `events.rs` | the stream of container events |
//! | `pod.rs` | a pod and its containers |
//! | `record.rs` | what was seen, without what is different each time (names, times, pids) |
//! | `compare.rs` | one scene under two handlers |

pub mod answers;
pub mod client;
pub mod compare;
pub mod config;
pub mod events;
pub mod pod;
pub mod record;
pub mod stats;
pub mod stream;
